"""Experts: ``python -m condense.benchmarks.speed.experts`` times the published training of experts against ours.

Each measurement is a slice of so many SGD steps, ours as ``condense experts --for METHOD`` makes them (several networks
together where that is faster), the published ones by one network at a time; epochs are extrapolated from it. What an
epoch adds is in neither: our snapshot, and the published one with a test of the network. Ours build their networks in
the slice.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from condense import networks
from condense.augment import Augmentation
from condense.benchmarks.speed import published
from condense.benchmarks.speed.measure import (
    PRODUCT,
    PUBLISHED,
    SCHEMA,
    TUNED,
    Case,
    Others,
    Pairs,
    Parser,
    add_allocator,
    alternate,
    describe_data,
    disturbance,
    gibibytes,
    guarded,
    positive,
    random_task,
    run_alone,
    run_in_child,
    write,
)
from condense.benchmarks.speed.unroll import Alone
from condense.data import Task
from condense.data import task as task_module
from condense.device import pick_device
from condense.engine import Run
from condense.environment import keep_freed_memory
from condense.formatting import aligned, duration
from condense.judge import environment
from condense.methods.trajectory_matching.expert_updates import GSAM
from condense.pretraining import MAX_EXPERT_GROUP, ExpertTraining, make_student
from condense.registry import METHODS
from condense.training import epoch_steps, train

MANY, EPOCHS = 100, 50
"""Experts and their epochs, as published, for which the time is extrapolated."""
WHOLE = f"seconds_for_{MANY}x{EPOCHS}"
"""What records call it."""
TINY_DATA, TINY_WIDTH, TINY_DEPTH = (3, 12, (3, 8, 8), 1), 8, 2
"""Classes, images of each, their shape and test images; channels and blocks of the network."""


class Ours:
    """Slices of the product's training of experts, each of other ones.

    Args:
        case: data, network, device and the run's precision.
        training: as the method wants it.
        count: experts of a slice, together where the device is faster so.
    """

    def __init__(self, case: Case, training: ExpertTraining, count: int) -> None:
        self.case, self.training, self.count, self.begun = case, training, count, 0
        self.run = Run(case.task, 1, case.network, seed=case.seed, device=case.device, quiet=True, track="none")
        self.precision = training.precision or case.precision

    def train(self, steps: int) -> None:
        """So many steps of each of the slice's experts."""
        numbers = range(self.begun, self.begun + self.count)
        self.begun += self.count
        recipe = dataclasses.replace(self.training.recipe, steps=steps)
        compute = self.case.compute or networks.ComputeConfig(self.case.precision)
        with networks.memory_format(compute.format):
            train(
                [make_student(self.run, self.run.task, self.run.network, "expert", k) for k in numbers],
                recipe,
                device=self.case.device,
                precision=self.precision,
                update=self.training.update,
            )


def training_of(method: str, case: Case) -> ExpertTraining:
    """How the method's experts are trained; the case's settings may change it."""
    return METHODS.get(method).config(**case.settings).expert_training(case.task)


def published_loop(case: Case, training: ExpertTraining) -> published.Expert:
    """The published training of the same experts."""
    recipe, update = training.recipe, training.update
    assert update is None or isinstance(update, GSAM)
    gsam = None if update is None else (update.rho, update.coefficient)
    return published.Expert(
        case.task,
        device=case.device,
        batch=recipe.batch,
        lr=recipe.lr,
        gsam=gsam,
        depth=case.depth,
        width=case.width,
        operations=recipe.augment.ops if isinstance(recipe.augment, Augmentation) else (),
        seed=case.seed,
    )


