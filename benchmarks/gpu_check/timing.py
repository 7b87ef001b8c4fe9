"""Seconds and memory of steps, students and experts beside the published loops, and of faster variants."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from condense import networks
from condense.benchmarks.gpu_check.check import Check
from condense.benchmarks.gpu_check.correctness import GRADIENT_TOLERANCE
from condense.benchmarks.speed import datadam, dc, dcc, dm, experts, mtt, sre2l, students
from condense.benchmarks.speed import dsa as dsa_steps
from condense.benchmarks.speed.measure import (
    PRODUCT,
    PUBLISHED,
    Change,
    StepBenchmark,
    differences,
    distance,
    drive,
    gibibytes,
    run_alone,
    synchronise,
    tf32,
    time_steps,
)
from condense.config import tiny_settings
from condense.device import pick_precision
from condense.engine import Run
from condense.errors import CondenseError
from condense.formatting import duration
from condense.pretraining import MAX_EXPERT_GROUP

BENCHMARKS: list[StepBenchmark] = [module.BENCHMARK for module in (dm, dc, dsa_steps, dcc, datadam, mtt, sre2l)]
"""Steps timed against their published form; a method adds itself here."""

LONG_STEPS = {"mtt": (4, 1)}
"""Timed steps, and those before that do not count, of methods whose step is a whole training."""

SLICE_SECONDS = 5.0
"""What a slice of the training of stacked experts takes, about."""

# -- (b), (c): speed --------------------------------------------------------------------------------------------------


def time_benchmarks(check: Check, ipc: int) -> tuple[str, Any]:
    """Published and product steps in turn, what each allocates on the device, and how far their updates differ."""
    precision = pick_precision("auto", check.device)

    def measure(benchmark: StepBenchmark) -> dict[str, Any]:
        settings = {**tiny_settings(benchmark.method), **benchmark.settings} if check.tiny else {}
        count, warm_up = (2, 1) if check.tiny else (3, 1)
        if check.cuda and not check.tiny:
            count, warm_up = LONG_STEPS.get(benchmark.method, (20, 5))
        case = dataclasses.replace(check.case(check.big_task, ipc, precision, **settings), norm=benchmark.norm)
        summary = time_steps(benchmark, case, count, warm_up).summary(PUBLISHED, PRODUCT)
        memory = {}
        if check.cuda:  # a CPU knows peaks of whole processes only; the scripts in speed/ start one for each
            memory = {kind: run_alone(benchmark, case, kind, 3)["device"] for kind in (PUBLISHED, PRODUCT)}
        gaps = differences(benchmark, case, dict.fromkeys(("fp32", precision)))
        passed = gaps["fp32"].get("all", math.inf) <= GRADIENT_TOLERANCE
        summary |= {"precision": precision, "tf32": torch.backends.cudnn.allow_tf32, "device_peak_memory": memory}
        return {**summary, "update_difference": gaps, "passed": passed}

    results = check.each({b.method: functools.partial(measure, b) for b in BENCHMARKS})
    parts = []
    for name, result in results.items():
        median, peak = result["median_seconds"], result["device_peak_memory"]
        parts.append(
            f"{name}: published {1e3 * median[PUBLISHED]:.1f} ms, {PRODUCT} {1e3 * median[PRODUCT]:.1f} ms, "
            f"ratio {result['ratio']:.2f}"
            + (f"; {gibibytes(peak[PUBLISHED])} and {gibibytes(peak[PRODUCT])}" if peak else "")
        )
    return "; ".join(parts), results


def time_students(check: Check) -> tuple[str, Any]:
    """Five students trained one by one and together, as an evaluation of ten images a class trains them."""
    shape = check.task().shape
    steps, pairs = (2, 1) if check.tiny else (50, 3)
    precision = pick_precision("auto", check.device)
    timings = students.compare(check.network, 5, 10, shape, 10, check.device, precision, steps, pairs)
    per_step = {name: 1e3 * seconds / steps for name, seconds in timings["median_seconds"].items()}
    summary = ", ".join(f"{name} {milliseconds:.1f} ms" for name, milliseconds in per_step.items())
    return f"a step of 5: {summary}, ratio {timings['ratio']:.2f}", timings


def time_experts(check: Check) -> tuple[str, Any]:
    """Experts trained as many together as the product trains them, for some seconds, against the published loop.

    The time of 100 experts of 50 epochs is extrapolated from both.
    """
    count, precision = (
        (2 if check.tiny else MAX_EXPERT_GROUP if check.cuda else 1),
        pick_precision("auto", check.device),
    )

    def measure(method: str) -> dict[str, Any]:
        case = check.case(check.big_task, 1, precision, **(tiny_settings(method) if check.tiny else {}))
        steps, pairs = (2, 1) if check.tiny else (10, 2)
        if not check.tiny:
            probed = experts.compare(case, method, count, steps, 1)["slice_seconds"][PRODUCT] / steps
            steps = max(steps, math.ceil(SLICE_SECONDS / probed))
        timings = experts.compare(case, method, count, steps, pairs)
        memory = {}
        if check.cuda:
            for side in (PUBLISHED, PRODUCT):
                memory[side] = experts.measure_alone(case, side, method, count, 3)["device"]
        return {**timings, "tf32": torch.backends.cudnn.allow_tf32, "device_peak_memory": memory}

    results = check.each({method: functools.partial(measure, method) for method in ("mtt", "ftd")})
    parts = []
    for method, result in results.items():
        pace, whole = result["experts_epochs_per_minute"][PRODUCT], result[experts.WHOLE][PRODUCT]
        parts.append(
            f"{method}: {pace:.3g} experts x epochs a minute, {experts.MANY} of {experts.EPOCHS} epochs in "
            f"{duration(whole)}, {count} together; published / {PRODUCT} {result['ratio']:.2f}"
        )
    return "; ".join(parts), results


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
    settings = tiny_settings("dm") if check.tiny else {}
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
            synthetic = drive("dm", config, case, between, variant.change)
        updates[name] = synthetic.images.detach() - start
        seconds = [after - before for before, after in itertools.pairwise(marks)]
        return {
            "first_step_seconds": seconds[0],
            "seconds": seconds[warm_up:],
            "median_seconds": statistics.median(seconds[warm_up:]),
            "update_difference": distance(updates[name], next(iter(updates.values()))),
        }

    results = check.each({name: functools.partial(measure, name, variant) for name, variant in runs.items()})
    parts = [f"{name} {1e3 * result['median_seconds']:.1f} ms" for name, result in results.items()]
    return "; ".join(parts), results
