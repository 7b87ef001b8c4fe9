"""One script for any CUDA machine: is the toolkit right there, does it repeat, how fast is it, what is faster still.

``python -m condense.benchmarks.gpu_check --minutes 8 --out DIR`` works through stages in order of value and stops in
time. ``DIR/gpu_check.json`` is rewritten after every stage, so a kill loses at most the stage that was running;
``DIR/gpu_check.txt`` is one table of it. A stage or a part of one that fails is recorded with its message and the rest
goes on. Exit codes: 0 nothing failed, 1 something did, 2 a mistake in what was given, 130 interrupted.

Needs torch, torchvision and numpy, and with ``--data`` what reads those data; timm only for timm's networks.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import itertools
import json
import math
import os
import platform
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

import condense
from condense import networks, rng, tasks
from condense import run as run_module
from condense.augment import OPERATIONS, VARIANTS, dsa
from condense.benchmarks.speed import datadam, dc, dcc, dm, experts, mtt, sre2l, students
from condense.benchmarks.speed import dsa as dsa_steps
from condense.benchmarks.speed.measure import (
    PRODUCT,
    PUBLISHED,
    Case,
    Change,
    Parser,
    StepBenchmark,
    aligned,
    difference,
    distance,
    drive,
    gibibytes,
    guarded,
    random_images,
    random_task,
    run_alone,
    synchronise,
    tf32,
    time_steps,
    write,
)
from condense.errors import CondenseError
from condense.labels import HardLabels
from condense.light_labels import Int8TeacherLabels
from condense.methods.label_lightening import KINDS, lighten
from condense.registry import METHODS
from condense.run import Run, deterministic_kernels, device_name, peak_memory, pick_device, pick_precision
from condense.students import FixedSource, Student, accuracy, train
from condense.synthetic import SyntheticSet
from condense.tasks import Task
from condense.trajectories import GROUP
from condense.units import duration

SCHEMA = "condense.gpu-check/1"
BENCHMARKS: list[StepBenchmark] = [module.BENCHMARK for module in (dm, dc, dsa_steps, dcc, datadam, mtt, sre2l)]
"""Steps timed against their published form; a method adds itself here."""
LONG_STEPS = {"mtt": (4, 1)}
"""Timed steps, and those before that do not count, of methods whose step is a whole training."""
SLICE_SECONDS = 5.0
"""What a slice of the training of stacked experts takes, about."""

SETTINGS: dict[str, dict[str, Any]] = {
    "dm": {"batch_real": 16},
    **{name: {"batch_real": 16, "outer": 2, "inner": 1} for name in ("dc", "dsa", "dcc", "dsac")},
    "datadam": {"batch_real": 16},
    "idc": {"batch_real": 16, "networks": 1, "snapshots": 2, "net_steps": 2, "lr_img": 0.05},
    "idm": {"batch_real": 16, "networks": 1, "snapshots": 2, "net_steps": 2},
    "dance": {"batch_real": 16, "networks": 1, "expert_epochs": 1},
    **{
        name: {"syn_steps": 3, "expert_epochs": 1, "max_start_epoch": 2, "num_experts": 2, "expert_batch": 16}
        for name in ("mtt", "tesla", "ftd")
    },
}
for _name, _settings in (("ast", {"buffer_epochs": 3}), ("datm", {"expand_steps": 3, "gate": 10.0})):
    SETTINGS[_name] = {**SETTINGS["mtt"], **_settings}
SETTINGS |= {
    name: {"labels": "hard", "store": "float32"}
    for name in ("sre2l", "cda", "dwa", "cvdd", "infer", "nrr", "lpld", "lpqld")
}
for _name, _settings in (("dwa", {"ascent_steps": 2}), ("nrr", {"pool": 16}), ("cvdd", {"voters": 1})):
    SETTINGS[_name] |= _settings
"""What makes one step of a method small enough for a CPU; a method without an entry keeps its defaults."""

FORWARD_TOLERANCE = 1e-4
"""Largest relative difference of CPU and CUDA outputs, fp32 without TF32."""
GRADIENT_TOLERANCE = 2e-2
"""The same for gradients, which a ReLU turned by a rounding moves by about the root of the share of such ReLUs."""


class TimeUp(BaseException):
    """The time given is used up; no guard of a single part catches it."""


class Check:
    """One run of the script: what it was given, how much time is left, and the record that grows with every stage."""

    def __init__(self, device: torch.device, minutes: float, out: Path, tiny: bool, data: str | None) -> None:
        self.device, self.out, self.tiny, self.data = device, out, tiny, data
        self.deadline = time.monotonic() + 60 * minutes
        self.stage = ""
        self.parts: dict[str, Any] = {}
        """Results of the running stage's parts so far."""
        self.record: dict[str, Any] = {
            "schema": SCHEMA,
            "command": " ".join([os.path.basename(sys.argv[0]), *sys.argv[1:]]),
            "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "minutes": minutes,
            "tiny": tiny,
            "machine": machine(device),
            "versions": versions(),
            "stages": {},
            "skipped": [],
            "failures": [],
            "finished": False,
        }

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def network(self) -> str:
        """The ConvNet that fits the images of :meth:`task`."""
        return "convnet-d2-w8-in" if self.tiny else "convnet-d3-w128-in"

    def task(self) -> Task:
        """Random images for checks whose truth does not depend on their number."""
        return random_task(3, 12, (3, 8, 8), 4) if self.tiny else random_task(10, 64)

    @functools.cached_property
    def big_task(self) -> Task:
        """Random images as many and as large as CIFAR-10's, for timing."""
        return self.task() if self.tiny else random_task()

    def case(self, task: Task, ipc: int, precision: str = "fp32", **settings: Any) -> Case:
        """A case on ``task`` with :attr:`network`."""
        depth, width = (2, 8) if self.tiny else (3, 128)
        return Case(task, ipc, width, self.device, depth, settings, precision)

    def left(self) -> float:
        """Seconds until the script must have ended."""
        return self.deadline - time.monotonic()

    def skip(self, part: str, why: str) -> None:
        self.record["skipped"].append({"stage": self.stage, "part": part, "why": why})

    def fail(self, part: str, message: str, trace: str = "") -> None:
        self.record["failures"].append({"stage": self.stage, "part": part, "message": message, "trace": trace})

    def each(self, parts: Mapping[str, Callable[[], dict[str, Any]]]) -> dict[str, dict[str, Any]]:
        """Results of the parts of a stage, each by itself: one that fails or has no time left does not stop the others.

        A result whose ``passed`` is False is recorded as a failure. A :class:`CondenseError` (a package is missing, a
        network does not take such images) skips the part.
        """
        results: dict[str, dict[str, Any]] = {}
        self.parts = results
        for name, call in parts.items():
            if self.left() < 1:
                self.skip(name, "no time left")
                continue
            try:
                results[name] = call()
            except CondenseError as fault:
                self.skip(name, str(fault))
                continue
            except Exception as fault:
                self.fail(name, _message(fault), traceback.format_exc(limit=-6))
                if self.cuda:
                    torch.cuda.empty_cache()
                continue
            if not results[name].get("passed", True):
                self.fail(name, f"outside its tolerance: {json.dumps(results[name])}")
        return results

    def save(self) -> None:
        """Writes the record and its table."""
        write(self.out / "gpu_check.json", json.dumps(self.record, indent=1) + "\n")
        write(self.out / "gpu_check.txt", table(self.record) + "\n")