def compare(case: Case, method: str, count: int, steps: int, pairs: int) -> dict[str, Any]:
    """Seconds of one step of one expert, from slices of both kinds in turn after short ones that do not count; their
    ratio, experts x epochs a minute, and seconds for the published number of experts."""
    training = training_of(method, case)
    theirs, ours = published_loop(case, training), Ours(case, training, count)
    for loop in (theirs, ours):
        loop.train(min(steps, 3))
    others = Others()
    seconds_of_pairs = alternate(lambda: theirs.train(steps), lambda: ours.train(steps), pairs, case.device)
    share = others.share()
    per_step = Pairs([s / steps for s in seconds_of_pairs.a], [s / (steps * count) for s in seconds_of_pairs.b])
    epoch = epoch_steps(len(case.task.train), training.recipe.batch)
    summary = per_step.summary(PUBLISHED, PRODUCT)
    epochs = {name: seconds * epoch for name, seconds in summary["median_seconds"].items()}
    return {
        **summary,
        "batch": training.recipe.batch,
        "precision": {PUBLISHED: "fp32", PRODUCT: ours.precision},
        "count": count,
        "steps": steps,
        "steps_per_epoch": epoch,
        "slice_seconds": {
            PUBLISHED: statistics.median(seconds_of_pairs.a),
            PRODUCT: statistics.median(seconds_of_pairs.b),
        },
        "experts_epochs_per_minute": {name: 60 / seconds for name, seconds in epochs.items()},
        WHOLE: {name: MANY * EPOCHS * seconds for name, seconds in epochs.items()},
        "others_share": share,
    }


# -- memory -----------------------------------------------------------------------------------------------------------


@dataclass
class Slice:
    """A loop whose step is a slice, for :func:`run_alone`."""

    train: Callable[[int], None]
    steps: int
    images: torch.Tensor = dataclasses.field(default_factory=lambda: torch.empty(0))

    def step(self, draws: Any = None) -> None:
        self.train(self.steps)


def measure_alone(case: Case, side: str, method: str, count: int, steps: int) -> dict[str, int]:
    """Peak bytes of this process for a slice of one side; to be called in a process of its own.

    A tiny slice goes first, or the peak would count what torch loads when it is first used.
    """

    def made(case: Case, config: None) -> Slice:
        training = training_of(method, case)
        loop = Ours(case, training, count) if side == PRODUCT else published_loop(case, training)
        return Slice(loop.train, steps)

    def run(case: Case) -> dict[str, int]:
        return run_alone(Alone("experts", made, lambda *_: None), case, f"{side} {method}", 1)

    small = random_task(*TINY_DATA)
    run(Case(small, 1, TINY_WIDTH, case.device, TINY_DEPTH, {"expert_batch": 16}, case.precision))
    return run(case)


# -- the command line -------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Parses the options, measures, prints a table and exits."""
    guarded(_measure, arguments)


def _parser() -> Parser:
    parser = Parser(
        prog="python -m condense.benchmarks.speed.experts",
        description="Times the published training of experts (a plain transcription) against this toolkit's, in turn.",
    )
    parser.add_argument("--data", help="a name, folder, .npz or .h5; random images shaped like CIFAR-10 when left out")
    parser.add_argument("--width", type=positive, default=128, help="channels of the ConvNet")
    parser.add_argument("--depth", type=positive, default=3, help="blocks of the ConvNet")
    parser.add_argument(
        "--count", type=positive, help=f"experts of ours in a slice; {MAX_EXPERT_GROUP} on CUDA, else 1"
    )
    parser.add_argument("--steps", type=positive, help="steps of each expert in a slice; 200 on CUDA, else 20")
    parser.add_argument("--pairs", type=positive, default=3, help="slices of each side, in turn")
    parser.add_argument("--methods", default="mtt,ftd", help="whose experts: mtt (SGD), ftd (GSAM), or both")
    parser.add_argument("--out", type=Path, required=True, help="file to write the numbers to")
    parser.add_argument("--device", default="auto")
    add_allocator(parser)
    parser.add_argument("--precision", default="auto", help="of ours, where the method does not need fp32")
    parser.add_argument(
        "--tiny", action="store_true", help="a few steps on small images, to try the script; sizes are ignored"
    )
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    return parser


