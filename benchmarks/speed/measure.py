"""Timing the product's own steps against published ones: pairs in one run, peak memory, and whether they agree.

A method is added by a file as small as ``dm.py``: its published step in ``published.py`` and a :class:`StepBenchmark`.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import dataclasses
import functools
import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeAlias
from typing import Protocol as Interface

import numpy as np
import torch
from torch import Tensor, nn

import condense
from condense import networks, rng
from condense.data import Split, Standardise, Task
from condense.data import task as task_module
from condense.device import autocast, peak_memory, pick_device, second_derivatives
from condense.engine import ParamGroup, Run, Step
from condense.environment import keep_freed_memory
from condense.errors import CondenseError
from condense.formatting import aligned
from condense.judge import environment
from condense.networks import ComputeConfig, FlopCounter, Network, calibrate, processor_name
from condense.registry import METHODS
from condense.sets import SyntheticOptions, SyntheticSet

SCHEMA = "condense.speed/1"
PRODUCT, PUBLISHED = "condense", "published"
TINY_DATA = (3, 4, (3, 8, 8), 1)
"""Classes, images of each, their shape and test images, to try a script."""
TUNED, PLAIN = ALLOCATORS = ("tuned", "plain")
"""With or without :func:`condense.keep_freed_memory`, which the command line calls."""
QUIET = 0.05
"""Largest share of the processors that others may use while steps are timed, without a warning."""


@dataclass(frozen=True)
class Case:
    """What a step is measured on."""

    task: Task
    """The real data, served from the CPU."""
    ipc: int
    width: int
    """Channels of the ConvNet."""
    device: torch.device
    depth: int = 3
    """Blocks of the ConvNet."""
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Hyper-parameters of the method that are not its defaults."""
    precision: str = "fp32"
    """Of the product's matrix work; the published step is always fp32."""
    seed: int = 0
    norm: str = "in"
    """Of the ConvNet."""
    compute: ComputeConfig | None = None
    """How the product computes networks; None: in ``precision``, with the default formats."""

    @property
    def network(self) -> str:
        return f"convnet-d{self.depth}-w{self.width}-{self.norm}"

    def start(self, options: SyntheticOptions) -> Tensor:
        """The images that the product begins with, on the device."""
        synthetic = SyntheticSet.create(self.task, self.ipc, options, seed=self.seed, device=self.device)
        return synthetic.images.detach()


class PublishedLoop(Interface):
    """A published loop that makes one outer step at a time."""

    images: Tensor

    def step(self, draws: Any = None) -> None: ...


@dataclass(frozen=True)
class StepBenchmark:
    """A method's published step beside the product's."""

    method: str
    """Name in the registry, and of the file in this folder."""
    published: Callable[[Case, Any], PublishedLoop]
    """The published loop on a case, for a configuration of the method."""
    draws: Callable[[Case, Any, Run, int], Any]
    """``draws(case, config, run, index)``: the draws of the run's step ``index``, for the published step to repeat."""
    batch_real: int | None = 256
    """Published real images per class and step; None for a step that sees none."""
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What a comparison needs to differ from the method's defaults."""
    norm: str = "in"
    """Of the ConvNet that the method needs."""
    width: int = 128
    """Channels that its script takes by default."""
    pairs: int = 5
    """Pairs of steps that its script times by default."""
    tiny: bool = False
    """Whether its script offers `--tiny`; then a tiny step also goes before memory is measured."""

    def config(self, case: Case, **changes: Any) -> Any:
        """The method's configuration on ``case``."""
        return METHODS.get(self.method).config(**{**self.settings, **case.settings, **changes})


Between: TypeAlias = Callable[[Run, int], None]
Change: TypeAlias = Callable[[Any], None]


