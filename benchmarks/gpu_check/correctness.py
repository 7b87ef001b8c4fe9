"""The device against the CPU, equal bits from equal seeds, and killed runs against uninterrupted ones."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import condense
from condense import networks, rng
from condense.augment import OPERATIONS, VARIANTS, make_augmentation
from condense.benchmarks.gpu_check.check import Check
from condense.benchmarks.speed import sre2l, students
from condense.benchmarks.speed.measure import distance, drive, random_images, tf32
from condense.config import tiny_settings
from condense.device import deterministic_kernels, pick_precision
from condense.engine import Run, checkpoint
from condense.labels import Int8TeacherLabels
from condense.lighten import LIGHTEN_KINDS, lighten
from condense.registry import METHODS
from condense.training import train

UNLABELLED = {"labels": "hard", "store": "float32"}
"""Settings of methods with teachers that leave out the labelling and keep the images as they were learned."""

FORWARD_TOLERANCE = 1e-4
"""Largest relative difference of CPU and CUDA outputs, fp32 without TF32."""

GRADIENT_TOLERANCE = 2e-2
"""The same for gradients, which a ReLU turned by a rounding moves by about the root of the share of such ReLUs."""


def _worst(results: Mapping[str, dict[str, Any]], key: str) -> str:
    """The largest value of ``key`` and whose it is."""
    errors = [(result[key], name) for name, result in results.items() if key in result]
    return "{:.1e} ({})".format(*max(errors)) if errors else "none"


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
            net = networks.build_network(name, shape, classes)
        for module in net.modules():
            if isinstance(module, nn.Dropout):
                module.eval()  # devices draw different masks
        reference, result = outputs(copy.deepcopy(net), torch.device("cpu")), outputs(net, check.device)
        errors = [distance(b, a) for a, b in zip(reference, result)]
        limits = (FORWARD_TOLERANCE, FORWARD_TOLERANCE, GRADIENT_TOLERANCE)
        passed = all(error <= limit for error, limit in zip(errors, limits))  # False for NaN
        return {**dict(zip(("forward", "embed", "gradient"), errors)), "passed": passed}

    with tf32(False):
        results = check.each({name: functools.partial(compare, name) for name in networks.network_names()})
    worst = f"worst forward {_worst(results, 'forward')}, gradient {_worst(results, 'gradient')}"
    return f"{len(results)} networks; {worst}", results


def methods_with_steps(check: Check) -> list[str]:
    """The registered methods that make outer steps; the others are noted as skipped."""
    names = []
    for name in METHODS.names():
        if any(field.name == "steps" for field in dataclasses.fields(METHODS.get(name).config)):
            names.append(name)
        else:
            check.skip(name, "makes no steps")
    return names


def distil_images(
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
    entry = METHODS.get(name)
    settings = {**tiny_settings(name), "steps": steps}
    case = dataclasses.replace(check.case(check.task(), 2, precision), device=device)
    if entry.pretrains == "teachers":  # the same one on every device
        case = dataclasses.replace(case, norm="bn")
        fixed = {**UNLABELLED, "teachers": str(sre2l.teacher_file(case)), "num_teachers": 1, "voters": 1}
        settings |= {key: value for key, value in fixed.items() if hasattr(entry.config, key)}
    if entry.pretrains == "experts":  # two images may be equally near to a centroid of logits: rounding would choose
        settings |= {"init": "real"}
    config = entry.config(**settings)
    start: list[Tensor] = []

    def between(run: Run, index: int) -> None:
        if not start and run.synthetic is not None:
            start.append(run.synthetic.images.detach().cpu().clone())
        if index == kill_at:
            raise Killed

    synthetic = drive(name, config, case, between, **options)
    images = synthetic.images.detach()
    images = (images if synthetic.space == "training" else case.task.transform.to(images.device)(images)).cpu()
    # Of what is kept in another form than it is learned in there is no change to tell.
    return images, images - start[0] if images.shape == start[0].shape else images


class Killed(Exception):
    """Stands for a kill of the process: the run ends between two steps, what is on disk stays."""


def check_methods(check: Check) -> tuple[str, Any]:
    """One outer step of every method on the device against the CPU: same seed, fp32 without TF32."""

    def compare(name: str) -> dict[str, Any]:
        images, update = distil_images(check, name, 1, check.device)
        reference, reference_update = distil_images(check, name, 1, torch.device("cpu"))
        errors = {"images": distance(images, reference), "update": distance(update, reference_update)}
        return {**errors, "passed": errors["update"] <= GRADIENT_TOLERANCE}

    with tf32(False):
        results = check.each({name: functools.partial(compare, name) for name in methods_with_steps(check)})
    return f"{len(results)} methods; worst update {_worst(results, 'update')}", results


def check_labels(check: Check) -> tuple[str, Any]:
    """Every kind of labels: views and targets on the device against the CPU, made on the CPU and made there."""
    task, cpu = check.task(), torch.device("cpu")
    case = dataclasses.replace(check.case(task, 2), norm="bn", device=cpu)
    teacher = sre2l.teacher(case.network, task.shape, task.num_classes).eval()
    distilled = condense.distill("random", task, 2, network=case.network, device="cpu")
    images = distilled.training_images()[0]
    ids = torch.arange(len(images))

    def first_batch(labels: Any, device: torch.device) -> tuple[Tensor, Tensor]:
        there = labels.to(device)
        if not labels.per_view:
            return images, there.targets(ids.to(device)).cpu()
        views, targets = there.training_batch(images.to(device), ids, 3)
        return views.cpu(), targets.cpu()

    def make_labels(kind: str, device: str) -> Any:
        if kind == "teacher":  # whose architecture a set must name
            net = copy.deepcopy(teacher).to(device)
            return Int8TeacherLabels(net, len(images), 0, names=[case.network], shape=task.shape)
        few: dict[str, Any] = {
            name: 2 for name in ("label_epochs", "projector_steps") if hasattr(LIGHTEN_KINDS[kind][0], name)
        }
        return lighten(distilled, kind, task, teacher, device=device, **few).labels

    def compare(kind: str) -> dict[str, Any]:
        labels = make_labels(kind, "cpu")
        (views, targets), (there, logits) = first_batch(labels, cpu), first_batch(labels, check.device)
        errors = {"views": distance(there, views), "targets": distance(logits.float(), targets.float())}
        fits = max(errors.values()) <= FORWARD_TOLERANCE
        # Codes of logits that differ by a rounding differ by a step, trained projectors by what training makes of one.
        made_there = first_batch(make_labels(kind, str(check.device)), cpu)[1]
        errors["made there"] = distance(made_there.float(), targets.float())
        return {**errors, "passed": fits and errors["made there"] <= GRADIENT_TOLERANCE}

    with tf32(False):
        results = check.each({kind: functools.partial(compare, kind) for kind in LIGHTEN_KINDS})
    return f"{len(results)} kinds; worst targets {_worst(results, 'targets')}", results


def check_augmentation(check: Check) -> tuple[str, Any]:
    """Every operation and variant with the same parameters on the device and the CPU: images and pixel gradients."""
    shape = check.task().shape
    images = random_images(32, shape, "gpu-check", "views")
    weights = random_images(32, shape, "gpu-check", "weights")

    def outputs(strategy: str, variant: str, device: torch.device) -> list[Tensor]:
        augment = make_augmentation(strategy, variant)
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
        return distil_images(check, name, 3, check.device, precision)[0]

    def trained(together: bool) -> Tensor:
        shape = check.task().shape
        group = students.make(check.network, 2, 4, shape, 3, check.device)
        train(group, students.recipe(3), device=check.device, precision=precision, together=together)
        return torch.cat([p.detach().flatten().cpu() for s in group for p in s.network.parameters()])

    parts: dict[str, Callable[[], Tensor]] = {
        name: functools.partial(distilled, name) for name in methods_with_steps(check)
    }
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
        whole, _ = distil_images(check, name, 4, check.device, precision)
        with tempfile.TemporaryDirectory() as folder:
            distil_again = functools.partial(
                distil_images, check, name, 4, check.device, precision, directory=Path(folder)
            )
            with contextlib.suppress(Killed):
                distil_again(kill_at=2)
            if not (Path(folder) / checkpoint.CHECKPOINT_FILE).exists():
                return {"passed": False, "why": "no checkpoint was written"}
            resumed, _ = distil_again(resume=True)
        return {"passed": torch.equal(resumed, whole)}

    before = os.environ.get("CONDENSE_CHECKPOINT_SECONDS")
    os.environ["CONDENSE_CHECKPOINT_SECONDS"] = "0"  # a checkpoint after every step
    try:
        with deterministic_kernels():
            results = check.each({name: functools.partial(compare, name) for name in methods_with_steps(check)})
    finally:
        if before is None:
            del os.environ["CONDENSE_CHECKPOINT_SECONDS"]
        else:
            os.environ["CONDENSE_CHECKPOINT_SECONDS"] = before
    return f"{sum(result['passed'] for result in results.values())} of {len(results)} end with the same bits", results