def _message(fault: BaseException) -> str:
    lines = str(fault).strip().splitlines()
    return f"{type(fault).__name__}: {lines[0] if lines else 'no message'}"


def machine(device: torch.device) -> dict[str, Any]:
    """The machine in facts."""
    facts: dict[str, Any] = {
        "device": device_name(device),
        "platform": platform.platform(),
        "cpu_threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        facts |= {"capability": f"{card.major}.{card.minor}", "memory": card.total_memory}
        facts |= {"multiprocessors": card.multi_processor_count}
    return facts


def versions() -> dict[str, Any]:
    """Versions of what the numbers depend on."""
    import numpy

    return {
        "condense": condense.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "numpy": numpy.__version__,
    }


def _worst(results: Mapping[str, dict[str, Any]], key: str) -> str:
    """The largest value of ``key`` and whose it is."""
    found = [(result[key], name) for name, result in results.items() if key in result]
    return "{:.1e} ({})".format(*max(found)) if found else "none"


# -- (a) correctness --------------------------------------------------------------------------------------------------


def check_networks(check: Check) -> tuple[str, Any]:
    """Every named network: outputs, embedding and gradients on the device against the CPU, fp32 without TF32."""
    shape, size, classes = ((3, 8, 8), 4, 3) if check.tiny else ((3, 32, 32), 16, 10)
    images = random_images(size, shape, "gpu-check", "images")

    def outputs(net: networks.Network, device: torch.device) -> list[Tensor]:
        net = net.to(device)
        x = images.to(device, copy=True).requires_grad_()
        embedding = net.embed(x)
        logits = net.classify(embedding)
        gradients = torch.autograd.grad(logits.square().mean(), [x, *net.parameters()], allow_unused=True)
        return [logits, embedding, torch.cat([g.flatten().cpu() for g in gradients if g is not None])]

    def compare(name: str) -> dict[str, Any]:
        with rng.seeded("gpu-check", "network"):
            net = networks.build(name, shape, classes)
        reference, found = outputs(copy.deepcopy(net), torch.device("cpu")), outputs(net, check.device)
        errors = [distance(b, a) for a, b in zip(reference, found)]
        limits = (FORWARD_TOLERANCE, FORWARD_TOLERANCE, GRADIENT_TOLERANCE)
        passed = all(error <= limit for error, limit in zip(errors, limits))  # False for NaN
        return {**dict(zip(("forward", "embed", "gradient"), errors)), "passed": passed}

    with tf32(False):
        results = check.each({name: functools.partial(compare, name) for name in networks.names()})
    worst = f"worst forward {_worst(results, 'forward')}, gradient {_worst(results, 'gradient')}"
    return f"{len(results)} networks; {worst}", results


def _with_steps(check: Check) -> list[str]:
    """The registered methods that make outer steps; the others are noted as skipped."""
    names = []
    for name in METHODS.names():
        if any(field.name == "steps" for field in dataclasses.fields(METHODS.get(name).config)):
            names.append(name)
        else:
            check.skip(name, "makes no steps")
    return names


def _distil(
    check: Check,
    name: str,
    steps: int,
    device: torch.device,
    precision: str = "fp32",
    kill_at: int = -1,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """The images after ``steps`` steps of a method and their change, on the CPU; ``options`` are those of ``Run``.

    Raises:
        Killed: before step ``kill_at``.
    """
    settings = {**SETTINGS.get(name, {}), "steps": steps}
    case = dataclasses.replace(check.case(check.task(), 2, precision), device=device)
    if hasattr(METHODS.get(name).config, "teachers"):  # the same one on every device
        case = dataclasses.replace(case, norm="bn")
        settings |= {"teachers": str(sre2l.teacher_file(case)), "num_teachers": 1}
    config = METHODS.get(name).config(**settings)
    start: list[Tensor] = []

    def between(run: Run, index: int) -> None:
        if not start and run.synthetic is not None:
            start.append(run.synthetic.images.detach().cpu().clone())
        if index == kill_at:
            raise Killed

    made = drive(name, config, case, between, **options)
    images = made.images.detach()
    images = (images if made.space == "training" else case.task.transform.to(images.device)(images)).cpu()
    # Of what is kept in another form than it is learned in there is no change to tell.
    return images, images - start[0] if images.shape == start[0].shape else images


class Killed(Exception):
    """Stands for a kill of the process: the run ends between two steps, what is on disk stays."""


def check_methods(check: Check) -> tuple[str, Any]:
    """One outer step of every method on the device against the CPU: same seed, fp32 without TF32."""

    def compare(name: str) -> dict[str, Any]:
        images, update = _distil(check, name, 1, check.device)
        reference, reference_update = _distil(check, name, 1, torch.device("cpu"))
        errors = {"images": distance(images, reference), "update": distance(update, reference_update)}
        return {**errors, "passed": errors["update"] <= GRADIENT_TOLERANCE}

    with tf32(False):
        results = check.each({name: functools.partial(compare, name) for name in _with_steps(check)})
    return f"{len(results)} methods; worst update {_worst(results, 'update')}", results


def check_labels(check: Check) -> tuple[str, Any]:
    """Every kind of labels: views and targets on the device against the CPU, made on the CPU and made there."""
    task, cpu = check.task(), torch.device("cpu")
    case = dataclasses.replace(check.case(task, 2), norm="bn", device=cpu)
    teacher = sre2l.teacher(case.network, task.shape, task.num_classes).eval()
    made = condense.distill("random", task, 2, network=case.network, device="cpu")
    images = made.training_images()[0]
    ids = torch.arange(len(images))

    def shown(labels: Any, device: torch.device) -> tuple[Tensor, Tensor]:
        there = labels.to(device)
        if not labels.per_view:
            return images, there.targets(ids.to(device)).cpu()
        views, targets = there.shown(images.to(device), ids, 3)
        return views.cpu(), targets.cpu()

    def light(kind: str, device: str) -> Any:
        if kind == "teacher":  # whose architecture a set must name
            net = copy.deepcopy(teacher).to(device)
            return Int8TeacherLabels(net, len(images), 0, names=[case.network], shape=task.shape)
        few: dict[str, Any] = {name: 2 for name in ("label_epochs", "projector_steps") if hasattr(KINDS[kind][0], name)}
        return lighten(made, kind, task, teacher, device=device, **few).labels

    def compare(kind: str) -> dict[str, Any]:
        labels = light(kind, "cpu")
        (views, targets), (there, found) = shown(labels, cpu), shown(labels, check.device)
        errors = {"views": distance(there, views), "targets": distance(found.float(), targets.float())}
        fits = max(errors.values()) <= FORWARD_TOLERANCE
        # Codes of logits that differ by a rounding differ by a step, trained projectors by what training makes of one.
        anew = shown(light(kind, str(check.device)), cpu)[1]
        errors["made there"] = distance(anew.float(), targets.float())
        return {**errors, "passed": fits and errors["made there"] <= GRADIENT_TOLERANCE}

    with tf32(False):
        results = check.each({kind: functools.partial(compare, kind) for kind in KINDS})
    return f"{len(results)} kinds; worst targets {_worst(results, 'targets')}", results


def check_augmentation(check: Check) -> tuple[str, Any]:
    """Every operation and variant with the same parameters on the device and the CPU: images and pixel gradients."""
    shape = check.task().shape
    images = random_images(32, shape, "gpu-check", "views")
    weights = random_images(32, shape, "gpu-check", "weights")

    def outputs(strategy: str, variant: str, device: torch.device) -> list[Tensor]:
        augment = dsa(strategy, variant)
        views = augment.draw(rng.Draws("gpu-check", "views"), len(images), shape[1:])
        x = images.to(device, copy=True).requires_grad_()
        changed = augment.apply(x, views)
        return [changed, *torch.autograd.grad((changed * weights.to(device)).sum(), x)]

    def compare(strategy: str, variant: str) -> dict[str, Any]:
        pairs = zip(outputs(strategy, variant, check.device), outputs(strategy, variant, torch.device("cpu")))
        errors = [distance(a, b) for a, b in pairs]
        passed = all(error <= FORWARD_TOLERANCE for error in errors)  # both are linear maps of their input
        return {**dict(zip(("forward", "gradient"), errors)), "passed": passed}

    parts = {op: functools.partial(compare, op, "dsa") for op in OPERATIONS}
    parts |= {f"all, {variant}": functools.partial(compare, "_".join(OPERATIONS), variant) for variant in VARIANTS}
    results = check.each(parts)
    return f"worst forward {_worst(results, 'forward')}, gradient {_worst(results, 'gradient')}", results


def check_draws(check: Check) -> tuple[str, Any]:
    """Keyed draws, real batches and random weights: the same bits on the device as on the CPU."""
    task, cpu = check.task(), torch.device("cpu")
    ids = torch.arange(0, len(task.train), 3)

    def weights(device: torch.device) -> Tensor:
        net = Run(task, 1, check.network, device=device).random_network(5)
        return torch.cat([parameter.flatten() for parameter in net.parameters()])

    parts: dict[str, Callable[[torch.device], Tensor]] = {
        "bits": lambda device: rng.Draws("gpu-check", device=device).bits(100_003),
        "uniform": lambda device: rng.Draws("gpu-check", device=device).uniform(100_003, -1.5, 2.5),
        "integers": lambda device: rng.Draws("gpu-check", device=device).integers(1_000_003, 100_003),
        "permutation": lambda device: rng.Draws("gpu-check", device=device).permutation(100_003),
        "real batch": lambda device: task.to(device).batch(ids),
        "network weights": weights,
    }

    def compare(make: Callable[[torch.device], Tensor]) -> dict[str, Any]:
        return {"passed": torch.equal(make(check.device).cpu(), make(cpu))}

    results = check.each({name: functools.partial(compare, make) for name, make in parts.items()})
    return f"{sum(result['passed'] for result in results.values())} of {len(parts)} equal to the bit", results


def check_determinism(check: Check) -> tuple[str, Any]:
    """Every method and the training of students, twice from one seed: the same bits with deterministic kernels.

    ``without`` says whether they also repeat when torch may choose its kernels freely; that is no failure.
    """
    precision = pick_precision("auto", check.device)

    def twice(make: Callable[[], Tensor]) -> dict[str, Any]:
        without = torch.equal(make(), make())
        with deterministic_kernels():
            return {"passed": torch.equal(make(), make()), "without": without}

    def distilled(name: str) -> Tensor:
        return _distil(check, name, 3, check.device, precision)[0]

    def trained(together: bool) -> Tensor:
        shape = check.task().shape
        made = students.make(check.network, 2, 4, shape, 3, check.device)
        train(made, students.recipe(3), device=check.device, precision=precision, together=together)
        return torch.cat([p.detach().flatten().cpu() for s in made for p in s.network.parameters()])

    parts: dict[str, Callable[[], Tensor]] = {name: functools.partial(distilled, name) for name in _with_steps(check)}
    parts |= {
        "students one by one": functools.partial(trained, False),
        "students together": functools.partial(trained, True),
    }
    results = check.each({name: functools.partial(twice, make) for name, make in parts.items()})
    freely = sum(result["without"] for result in results.values())
    repeats = sum(result["passed"] for result in results.values())
    return f"{repeats} of {len(results)} repeat bit for bit; {freely} also with free choice of kernels", results


def check_resume(check: Check) -> tuple[str, Any]:
    """Every method, killed after two of four steps and resumed from its checkpoint, against the uninterrupted run."""
    precision = pick_precision("auto", check.device)

    def compare(name: str) -> dict[str, Any]:
        whole, _ = _distil(check, name, 4, check.device, precision)
        with tempfile.TemporaryDirectory() as folder:
            again = functools.partial(_distil, check, name, 4, check.device, precision, directory=Path(folder))
            with contextlib.suppress(Killed):
                again(kill_at=2)
            if not (Path(folder) / run_module.CHECKPOINT).exists():
                return {"passed": False, "why": "no checkpoint was written"}
            resumed, _ = again(resume=True)
        return {"passed": torch.equal(resumed, whole)}

    seconds = run_module.CHECKPOINT_SECONDS
    run_module.CHECKPOINT_SECONDS = 0.0  # a checkpoint after every step
    try:
        with deterministic_kernels():
            results = check.each({name: functools.partial(compare, name) for name in _with_steps(check)})
    finally:
        run_module.CHECKPOINT_SECONDS = seconds
    return f"{sum(result['passed'] for result in results.values())} of {len(results)} end with the same bits", results


# -- (b), (c): speed --------------------------------------------------------------------------------------------------


def time_benchmarks(check: Check, ipc: int) -> tuple[str, Any]:
    """Published and product steps in turn, what each allocates on the device, and how far their updates differ."""
    precision = pick_precision("auto", check.device)

    def measure(benchmark: StepBenchmark) -> dict[str, Any]:
        settings = SETTINGS.get(benchmark.method, {}) if check.tiny else {}
        count, warm_up = (2, 1) if check.tiny else (3, 1)
        if check.cuda and not check.tiny:
            count, warm_up = LONG_STEPS.get(benchmark.method, (20, 5))
        case = dataclasses.replace(check.case(check.big_task, ipc, precision, **settings), norm=benchmark.norm)
        found = time_steps(benchmark, case, count, warm_up).summary(PUBLISHED, PRODUCT)
        memory = {}
        if check.cuda:  # a CPU knows peaks of whole processes only; the scripts in speed/ start one for each
            memory = {kind: run_alone(benchmark, case, kind, 3)["device"] for kind in (PUBLISHED, PRODUCT)}
        differences = {kind: difference(benchmark, case, kind) for kind in dict.fromkeys(("fp32", precision))}
        passed = differences["fp32"]["all"] <= GRADIENT_TOLERANCE
        found |= {"precision": precision, "tf32": torch.backends.cudnn.allow_tf32, "device_peak_memory": memory}
        return {**found, "update_difference": differences, "passed": passed}

    results = check.each({b.method: functools.partial(measure, b) for b in BENCHMARKS})
    words = []
    for name, result in results.items():
        median, peak = result["median_seconds"], result["device_peak_memory"]
        words.append(
            f"{name}: published {1e3 * median[PUBLISHED]:.1f} ms, {PRODUCT} {1e3 * median[PRODUCT]:.1f} ms, "
            f"ratio {result['ratio']:.2f}"
            + (f"; {gibibytes(peak[PUBLISHED])} and {gibibytes(peak[PRODUCT])}" if peak else "")
        )
    return "; ".join(words), results


def time_students(check: Check) -> tuple[str, Any]:
    """Five students trained one by one and together, as an evaluation of ten images a class trains them."""
    shape = check.task().shape
    steps, pairs = (2, 1) if check.tiny else (50, 3)
    precision = pick_precision("auto", check.device)
    found = students.compare(check.network, 5, 10, shape, 10, check.device, precision, steps, pairs)
    per_step = {name: 1e3 * seconds / steps for name, seconds in found["median_seconds"].items()}
    words = ", ".join(f"{name} {milliseconds:.1f} ms" for name, milliseconds in per_step.items())
    return f"a step of 5: {words}, ratio {found['ratio']:.2f}", found


def time_experts(check: Check) -> tuple[str, Any]:
    """Experts trained as many together as the product trains them, for some seconds, against the published loop.

    The time of 100 experts of 50 epochs is extrapolated from both.
    """
    count, precision = (2 if check.tiny else GROUP if check.cuda else 1), pick_precision("auto", check.device)

    def measure(method: str) -> dict[str, Any]:
        case = check.case(check.big_task, 1, precision, **(SETTINGS[method] if check.tiny else {}))
        steps, pairs = (2, 1) if check.tiny else (10, 2)
        if not check.tiny:
            probed = experts.compare(case, method, count, steps, 1)["slice_seconds"][PRODUCT] / steps
            steps = max(steps, math.ceil(SLICE_SECONDS / probed))
        found = experts.compare(case, method, count, steps, pairs)
        memory = {}
        if check.cuda:
            for side in (PUBLISHED, PRODUCT):
                memory[side] = experts.measure_alone(case, side, method, count, 3)["device"]
        return {**found, "tf32": torch.backends.cudnn.allow_tf32, "device_peak_memory": memory}

    results = check.each({method: functools.partial(measure, method) for method in ("mtt", "ftd")})
    words = []
    for method, result in results.items():
        pace, whole = result["experts_epochs_per_minute"][PRODUCT], result[experts.WHOLE][PRODUCT]
        words.append(
            f"{method}: {pace:.3g} experts x epochs a minute, {experts.MANY} of {experts.EPOCHS} epochs in "
            f"{duration(whole)}, {count} together; published / {PRODUCT} {result['ratio']:.2f}"
        )
    return "; ".join(words), results


# -- (d) variants of a step -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """Another way to compute the product's DM step."""

    precision: str
    tf32: bool = True
    change: Change = lambda net: None
    cuda_only: bool = False


def compiled(net: networks.Network) -> None:
    """Makes ``net.embed`` go through ``torch.compile`` (on a CPU without code generation: only the path is tried)."""
    backend = "inductor" if next(net.parameters()).is_cuda else "eager"
    vars(net)["embed"] = torch.compile(net.embed, dynamic=False, backend=backend)


class Replayed:
    """``net.embed`` replayed as a CUDA graph wherever no gradient is wanted: one graph for each shape of input.

    The graph reads the network's parameters in place, so new weights copied into them are seen.
    """

    def __init__(self, net: networks.Network) -> None:
        self.plain: Callable[..., Tensor] = net.embed
        self.graphs: dict[torch.Size, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}

    def __call__(self, x: Tensor, maps: list[Tensor] | None = None) -> Tensor:
        if torch.is_grad_enabled() or maps is not None:
            return self.plain(x, maps)
        if x.shape not in self.graphs:
            self.graphs[x.shape] = self.capture(x)
        graph, given, result = self.graphs[x.shape]
        given.copy_(x)
        graph.replay()
        return result.clone()  # the next replay overwrites it

    def capture(self, x: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        given = x.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        # Cached casts would be made once, outside the graph, and go stale with the next weights.
        kind = torch.get_autocast_dtype("cuda")
        with torch.autocast("cuda", kind, torch.is_autocast_enabled("cuda"), cache_enabled=False):
            with torch.cuda.stream(stream):  # as torch asks: a few passes on a side stream before the capture
                for _ in range(3):
                    self.plain(given)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = self.plain(given)
        return graph, given, result


def replayed(net: networks.Network) -> None:
    """Makes ``net.embed`` a :class:`Replayed`."""
    vars(net)["embed"] = Replayed(net)


PRECISIONS = {"fp32": Variant("fp32", tf32=False), "tf32": Variant("fp32"), "bf16": Variant("bf16")}
GRAPH = {"bf16, CUDA graph of the real branch": Variant("bf16", change=replayed, cuda_only=True)}
COMPILE = {"bf16, torch.compile": Variant("bf16", change=compiled)}


def time_variants(check: Check, variants: Mapping[str, Variant]) -> tuple[str, Any]:
    """Seconds a step of each variant and how far its images move from those of the first one after as many steps.

    The variants run one after the other; the step in bf16 comes first and last, which shows how steady the clock is.
    """
    reference = Variant("bf16")
    runs = {"bf16, first": reference, **variants, "bf16, again": reference}
    steps, warm_up = (1, 1) if check.tiny else (20, 5) if check.cuda else (3, 1)
    settings = SETTINGS["dm"] if check.tiny else {}
    updates: dict[str, Tensor] = {}

    def measure(name: str, variant: Variant) -> dict[str, Any]:
        if variant.cuda_only and not check.cuda:
            raise CondenseError("needs CUDA")
        case = check.case(check.big_task, 10, variant.precision, **settings)
        config = dm.BENCHMARK.config(case, steps=steps + warm_up)
        start = case.start(config)
        marks: list[float] = []

        def between(run: Run, index: int) -> None:
            synchronise(check.device)
            marks.append(time.perf_counter())

        with tf32(variant.tf32):
            made = drive("dm", config, case, between, variant.change)
        updates[name] = made.images.detach() - start
        seconds = [after - before for before, after in itertools.pairwise(marks)]
        return {
            "first_step_seconds": seconds[0],
            "seconds": seconds[warm_up:],
            "median_seconds": statistics.median(seconds[warm_up:]),
            "update_difference": distance(updates[name], next(iter(updates.values()))),
        }

    results = check.each({name: functools.partial(measure, name, variant) for name, variant in runs.items()})
    words = [f"{name} {1e3 * result['median_seconds']:.1f} ms" for name, result in results.items()]
    return "; ".join(words), results


# -- (e) real data ----------------------------------------------------------------------------------------------------


def distil_data(check: Check) -> tuple[str, Any]:
    """DM on the data given, for about half of the time left, then five students on the set and five on random images.

    Steps of both are cut to the time; the record says how many there were. The students' recipe is otherwise dc-v1's.
    """
    if check.data is None:
        raise CondenseError("no --data given")
    task = tasks.load(check.data)
    budget = check.left() - (0 if check.tiny else 10)
    ipc, count = (2, 2) if check.tiny else (10, 5)
    depth = 2 if check.tiny else min(6, max(3, (min(task.shape[1:]) - 1).bit_length() - 2))
    network = f"convnet-d{depth}-w{8 if check.tiny else 128}-in"
    precision = pick_precision("auto", check.device)
    case = check.case(task, ipc, precision, **(SETTINGS["dm"] if check.tiny else {}))

    def distilled(steps: int) -> tuple[SyntheticSet, float]:
        """The set after ``steps`` steps, and the median of their seconds."""
        marks: list[float] = []

        def between(run: Run, index: int) -> None:
            if steps < 20:  # a long run is not held up for the sake of a clock
                synchronise(check.device)
            marks.append(time.perf_counter())

        made = drive("dm", dm.BENCHMARK.config(case, steps=steps), case, between, network=network)
        return made, statistics.median(after - before for before, after in itertools.pairwise(marks))

    probe = 2 if check.tiny else 10
    steps = 3 if check.tiny else max(probe, min(20000, int(0.5 * budget / distilled(probe)[1])))
    began = time.perf_counter()
    made, _ = distilled(steps)
    synchronise(check.device)
    seconds = time.perf_counter() - began

    served = task.to(check.device)
    random = [served.per_class(ipc, ("gpu-check", "random", k)) for k in range(count)]
    arms = {"distilled": [(made.images.detach(), made.classes)] * count, "random": random}

    def trained(arm: str, steps: int) -> list[networks.Network]:
        pupils = []
        for k, (images, labels) in enumerate(arms[arm]):
            with rng.seeded("gpu-check", "student", k):
                net = networks.build(network, task.shape, task.num_classes)
            source = FixedSource(images, HardLabels(labels, task.num_classes))
            pupils.append(Student(net, source, rng.key("gpu-check", "run", k)))
        train(pupils, students.recipe(steps, task.mirror), device=check.device, precision=precision)
        synchronise(check.device)
        return [pupil.network for pupil in pupils]

    def accuracies(nets: list[networks.Network]) -> list[float]:
        return [accuracy(net, served, device=check.device, precision=precision) for net in nets]

    accuracies(trained("random", 2))  # what only the first call costs
    began = time.perf_counter()
    nets = trained("random", probe)
    per_step = (time.perf_counter() - began) / probe
    began = time.perf_counter()
    accuracies(nets)
    testing = time.perf_counter() - began
    wanted = 1000 * math.ceil(len(made.images) / 256)
    fitting = int((0.4 * check.left() - testing) / per_step)
    student_steps = 2 if check.tiny else max(probe, min(wanted, fitting))
    results: dict[str, Any] = {arm: {"accuracies": accuracies(trained(arm, student_steps))} for arm in arms}
    for result in results.values():
        result["mean"] = statistics.fmean(result["accuracies"])
        result["std"] = statistics.stdev(result["accuracies"])
    results |= {"data": task.name, "ipc": ipc, "network": network, "precision": precision, "steps": steps}
    results |= {"distil_seconds": seconds, "student_steps": student_steps, "peak_memory": peak_memory(check.device)}
    shown = ", ".join(f"{arm} {100 * results[arm]['mean']:.1f} ± {100 * results[arm]['std']:.1f} %" for arm in arms)
    return f"{task.name}, ipc {ipc}, {steps} steps in {seconds:.0f} s, {student_steps} student steps: {shown}", results


# -- the script -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """A part of the script."""

    name: str
    seconds: float
    """About what it takes; it is not begun with less than that left."""
    body: Callable[[Check], tuple[str, Any]]
    """Gives one line for the table and what is recorded."""


STAGES = [
    Stage("networks: device = CPU", 20, check_networks),
    Stage("methods: device = CPU", 15, check_methods),
    Stage("labels: device = CPU", 30, check_labels),
    Stage("augmentation: device = CPU", 5, check_augmentation),
    Stage("draws: device = CPU", 5, check_draws),
    Stage("same seed, same bits", 15, check_determinism),
    Stage("killed and resumed", 10, check_resume),
    Stage("step at ipc 10", 30, functools.partial(time_benchmarks, ipc=10)),
    Stage("step at ipc 1", 25, functools.partial(time_benchmarks, ipc=1)),
    Stage("step at ipc 50", 40, functools.partial(time_benchmarks, ipc=50)),
    Stage("students", 20, time_students),
    Stage("experts", 60, time_experts),
    Stage("variants: precision", 15, functools.partial(time_variants, variants=PRECISIONS)),
    Stage("variants: CUDA graph", 15, functools.partial(time_variants, variants=GRAPH)),
    Stage("variants: torch.compile", 60, functools.partial(time_variants, variants=COMPILE)),
    Stage("data", 60, distil_data),
]


def run_stage(check: Check, stage: Stage) -> None:
    """Runs one stage, or notes why not, and saves the record."""
    check.stage, check.parts = stage.name, {}
    entry: dict[str, Any] = {"status": "running", "seconds": 0.0, "summary": ""}
    check.record["stages"][stage.name] = entry
    check.save()  # so that a kill shows what was running
    failures, began = len(check.record["failures"]), time.monotonic()
    try:
        if not check.tiny and check.left() < stage.seconds:
            raise CondenseError(f"needs about {stage.seconds:.0f} s and {max(check.left(), 0):.0f} s are left")
        with _until(check.left()):
            entry["summary"], entry["results"] = stage.body(check)
        entry["status"] = "passed" if len(check.record["failures"]) == failures else "failed"
    except CondenseError as fault:
        check.skip("", str(fault))
        entry |= {"status": "skipped", "summary": str(fault)}
    except TimeUp:
        check.skip("", "stopped: the time is up")
        entry |= {"status": "stopped", "summary": "the time was up", "results": check.parts}
    except Exception as fault:
        check.fail("", _message(fault), traceback.format_exc(limit=-6))
        entry |= {"status": "failed", "summary": _message(fault), "results": check.parts}
    entry["seconds"] = round(time.monotonic() - began, 2)
    check.save()
    print(f"{entry['status']:<8} {entry['seconds']:7.1f} s  {stage.name}: {entry['summary']}", flush=True)


@contextlib.contextmanager
def _until(seconds: float) -> Iterator[None]:
    """Raises :class:`TimeUp` inside its body after so many seconds, where the system can (the main thread, Unix)."""

    def stop(number: int, frame: Any) -> None:
        raise TimeUp

    try:
        before = signal.signal(signal.SIGALRM, stop)
    except (AttributeError, ValueError):
        yield
        return
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def table(record: Mapping[str, Any]) -> str:
    """The record as one table, with what failed and what was skipped below it."""
    versions = record["versions"]
    rows = [["stage", "status", "seconds", "result"]]
    for name, entry in record["stages"].items():
        rows.append([name, entry["status"], f"{entry['seconds']:.1f}", entry["summary"]])
    lines = [
        f"{record['machine']['device']}; torch {versions['torch']}, CUDA {versions['cuda']}, "
        f"condense {versions['condense']}; {record['began']}"
        + ("; tiny: no time here means anything" * record["tiny"]),
        aligned(rows),
    ]
    for fault in record["failures"]:
        lines.append(f"failed: {fault['stage']}, {fault['part']}: {fault['message']}")
    for skipped in record["skipped"]:
        if skipped["part"]:
            lines.append(f"skipped: {skipped['stage']}, {skipped['part']}: {skipped['why']}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs the script and exits with the documented code."""
    guarded(_main, arguments)


def _main(words: Sequence[str]) -> int:
    parser = Parser(prog="python -m condense.benchmarks.gpu_check", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="the script ends within so many minutes")
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu_check.json and gpu_check.txt")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--data", help="real images (folder, .npz, ...) to distil in what time is left")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to try the script itself")
    options = parser.parse_args(words)
    if not 0 < options.minutes <= 24 * 60:
        raise CondenseError(f"--minutes {options.minutes}: must be above 0 and at most a day")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise CondenseError(
            f"--device {options.device}: there is no CUDA device here; --device cpu --tiny tries the script without one"
        )
    device = pick_device(options.device)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats its results only with this
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise CondenseError(f"--out {options.out}: cannot be made ({fault.strerror})") from fault
    check = Check(device, options.minutes, options.out, options.tiny, options.data)
    for stage in STAGES:
        run_stage(check, stage)
    check.record["finished"] = True
    check.record["peak_memory"] = peak_memory(device)
    check.save()
    print(f"\n{table(check.record)}")
    return 1 if check.record["failures"] else 0


if __name__ == "__main__":
    main()