class WatchedRun(Run):
    """A run that calls ``between(run, index)`` before each outer step and, with the number of steps, after the last.

    From one call's return to the next one's beginning lies a whole step of the product's own loop: draws, network,
    losses, update, checks, log. ``change`` may alter the run's network in place when it is first made.
    """

    def __init__(self, *arguments: Any, between: Between, change: Change, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.between, self.change = between, change
        self._changed: torch.nn.Module | None = None

    def optimise(
        self, synthetic: SyntheticSet, steps: int, *, sharded: bool = False, **groups: ParamGroup
    ) -> Iterator[Step]:
        for step in super().optimise(synthetic, steps, sharded=sharded, **groups):
            self.between(self, step.index)
            yield step
        self.between(self, self.steps_done)

    def random_network(self, index: int) -> Network:
        net = super().random_network(index)
        if self._changed is not net:  # the same module every time, so this happens once
            self.change(net)
            self._changed = net
        return net


def drive(
    method: str,
    config: Any,
    case: Case,
    between: Between = lambda run, index: None,
    change: Change = lambda net: None,
    network: str | None = None,
    **options: Any,
) -> SyntheticSet:
    """Runs the product's own loop of ``method`` through a :class:`WatchedRun`; ``options`` are those of ``Run``."""
    compute = case.compute or ComputeConfig(case.precision)
    run = WatchedRun(
        case.task,
        case.ipc,
        network or case.network,
        seed=case.seed,
        device=case.device,
        compute=compute,
        quiet=True,
        track="none",
        between=between,
        change=change,
        **options,
    )
    entry = METHODS.get(method)
    with second_derivatives(entry.order == 2), networks.memory_format(compute.format):
        return entry.function(case.task, config, run)


def random_task(
    classes: int = 10, per_class: int = 5000, shape: tuple[int, int, int] = (3, 32, 32), test_per_class: int = 10
) -> Task:
    """Random uint8 images; by default as many and as large as those of CIFAR-10's train split.

    Made without the loader, whose checks need memory that would hide in the baseline of a peak.
    """
    random = np.random.default_rng(0)
    splits = [
        Split(random.integers(0, 256, (count * classes, *shape), dtype=np.uint8), np.repeat(np.arange(classes), count))
        for count in (per_class, test_per_class)
    ]
    spread = torch.full((shape[0],), 0.25)
    names = tuple(f"class{c}" for c in range(classes))
    transform = Standardise(2 * spread, spread)
    return Task("random", names, *splits, mirror=True, fingerprint="random", transform=transform)


class Others:
    """How much of the machine's processors other processes use from here on, by /proc/stat."""

    def __init__(self) -> None:
        self.busy, self.own, self.wall = self._busy(), time.process_time(), time.perf_counter()

    @staticmethod
    def _busy() -> float | None:
        """Seconds that all processors have worked, those that the host took away included."""
        try:
            fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
        except OSError:
            return None
        user, nice, system, _idle, _waiting, *interrupts = map(int, fields[:8])
        return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")

    def share(self) -> float | None:
        """Fraction of all processor time since the start; None where the system does not tell.

        Two threads that compete for a processor slow a step with many short parallel parts far more than one with few
        long ones, so a ratio taken while others work says little.
        """
        busy = self._busy()
        if busy is None or self.busy is None:
            return None
        theirs = busy - self.busy - (time.process_time() - self.own)
        return max(0.0, theirs) / ((os.cpu_count() or 1) * (time.perf_counter() - self.wall))


def synchronise(device: torch.device) -> None:
    """Waits for the device, so that the time measured afterwards includes its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether fp32 products may be rounded to TF32 on CUDA; torch's own setting comes back after."""
    backends: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = allowed
    try:
        yield
    finally:
        for backend, value in zip(backends, before):
            backend.allow_tf32 = value


# -- what is measured -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pairs:
    """Seconds of A and B, measured in turn: A, B, A, B, ..."""

    a: list[float]
    b: list[float]

    @property
    def ratios(self) -> list[float]:
        """How many times longer A took than the B right after it."""
        return [a / b for a, b in zip(self.a, self.b)]

    @property
    def ratio(self) -> float:
        """Median of :attr:`ratios`."""
        return statistics.median(self.ratios)

    def summary(self, name_a: str, name_b: str) -> dict[str, Any]:
        """JSON-ready: all seconds, their medians, and the ratios."""
        return {
            "seconds": {name_a: self.a, name_b: self.b},
            "median_seconds": {name_a: statistics.median(self.a), name_b: statistics.median(self.b)},
            "ratios": self.ratios,
            "ratio": self.ratio,
        }


def alternate(a: Callable[[], object], b: Callable[[], object], count: int, device: torch.device) -> Pairs:
    """Seconds of ``count`` calls of each, in turn."""
    pairs = Pairs([], [])
    for _ in range(count):
        for call, seconds in ((a, pairs.a), (b, pairs.b)):
            synchronise(device)
            began = time.perf_counter()
            call()
            synchronise(device)
            seconds.append(time.perf_counter() - began)
    return pairs


def time_steps(benchmark: StepBenchmark, case: Case, steps: int, warm_up: int = 1) -> Pairs:
    """Seconds of published (A) and product (B) steps in turn; ``warm_up`` further steps of each are made first."""
    published = benchmark.published(case, benchmark.config(case))
    pairs = Pairs([], [])
    began = 0.0

    def between(run: Run, index: int) -> None:
        nonlocal began
        synchronise(case.device)
        if index > 0:
            pairs.b.append(time.perf_counter() - began)
        if index < steps + warm_up:
            began = time.perf_counter()
            published.step()
            synchronise(case.device)
            pairs.a.append(time.perf_counter() - began)
        began = time.perf_counter()

    drive(benchmark.method, benchmark.config(case, steps=steps + warm_up), case, between)
    return Pairs(pairs.a[warm_up:], pairs.b[warm_up:])


def difference(benchmark: StepBenchmark, case: Case, precision: str) -> dict[str, float]:
    """After one step with the same draws: ||product's update - published update|| / ||published update|| of the pixels.

    ``all`` is over all images together, ``median_image`` the median over images taken one by one. In fp32 the two
    tell different things: sums added in another order turn a few ReLUs whose input is next to 0, and each moves the
    gradient of one image by far more than rounding does (so do the two fp32 forms against float64, alike). TF32 is off.
    """
    config = benchmark.config(case, steps=1)
    case = dataclasses.replace(case, precision=precision, compute=None)
    published = benchmark.published(case, config)
    start = published.images.detach().clone()
    with tf32(False):
        run = Run(case.task, case.ipc, case.network, seed=case.seed, device=case.device)
        published.step(benchmark.draws(case, config, run, 0))
        synthetic = drive(benchmark.method, config, case)
    images = synthetic.images if synthetic.space == "training" else run.task.transform(synthetic.images)
    ours, theirs = images - start, published.images - start
    each = [distance(a, b) for a, b in zip(ours, theirs)]
    return {"all": distance(ours, theirs), "median_image": statistics.median(each)}


def differences(benchmark: StepBenchmark, case: Case, kinds: Iterable[str]) -> dict[str, dict[str, Any]]:
    """:func:`difference` in each precision, or why it could not be measured: no times that were taken are lost."""
    found: dict[str, dict[str, Any]] = {}
    for kind in kinds:
        try:
            found[kind] = dict(difference(benchmark, case, kind))
        except Exception as fault:
            found[kind] = {"failed": f"{type(fault).__name__}: {fault}"}
    return found


def distance(value: Tensor, reference: Tensor) -> float:
    """||value - reference|| / ||reference||, in float64 on the CPU; 0 where both are all zero."""
    value, reference = (x.detach().double().cpu() for x in (value, reference))
    gap = float((value - reference).norm())
    return gap / float(reference.norm()) if gap else 0.0


def run_alone(benchmark: StepBenchmark, case: Case, variant: str, steps: int) -> dict[str, int]:
    """Peak bytes of ``steps`` steps of one variant: ``host`` of this process (which should have done nothing else),
    ``baseline`` of it before the first step, and on CUDA ``device``, what the variant allocated there."""
    cuda = case.device.type == "cuda"
    peaks = {"baseline": peak_memory(torch.device("cpu"))["host"]}
    held = 0
    if cuda:
        torch.cuda.init()  # the allocator has no statistics before
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(case.device)
        held = torch.cuda.memory_allocated(case.device)
    if variant == PRODUCT:
        drive(benchmark.method, benchmark.config(case, steps=steps), case)
    else:
        published = benchmark.published(case, benchmark.config(case))
        for _ in range(steps):
            published.step()
    synchronise(case.device)
    peaks["host"] = peak_memory(torch.device("cpu"))["host"]
    if cuda:
        peaks["device"] = torch.cuda.max_memory_allocated(case.device) - held
    return peaks


def count_step_flops(benchmark: StepBenchmark, case: Case) -> int:
    """Floating-point operations of the convolutions and matrix products in one step of the product."""
    counter = FlopCounter()

    def between(run: Run, index: int) -> None:
        if index == 1:  # the first step may prepare something
            counter.__enter__()
        elif index == 2:
            counter.__exit__(None, None, None)

    drive(benchmark.method, benchmark.config(case, steps=2), case, between)
    return counter.flops


def convolution_limit(device: torch.device, precision: str) -> float:
    """Floating-point operations per second of this machine's fastest 3x3 convolution of 128 channels, forward and
    backward, in either memory format."""
    layer = nn.Conv2d(128, 128, 3, padding=1).to(device)
    images, rates = 32, []
    for size, memory_format in itertools.product((16, 32), (torch.contiguous_format, torch.channels_last)):
        x = random_images(images, (128, size, size), "limit").to(device, memory_format=memory_format).requires_grad_()

        def call(x: Tensor = x) -> None:
            with autocast(device, precision):
                y = layer(x)
            torch.autograd.grad(y.sum(), [x, layer.weight])

        flops = 3 * 2 * images * size * size * 128 * 128 * 9
        rates.append(flops / min(alternate(call, call, 3, device).b))
    return max(rates)


@functools.cache
def scratch() -> Path:
    """Where this process keeps experts and teachers; gone with it."""
    folder = tempfile.TemporaryDirectory(prefix="condense-speed-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


# -- the command line of a step benchmark -----------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Reports mistakes as the product does: one line."""

    def error(self, message: str) -> NoReturn:
        raise CondenseError(f"{message}; --help lists the options")


def guarded(body: Callable[[Sequence[str]], int], arguments: Sequence[str] | None) -> NoReturn:
    """Runs a script's ``body`` and exits with its code; with 2 and one line on stderr for a user's mistake."""
    try:
        code = body(sys.argv[1:] if arguments is None else arguments)
    except CondenseError as fault:
        print(f"condense: {fault}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("condense: interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)


def positive(text: str) -> int:
    """An integer above 0, for a parser."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def read_counts(flag: str, text: str) -> list[int]:
    """Integers above 0 that are joined by commas.

    Raises:
        CondenseError: something else.
    """
    if not all(part.isdecimal() and int(part) for part in text.split(",")):
        raise CondenseError(f"{flag} {text}: must be integers above 0, joined by commas")
    return [int(part) for part in text.split(",")]


def write(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    except OSError as fault:
        raise CondenseError(f"{path}: cannot be written ({fault.strerror})") from fault


def gibibytes(size: int | None) -> str:
    return "" if size is None else f"{size / 2**30:.2f} GiB"


def main(benchmark: StepBenchmark, arguments: Sequence[str] | None = None) -> NoReturn:
    """``python -m condense.benchmarks.speed.METHOD``: times a method's step, prints a table and exits."""
    guarded(lambda line: _compare(benchmark, line), arguments)


def add_allocator(parser: Parser) -> None:
    """Adds the option for the allocator of both sides."""
    parser.add_argument("--allocator", choices=ALLOCATORS, default=TUNED, help="as on the command line, or plain")


def _parser(benchmark: StepBenchmark) -> Parser:
    name = benchmark.method
    parser = Parser(
        prog=f"python -m condense.benchmarks.speed.{name}",
        description=f"Times the published step of {name} (a plain transcription) against this toolkit's, in turn.",
    )
    parser.add_argument("--data", help="a name, folder, .npz or .h5; random images shaped like CIFAR-10 when left out")
    parser.add_argument("--ipc", type=positive, default=10)
    parser.add_argument("--width", type=positive, default=benchmark.width, help="channels of the ConvNet")
    parser.add_argument("--depth", type=positive, default=3, help="blocks of the ConvNet")
    if benchmark.batch_real:
        parser.add_argument(
            "--batch-real", type=positive, default=benchmark.batch_real, help="real images of each class in a step"
        )
    parser.add_argument(
        "--steps", type=positive, default=benchmark.pairs, help="pairs of steps that count, after one that does not"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto", help="of the product: auto, fp32 or bf16")
    add_allocator(parser)
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    if benchmark.tiny:
        parser.add_argument(
            "--tiny", action="store_true", help="a few steps on small images, to try the script; sizes are ignored"
        )
    parser.add_argument("--alone", choices=(PRODUCT, PUBLISHED), help=argparse.SUPPRESS)
    return parser


def _compare(benchmark: StepBenchmark, arguments: Sequence[str]) -> int:
    options = _parser(benchmark).parse_args(arguments)
    device = pick_device(options.device)
    if options.allocator == TUNED:
        keep_freed_memory()
    if benchmark.tiny and options.tiny:
        options.ipc, options.width, options.depth, options.steps = 2, 8, 2, 1
    if options.alone:
        if benchmark.tiny:  # or the peak would count what torch loads when it is first used
            run_alone(benchmark, Case(random_task(*TINY_DATA), 1, 8, device, 2, norm=benchmark.norm), options.alone, 1)
        case = _case(benchmark, options, device)
        print(json.dumps(run_alone(benchmark, case, options.alone, options.steps)))
        return 0
    # The children first: later this process would hold memory that they do not need.
    peaks = {variant: run_in_child(benchmark, arguments, variant) for variant in (PUBLISHED, PRODUCT)}
    case = _case(benchmark, options, device)
    record = {
        "schema": SCHEMA,
        "method": benchmark.method,
        "data": describe_data(case.task),
        "ipc": case.ipc,
        "network": case.network,
        **({"batch_real": options.batch_real} if benchmark.batch_real else {}),
        "peak_memory": peaks,
        "allocator": options.allocator,
        **measure_steps(benchmark, case, options.steps),
    }
    print(format_report(record))
    if options.json:
        write(options.json, json.dumps(record, indent=1) + "\n")
    return 0


def measure_steps(benchmark: StepBenchmark, case: Case, steps: int) -> dict[str, Any]:
    """Times pairs of steps; how far they are from the rate of convolutions here; the difference of their updates."""
    limit = convolution_limit(case.device, case.precision)
    others = Others()
    pairs = time_steps(benchmark, case, steps)
    share = others.share()
    flops = count_step_flops(benchmark, case)
    return {
        **pairs.summary(PUBLISHED, PRODUCT),
        "step_flops": flops,
        "convolution_flops_per_second": limit,
        "share_of_convolution_limit": flops / limit / statistics.median(pairs.b),
        "update_difference": differences(benchmark, case, dict.fromkeys(("fp32", case.precision))),
        "others_share": share,
        "compute": case.compute.to_dict() if case.compute else {},
        "processor": processor_name(),
        "environment": environment(case.device, case.precision),
    }


def _case(benchmark: StepBenchmark, options: argparse.Namespace, device: torch.device) -> Case:
    small = benchmark.tiny and options.tiny
    task = task_module.load_task(options.data) if options.data else random_task(*(TINY_DATA if small else ()))
    settings = {"batch_real": options.batch_real} if benchmark.batch_real else {}
    case = Case(task, options.ipc, options.width, device, options.depth, settings, norm=benchmark.norm)
    compute = calibrate(options.precision, device, case.network, task.shape, task.num_classes)
    return dataclasses.replace(case, precision=compute.precision, compute=compute)


def describe_data(task: Task) -> str:
    shape = "x".join(map(str, task.shape))
    what = "random uint8 images" if task.fingerprint == "random" else task.name
    return f"{what}, {len(task.train):,} of {shape} in {task.num_classes} classes"


def child_environment() -> dict[str, str]:
    """Environment in which another process imports this package."""
    paths = [str(Path(condense.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def run_in_child(benchmark: StepBenchmark, arguments: Sequence[str], variant: str) -> dict[str, int]:
    """:func:`run_alone` in a process of its own."""
    command = [sys.executable, "-m", f"condense.benchmarks.speed.{benchmark.method}", *arguments, "--alone", variant]
    done = subprocess.run(command, capture_output=True, text=True, env=child_environment())
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise CondenseError(
            last.removeprefix("condense: ") if done.returncode == 2 else f"{variant} alone failed: {last}"
        )
    return json.loads(done.stdout.splitlines()[-1])


def format_report(record: dict[str, Any]) -> str:
    device = record["environment"]["device"]
    precision = {PUBLISHED: "fp32", PRODUCT: record["environment"]["precision"]}
    cuda = "device" in record["peak_memory"][PRODUCT]
    rows = [["step", "median seconds", "peak memory", "before the first step", "on the device"]]
    for name, peak in record["peak_memory"].items():
        seconds = record["median_seconds"][name]
        row = [f"{name} ({precision[name]})", f"{seconds:.4f}", gibibytes(peak["host"]), gibibytes(peak["baseline"])]
        rows.append([*row, gibibytes(peak.get("device"))])
    low, high = min(record["ratios"]), max(record["ratios"])
    return "\n".join(
        [
            f"{record['method']}: {record['data']}; ipc {record['ipc']}, {record['network']}"
            + (f", {record['batch_real']} real images a class" if "batch_real" in record else "")
            + f"; {device}",
            aligned(rows if cuda else [row[:-1] for row in rows]),
            f"published / condense, median of {len(record['ratios'])} pairs: {record['ratio']:.2f} "
            f"({low:.2f} to {high:.2f}); both with the {record['allocator']} allocator",
            f"condense reaches {100 * record['share_of_convolution_limit']:.0f} % of this machine's rate of "
            f"convolutions, {record['convolution_flops_per_second'] / 1e9:.0f} GFLOP/s; {record['processor']}, "
            + (", ".join(f"{name}={value}" for name, value in record["compute"].items() if value) or "default formats"),
            "update of the pixels after one step with the same draws differs from the published one by "
            + _gaps(record, "all")
            + "; that of the median image by "
            + _gaps(record, "median_image"),
            *disturbance(record["others_share"]),
        ]
    )


def _gaps(record: dict[str, Any], key: str) -> str:
    gaps = record["update_difference"].items()
    return ", ".join(
        f"{gap[key]:.1e} in {kind}" if key in gap else f"? in {kind}: {gap['failed']}" for kind, gap in gaps
    )


def disturbance(share: float | None) -> list[str]:
    """The line of a report that says how far other processes disturbed the times; none where that is unknown."""
    if share is None:
        return []
    warning = "; the times are not to be trusted" if share > QUIET else ""
    return [f"other processes used {100 * share:.0f} % of the processors while this was timed{warning}"]


def random_images(size: int, shape: Sequence[int], *parts: int | str) -> Tensor:
    """Standard normal images (size, *shape) on the CPU, drawn by the key ``parts``."""
    return torch.randn((size, *shape), generator=rng.generator(*parts))
