"""SRe2L: ``python -m condense.benchmarks.speed.sre2l`` times the published recovery step against ours; see ``--help``.

A step moves every image of the set once: published batch by batch with hooks in fp32, ours all batches at once with
fused moments, in the precision that the device is fast in.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from condense import networks, rng, tasks
from condense.augment import CropViews
from condense.benchmarks.speed import published
from condense.benchmarks.speed.measure import (
    PRODUCT,
    PUBLISHED,
    SCHEMA,
    Case,
    Others,
    Parser,
    StepBenchmark,
    _data,
    _in_child,
    _report,
    difference,
    guarded,
    positive,
    random_task,
    run_alone,
    time_steps,
    write,
)
from condense.records import environment
from condense.run import Run, pick_device, pick_precision
from condense.synthetic import SyntheticOptions
from condense.tasks import Task
from condense.units import by

METHOD = "sre2l"
TINY_DATA = (3, 4, (3, 8, 8), 1)
"""Classes, images of each, their shape and test images."""
WARM = 256
"""Random inputs that give a teacher its running statistics; how good it is does not change what a step costs."""


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """Where this process keeps teachers; gone with it."""
    return tempfile.TemporaryDirectory(prefix="condense-speed-")


def teacher(network: str, shape: tuple[int, int, int], classes: int) -> nn.Module:
    """A random teacher with running statistics of random images."""
    with rng.seeded("speed", "teacher"):
        net = networks.build(network, shape, classes)
        with torch.no_grad():
            for part in torch.randn(WARM, *shape).split(64):
                net(part)
    return net.eval()


def teacher_file(case: Case) -> Path:
    """The teacher as a checkpoint, which a run can be given."""
    path = Path(_folder().name) / f"{case.network}-{case.task.num_classes}-{by(case.task.shape)}.pt"
    if not path.exists():
        torch.save(teacher(case.network, case.task.shape, case.task.num_classes).state_dict(), path)
    return path


@dataclass(frozen=True)
class RecoveryBenchmark(StepBenchmark):
    """A method that needs a teacher."""

    def config(self, case: Case, **changes: Any) -> Any:
        """The method's configuration on ``case``; labels are none of the step's work."""
        fixed = {"teachers": str(teacher_file(case)), "labels": "hard", "store": "float32"}
        return super().config(case, **{**changes, **fixed})


def published_loop(case: Case, config: Any) -> published.SRe2L:
    """The published loop, with the same teacher in plain layers."""
    shape, classes = case.task.shape, case.task.num_classes
    ours = teacher(case.network, shape, classes)
    with rng.seeded("speed", "layout"):
        theirs = published.convnet(shape, classes, depth=case.depth, width=case.width)
    for number, layer in enumerate(theirs):
        if isinstance(layer, nn.GroupNorm):
            theirs[number] = nn.BatchNorm2d(layer.num_channels)
    for kind in (nn.Conv2d, nn.BatchNorm2d, nn.Linear):
        pairs = ([layer for layer in net.modules() if isinstance(layer, kind)] for net in (ours, theirs))
        for old, new in zip(*pairs, strict=True):
            new.load_state_dict(old.state_dict())
    ends = [case.task.transform(torch.full((shape[0], 1, 1), end)).flatten() for end in (0.0, 1.0)]
    return published.SRe2L(
        case.start(SyntheticOptions(init=config.init)), classes, theirs, (ends[0], ends[1]), device=case.device,
        lr_img=config.lr_img, bn_weight=config.bn_weight, first=config.bn_first, least=config.min_scale,
        jitter=config.jitter, steps=config.steps, flip=config.flip and case.task.mirror, seed=case.seed,
    )  # fmt: skip


def draws(case: Case, config: Any, run: Run, index: int) -> list[tuple[list[int], bool, list[int]]]:
    """The draws of the product's step ``index``: box, mirror and roll of each batch."""
    size = (case.task.shape[1], case.task.shape[2])
    crops = CropViews(config.min_scale, 1.0, config.flip and case.task.mirror)
    views = crops.draw(rng.Draws(run.seed, "crop", index), case.ipc, size)
    shift = rng.Draws(run.seed, "roll", index).integers(config.jitter + 1, (case.ipc, 2))
    return list(zip(views.box.tolist(), views.mirrored.tolist(), shift.tolist()))


