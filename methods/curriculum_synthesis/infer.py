"""TODO-DOC."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from condense.data import Task, unit
from condense.engine import Run
from condense.errors import CondenseError
from condense.methods.curriculum_synthesis.bn_matching import matcher
from condense.methods.curriculum_synthesis.recovery import Batch, Guide, recover
from condense.methods.curriculum_synthesis.relabelling import kept, relabelled, squeezed
from condense.methods.curriculum_synthesis.settings import Recovery
from condense.registry import method
from condense.sets import Compensated, SyntheticOptions, SyntheticSet

# -- INFER ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class INFER(Recovery):
    """Hyper-parameters of INFER; those of CIFAR."""

    init: str = "real"
    """What compensators are added to: real (random real images)."""
    bn_weight: float = 1.0
    """See SRe2L's; 0.01 for ImageNet-1K."""
    min_scale: float = 1.0
    """See SRe2L's; 0.08 for larger images."""
    flip: bool = False
    """See SRe2L's; true for larger images."""
    num_teachers: int = 4
    """Teachers of each architecture; each has compensators of its own (M in all)."""
    labels: str = "static"
    """See SRe2L's."""
    temperature: float = 30.0
    """See SRe2L's."""
    label_pad: int = 4
    """See SRe2L's."""
    mix: str = "mixup"
    """See SRe2L's."""
    mix_alpha: float = 0.8
    """See SRe2L's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init != "real":
            raise CondenseError(f"init={self.init}: compensators are added to real images; leave it at real")


def indices(ipc: int, classes: int, teachers: int) -> int:
    """K: real images a class, so that these and K * ``teachers`` compensators need no more room than ``ipc`` images."""
    return math.floor(ipc / (teachers / classes + 1))


@method(
    "infer", config=INFER, year=2025, labels="static", protocol="infer-v1", network="resnet18-bn",
    paper="Breaking Class Barriers: Efficient Dataset Distillation via Inter-Class Feature Compensator",
)  # fmt: skip
def infer(task: Task, config: INFER, run: Run) -> SyntheticSet:
    """Adds to real images compensators that all classes share, one for each teacher, and keeps one label an image.

    When to use: where labels must be small, from some images per class on. Cost: SRe2L's for one image in each batch.
    Known failure: needs more than one image per class; students see (M + 1) times as many images as are kept apart.

    Zhang, Du, Li, Xie & Zhou, ICLR 2025. Kept are K real images a class and K * M compensators, added when the set is
    used; K is such that they need the room of ``ipc`` images a class. Labels are the teachers' mean logits, mixed as
    images are. The released program keeps every sum as a JPEG.
    """
    committee = squeezed(config, run)
    count, teachers = task.num_classes, len(committee.members)
    number = indices(run.ipc, count, teachers)
    if number < 1:
        raise CondenseError(
            f"--ipc {run.ipc}: {teachers} compensators and the real images of {count} classes do not fit; give at "
            f"least {math.ceil(1 + teachers / count)}, or num_teachers="
        )
    real = SyntheticSet.create(task, number, SyntheticOptions(), seed=run.seed, device=run.device)
    base = real.images.detach()
    shared = SyntheticSet(task, torch.zeros(number * teachers, *task.shape, device=run.device),
                          torch.zeros(number * teachers, dtype=torch.int64))  # fmt: skip
    # Batches of other classes add to the same compensator.
    batches = [
        Batch(k, torch.tensor([k * teachers + m]), part, part * number + k)
        for k in range(number) for m in range(teachers) for part in torch.arange(count).split(config.batch_classes)
    ]  # fmt: skip
    guides = [
        Guide(
            matcher(config, member.network), {g: 1.0 for g, one in enumerate(batches) if int(one.rows) % teachers == m}
        )
        for m, member in enumerate(committee.members)
    ]

    def done() -> SyntheticSet:
        stage, inverse = Compensated(count, number, teachers), task.transform.inverse
        added = inverse(shared.images.detach()) - inverse(torch.zeros_like(shared.images))
        stored = kept(torch.cat([inverse(base).clamp(0, 1), stage.encode(added)]), config.store)
        decoded, _ = stage(unit(stored), torch.arange(len(stored)))
        classes = torch.arange(count, device=run.device).repeat_interleave(stage.decoded)
        labels = relabelled(config, run, decoded, classes, committee)
        rows = torch.cat([real.classes, shared.classes.to(run.device)])
        made = SyntheticSet(task, stored, rows, space="pixel", stages=[stage], labels=labels)
        made.tensors["images"].requires_grad_(False)
        made.label_source = {"teachers": committee.describe(), "weights": None}
        return made

    run.partial_result(done)
    recover(config, run, shared, guides, batches, fixed=base, clamp=False)
    return done()
