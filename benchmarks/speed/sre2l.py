"""SRe2L: ``python -m condense.benchmarks.speed.sre2l`` times the published recovery step against ours; see ``--help``.

A step moves every image of the set once: published batch by batch with hooks in fp32, ours all batches at once with
fused moments, in the precision that the device is fast in.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from condense import networks, rng
from condense.augment import CropViews
from condense.benchmarks.speed import published
from condense.benchmarks.speed.measure import Case, StepBenchmark, main, scratch
from condense.engine import Run
from condense.formatting import by
from condense.sets import SyntheticOptions

WARM = 256
"""Random inputs that give a teacher its running statistics; how good it is does not change what a step costs."""


def teacher(network: str, shape: tuple[int, int, int], classes: int) -> nn.Module:
    """A random teacher with running statistics of random images."""
    with rng.seeded("speed", "teacher"):
        net = networks.build_network(network, shape, classes)
        with torch.no_grad():
            for part in torch.randn(WARM, *shape).split(64):
                net(part)
    return net.eval()


def teacher_file(case: Case) -> Path:
    """The teacher as a checkpoint, which a run can be given."""
    path = scratch() / f"{case.network}-{case.task.num_classes}-{by(case.task.shape)}.pt"
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
        case.start(SyntheticOptions(init=config.init)),
        classes,
        theirs,
        (ends[0], ends[1]),
        device=case.device,
        lr_img=config.lr_img,
        bn_weight=config.bn_weight,
        first=config.bn_first,
        least=config.min_scale,
        jitter=config.jitter,
        steps=config.steps,
        flip=config.flip and case.task.mirror,
        seed=case.seed,
    )


def draws(case: Case, config: Any, run: Run, index: int) -> list[tuple[list[int], bool, list[int]]]:
    """The draws of the product's step ``index``: box, mirror and roll of each batch."""
    size = (case.task.shape[1], case.task.shape[2])
    crops = CropViews(config.min_scale, 1.0, config.flip and case.task.mirror)
    views = crops.draw(rng.Draws(run.seed, "crop", index), case.ipc, size)
    shift = rng.Draws(run.seed, "roll", index).integers(config.jitter + 1, (case.ipc, 2))
    return list(zip(views.box.tolist(), views.mirrored.tolist(), shift.tolist()))


BENCHMARK = RecoveryBenchmark("sre2l", published_loop, draws, batch_real=None, norm="bn", width=32, pairs=20, tiny=True)


if __name__ == "__main__":
    main(BENCHMARK)
