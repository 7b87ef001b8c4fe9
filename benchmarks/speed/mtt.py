"""MTT: ``python -m condense.benchmarks.speed.mtt`` times the published step against ours; see ``--help``.

A step is a whole training of a student on the set, by default of 20 steps, and the gradient through it: published by
one graph of all steps, ours by the adjoint, which makes each step a second time and so is slower but far smaller.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from condense import device as device_module
from condense import networks, rng
from condense.augment import AugmentationParameters, make_augmentation
from condense.benchmarks.speed import published
from condense.benchmarks.speed.measure import (
    PRODUCT,
    PUBLISHED,
    SCHEMA,
    TINY_DATA,
    TUNED,
    Case,
    Parser,
    StepBenchmark,
    add_allocator,
    describe_data,
    format_report,
    guarded,
    measure_steps,
    positive,
    random_task,
    run_alone,
    run_in_child,
    scratch,
    write,
)
from condense.data import task as task_module
from condense.device import pick_device
from condense.engine import Run
from condense.environment import keep_freed_memory
from condense.errors import CondenseError
from condense.networks import calibrate
from condense.pretraining import ExpertTraining, read_trajectory_file, train_trajectory_file
from condense.training import TrainConfig

METHOD = "mtt"
EPOCHS = 10
"""Steps of the expert from the weights where students start to those they shall reach, each a whole epoch of its own
few images."""


def expert_file(case: Case) -> Path:
    """The file of one expert on the case, trained where this process has none yet.

    It learns from one image of each class, which takes less memory than any step that is measured, so that it does not
    show in a peak. What a step costs does not depend on what the weights are.
    """
    few = case.task.hold_out(1.0, ("speed", "expert"))
    run = Run(few, 1, case.network, seed=case.seed, device=case.device, quiet=True, track="none")
    recipe = TrainConfig(0, batch=case.task.num_classes, lr=0.01, momentum=0.0, weight_decay=0.0, lr_milestones=())
    path = scratch() / f"{case.network}-{case.device.type}.h5"
    train_trajectory_file(run, ExpertTraining(recipe), path, count=1, epochs=EPOCHS, dtype="float32", force=True)
    return path


@dataclass(frozen=True)
class TrajectoryBenchmark(StepBenchmark):
    """A method that needs experts."""

    def config(self, case: Case, **changes: Any) -> Any:
        """The method's configuration on ``case``, whose students always take the same stretch of one short expert."""
        stretch = {"max_start_epoch": 1, "expert_epochs": EPOCHS, "buffer_epochs": EPOCHS, "num_experts": 1}
        return super().config(case, **changes, **stretch, experts=str(expert_file(case)))


class Loop(published.MTT):
    """The published loop, which says so where its graph does not fit into the memory."""

    def step(self, draws: Sequence[AugmentationParameters] | None = None) -> None:
        fault = CondenseError(
            f"the published graph of {self.syn_steps} steps on {len(self.images)} images does not fit in the memory"
        )
        # A CPU would end the process, or swap. An image takes about 3 MB a step at 32x32 and 128 channels.
        pixels = len(self.images) * self.shape[1] * self.shape[2]
        need, free = 3e6 * self.syn_steps * pixels / 1024 * self.width / 128, device_module.free_host_memory()
        if self.device.type == "cpu" and 0 < free < need:
            raise fault
        try:
            super().step(draws)
        except torch.OutOfMemoryError as first:
            raise fault from first


def published_loop(case: Case, config: Any) -> Loop:
    """The published loop of MTT."""
    file = read_trajectory_file(Path(config.experts))

    def weights(epoch: int) -> Tensor:
        """Our parameters in the order of the published network's."""
        theta = torch.from_numpy(file.values[0, epoch].astype("float32"))
        with rng.seeded("speed", "layout"):
            ours = networks.build_network(case.network, case.task.shape, case.task.num_classes)
            theirs = published.convnet(case.task.shape, case.task.num_classes, depth=case.depth, width=case.width)
        ours.load_state_dict(file.layout.unflatten(theta))
        published.copy_weights(ours, theirs)
        return torch.nn.utils.parameters_to_vector(theirs.parameters()).detach()

    return Loop(
        case.start(config),
        case.task.num_classes,
        (weights(0), weights(config.expert_epochs)),
        device=case.device,
        lr_img=config.lr_img,
        lr_lr=config.lr_lr,
        lr_start=config.lr_start,
        momentum=config.momentum,
        syn_steps=config.syn_steps,
        operations=make_augmentation(config.augment, mirror=case.task.mirror).ops,
        depth=case.depth,
        width=case.width,
        seed=case.seed,
    )