def _measure(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    methods = options.methods.split(",")
    for name in methods:
        if name not in ("mtt", "ftd"):
            _parser().error(f"--methods {name}: mtt or ftd")
    if options.tiny:
        options.width, options.depth, options.count, options.steps, options.pairs = TINY_WIDTH, TINY_DEPTH, 2, 2, 1
    device = pick_device(options.device)
    if options.allocator == TUNED:
        keep_freed_memory()
    cuda = device.type == "cuda"
    count, steps = options.count or (MAX_EXPERT_GROUP if cuda else 1), options.steps or (200 if cuda else 20)
    case = _case(options, device)
    if options.alone:
        side, method = options.alone.split()
        print(json.dumps(measure_alone(case, side, method, count, min(steps, 3))))  # the peak is reached by then
        return 0
    alone = Alone("experts", lambda case, config: NotImplemented, lambda *_: None)
    peaks = {
        method: {side: run_in_child(alone, arguments, f"{side} {method}") for side in (PUBLISHED, PRODUCT)}
        for method in methods
    }
    results = {
        method: {**compare(case, method, count, steps, options.pairs), "peak_memory": peaks[method]}
        for method in methods
    }
    record = {
        "schema": SCHEMA,
        "benchmark": "experts",
        "data": describe_data(case.task),
        "network": case.network,
        "count": count,
        "steps": steps,
        "methods": results,
        "allocator": options.allocator,
        "compute": case.compute.to_dict() if case.compute else {},
        "processor": networks.processor_name(),
        "environment": environment(device, case.precision),
    }
    write(options.out, json.dumps(record, indent=1) + "\n")
    print(format_report(record))
    return 0


def _case(options: argparse.Namespace, device: torch.device) -> Case:
    task: Task
    if options.data:
        task = task_module.load_task(options.data)
    else:
        task = random_task(*TINY_DATA) if options.tiny else random_task()
    settings = {"expert_batch": 16} if options.tiny else {}
    case = Case(task, 1, options.width, device, options.depth, settings)
    compute = networks.calibrate(options.precision, device, case.network, task.shape, task.num_classes)
    return dataclasses.replace(case, precision=compute.precision, compute=compute)


def format_report(record: Mapping[str, Any]) -> str:
    rows = [
        [
            "experts",
            "ms a step of one",
            "experts x epochs a minute",
            f"{MANY} of {EPOCHS} epochs",
            "peak memory",
            "before",
            "on the device",
        ]
    ]
    ratios, shares = [], []
    for method, result in record["methods"].items():
        for side, peak in result["peak_memory"].items():
            rows.append(
                [
                    f"{method}, {side} ({result['precision'][side]})",
                    f"{1e3 * result['median_seconds'][side]:.2f}",
                    f"{result['experts_epochs_per_minute'][side]:.3g}",
                    duration(result[WHOLE][side]),
                    gibibytes(peak["host"]),
                    gibibytes(peak["baseline"]),
                    gibibytes(peak.get("device")),
                ]
            )
        low, high = min(result["ratios"]), max(result["ratios"])
        ratios.append(f"{method} {result['ratio']:.2f} ({low:.2f} to {high:.2f})")
        shares += [result["others_share"]] if result["others_share"] is not None else []
    first = next(iter(record["methods"].values()))
    cuda = any("device" in peak for result in record["methods"].values() for peak in result["peak_memory"].values())
    return "\n".join(
        [
            f"experts: {record['data']}; {record['network']}, batches of {first['batch']}; "
            f"{record['environment']['device']}",
            f"extrapolated from slices of {record['steps']} of the {first['steps_per_epoch']} steps of an epoch, ours "
            f"of {record['count']} experts at a time, published ones of one",
            aligned(rows if cuda else [row[:-1] for row in rows]),
            f"published / condense, median of {len(first['ratios'])} pairs of slices: {', '.join(ratios)}",
            *disturbance(max(shares) if shares else None),
        ]
    )


if __name__ == "__main__":
    main()