BENCHMARK = RecoveryBenchmark(METHOD, published_loop, draws, norm="bn")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Parses the options, measures, prints a table and exits."""
    guarded(_compare, arguments)


def _parser() -> Parser:
    parser = Parser(
        prog=f"python -m condense.benchmarks.speed.{METHOD}",
        description="Times the published recovery step (a plain transcription) against this toolkit's, in turn.",
    )
    parser.add_argument("--data", help="a name, folder, .npz or .h5; random images shaped like CIFAR-10 when left out")
    parser.add_argument("--ipc", type=positive, default=10)
    parser.add_argument("--width", type=positive, default=32, help="channels of the ConvNet")
    parser.add_argument("--depth", type=positive, default=3, help="blocks of the ConvNet")
    parser.add_argument("--steps", type=positive, default=20, help="pairs of steps that count, after one that does not")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto", help="of this toolkit's step: auto, fp32 or bf16")
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    parser.add_argument(
        "--tiny", action="store_true", help="a few steps on small images, to try the script; sizes are ignored"
    )
    parser.add_argument("--alone", choices=(PRODUCT, PUBLISHED), help=argparse.SUPPRESS)
    return parser


def _compare(words: Sequence[str]) -> int:
    options = _parser().parse_args(words)
    if options.tiny:
        options.ipc, options.width, options.depth, options.steps = 2, 8, 2, 1
    device = pick_device(options.device)
    if options.alone:
        # A tiny step goes first, or the peak would count what torch loads when it is first used.
        run_alone(BENCHMARK, Case(random_task(*TINY_DATA), 1, 8, device, 2, norm="bn"), options.alone, 1)
        print(json.dumps(run_alone(BENCHMARK, _case(options, device), options.alone, options.steps)))
        return 0
    # The children first: later this process would hold memory that they do not need.
    peaks = {variant: _in_child(BENCHMARK, words, variant) for variant in (PUBLISHED, PRODUCT)}
    case = _case(options, device)
    others = Others()
    pairs = time_steps(BENCHMARK, case, options.steps)
    share = others.share()
    record = {
        "schema": SCHEMA,
        "method": METHOD,
        "data": _data(case.task),
        "ipc": case.ipc,
        "network": case.network,
        **pairs.summary(PUBLISHED, PRODUCT),
        "peak_memory": peaks,
        "update_difference": {
            precision: difference(BENCHMARK, case, precision) for precision in dict.fromkeys(("fp32", case.precision))
        },
        "others_share": share,
        "environment": environment(device, case.precision),
    }
    print(_table(record))
    if options.json:
        write(options.json, json.dumps(record, indent=1) + "\n")
    return 0


def _case(options: argparse.Namespace, device: torch.device) -> Case:
    task: Task
    if options.data:
        task = tasks.load(options.data)
    else:
        task = random_task(*TINY_DATA) if options.tiny else random_task(per_class=50)
    case = Case(task, options.ipc, options.width, device, options.depth, norm="bn")
    with rng.seeded("check"):  # refuses a network that does not fit the images
        networks.build(case.network, task.shape, task.num_classes)
    return dataclasses.replace(case, precision=pick_precision(options.precision, device))


def _table(record: dict[str, Any]) -> str:
    """As the other steps' tables, but for what no step of this one has: a batch of real images."""
    head = f"{METHOD}: {record['data']}; ipc {record['ipc']}, {record['network']}; {record['environment']['device']}"
    return "\n".join([head, *_report({**record, "batch_real": 0}).splitlines()[1:]])


if __name__ == "__main__":
    main()