def draws(case: Case, config: Any, run: Run, index: int) -> list[AugmentationParameters]:
    """The draws of the product's step ``index``: the augmentation of each of the student's steps."""
    augment, size = make_augmentation(config.augment, mirror=case.task.mirror), case.ipc * case.task.num_classes
    return [
        augment.draw(rng.Draws(run.seed, "augment", index, i), size, case.task.shape[1:], groups=1)
        for i in range(config.syn_steps)
    ]


BENCHMARK = TrajectoryBenchmark(METHOD, published_loop, draws, settings={"syn_steps": 20, "step_size": "raw"})


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Parses the options, measures, prints a table and exits."""
    guarded(_compare, arguments)


def _parser() -> Parser:
    parser = Parser(
        prog=f"python -m condense.benchmarks.speed.{METHOD}",
        description="Times the published step of mtt (a plain transcription) against this toolkit's, in turn.",
    )
    parser.add_argument("--data", help="a name, folder, .npz or .h5; random images shaped like CIFAR-10 when left out")
    parser.add_argument("--ipc", type=positive, default=10)
    parser.add_argument("--width", type=positive, default=128, help="channels of the ConvNet")
    parser.add_argument("--depth", type=positive, default=3, help="blocks of the ConvNet")
    parser.add_argument("--syn-steps", type=positive, default=20, help="training steps of the student in a step")
    parser.add_argument("--steps", type=positive, default=3, help="pairs of steps that count, after one that does not")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="fp32", choices=("auto", "fp32"), help="all second order is in fp32")
    add_allocator(parser)
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    parser.add_argument(
        "--tiny", action="store_true", help="a few steps on small images, to try the script; sizes are ignored"
    )
    parser.add_argument("--alone", choices=(PRODUCT, PUBLISHED), help=argparse.SUPPRESS)
    return parser


def _compare(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    if options.tiny:
        options.ipc, options.width, options.depth, options.syn_steps, options.steps = 2, 8, 2, 3, 1
    device = pick_device(options.device)
    if options.allocator == TUNED:
        keep_freed_memory()
    if options.alone:
        # A tiny step goes first, or the peak would count what torch loads when it is first used.
        run_alone(BENCHMARK, Case(random_task(*TINY_DATA), 1, 8, device, 2, {"syn_steps": 2}), options.alone, 1)
        print(json.dumps(run_alone(BENCHMARK, _case(options, device), options.alone, options.steps)))
        return 0
    # The children first: later this process would hold memory that they do not need.
    peaks = {variant: run_in_child(BENCHMARK, arguments, variant) for variant in (PUBLISHED, PRODUCT)}
    case = _case(options, device)
    record = {
        "schema": SCHEMA,
        "method": METHOD,
        "data": describe_data(case.task),
        "ipc": case.ipc,
        "network": case.network,
        "syn_steps": case.settings["syn_steps"],
        "peak_memory": peaks,
        "allocator": options.allocator,
        **measure_steps(BENCHMARK, case, options.steps),
    }
    print(_table(record))
    if options.json:
        write(options.json, json.dumps(record, indent=1) + "\n")
    return 0


def _case(options: argparse.Namespace, device: torch.device) -> Case:
    if options.data:
        task = task_module.load_task(options.data)
    else:
        task = random_task(*TINY_DATA) if options.tiny else random_task()
    case = Case(task, options.ipc, options.width, device, options.depth, {"syn_steps": options.syn_steps})
    compute = calibrate("fp32", device, case.network, task.shape, task.num_classes)
    return dataclasses.replace(case, compute=compute)


def _table(record: dict[str, Any]) -> str:
    """As the other steps' tables, but for what no step of this one has: a batch of real images."""
    head = (
        f"{METHOD}: {record['data']}; ipc {record['ipc']}, {record['network']}, {record['syn_steps']} steps of the "
        f"student; {record['environment']['device']}"
    )
    lines = format_report(record).splitlines()[1:]
    used = {name: peak.get("device", peak["host"] - peak["baseline"]) for name, peak in record["peak_memory"].items()}
    share = f"memory of the steps, condense / published: {used[PRODUCT] / max(used[PUBLISHED], 1):.2f}"
    return "\n".join([head, *lines, share])


if __name__ == "__main__":
    main()
