"""INFER: real images plus learned compensators that all classes share."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from condense.data import Task, to_unit_range
from condense.engine import Run
from condense.errors import CondenseError
from condense.methods.curriculum_synthesis.bn_matching import make_matcher
from condense.methods.curriculum_synthesis.recovery import Batch, Guide, class_loss, recovery_passes
from condense.methods.curriculum_synthesis.relabelling import get_teachers, make_labels, to_storage
from condense.methods.curriculum_synthesis.settings import RecoveryOptions
from condense.registry import method
from condense.sets import Compensated, SyntheticOptions, SyntheticSet


@dataclass(frozen=True)
class INFER(RecoveryOptions):
    """Hyper-parameters of INFER; the defaults are those of CIFAR."""

    init: str = "real"
    """Images that compensators are added to: real (random real images)."""
    bn_weight: float = 1.0
    """{inherited} 0.01 for ImageNet-1K."""
    min_scale: float = 1.0
    """{inherited} 0.08 for larger images."""
    flip: bool = False
    """{inherited} True for larger images."""
    num_teachers: int = 4
    """Teachers of each architecture; each has its own compensators (M in all)."""
    labels: str = "static"
    temperature: float = 30.0
    label_pad: int = 4
    mix: str = "mixup"
    mix_alpha: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init != "real":
            raise CondenseError(f"init={self.init}: compensators are added to real images; leave it at real")


def count_real_images(ipc: int, classes: int, teachers: int) -> int:
    """K: real images per class, so that these and K * ``teachers`` compensators take no more room than ``ipc``
    images."""
    return math.floor(ipc / (teachers / classes + 1))


@method(
    "infer",
    config=INFER,
    year=2025,
    labels="static",
    protocol="infer-v2",
    network="resnet18-bn",
    paper="Breaking Class Barriers: Efficient Dataset Distillation via Inter-Class Feature Compensator",
    pretrains="teachers",
)
def infer(task: Task, config: INFER, run: Run) -> SyntheticSet:
    """Adds learned compensators, one per teacher and shared by all classes, to real images; stores one label per image.

    When to use: if labels must be small, from a few images per class on. Cost: SRe2L's for one image in each batch.
    Known failure: needs more than one image per class; students train on (M + 1) times as many images as real ones are
    stored.

    Zhang, Du, Li, Xie & Zhou, ICLR 2025. K real images per class and K * M compensators are stored and added when the
    set is used; K is such that they take the room of ``ipc`` images per class. Labels are the teachers' mean logits,
    mixed as images are. The released program stores every sum as a JPEG.
    """
    committee = get_teachers(config, run)
    count, teachers = task.num_classes, len(committee.members)
    number = count_real_images(run.ipc, count, teachers)
    if number < 1:
        raise CondenseError(
            f"--ipc {run.ipc}: {teachers} compensators and the real images of {count} classes do not fit; give at "
            f"least {math.ceil(1 + teachers / count)}, or num_teachers="
        )
    real = SyntheticSet.create(task, number, SyntheticOptions(), seed=run.seed, device=run.device)
    base = real.images.detach()
    shared = SyntheticSet(
        task,
        torch.zeros(number * teachers, *task.shape, device=run.device),
        torch.zeros(number * teachers, dtype=torch.int64),
    )
    # Batches of other classes add to the same compensator.
    batches = [
        Batch(k, torch.tensor([k * teachers + m]), part, part * number + k)
        for k in range(number)
        for m in range(teachers)
        for part in torch.arange(count).split(config.batch_classes)
    ]
    guides = [
        Guide(
            make_matcher(config, member.network),
            {g: 1.0 for g, batch in enumerate(batches) if int(batch.rows) % teachers == m},
        )
        for m, member in enumerate(committee.members)
    ]

    def finish() -> SyntheticSet:
        stage, inverse = Compensated(count, number, teachers), run.task.transform.inverse
        added = inverse(shared.images.detach()) - inverse(torch.zeros_like(shared.images))
        stored = to_storage(torch.cat([inverse(base).clamp(0, 1), stage.encode(added)]), config.store)
        decoded, _ = stage(to_unit_range(stored), torch.arange(len(stored)))
        classes = torch.arange(count, device=run.device).repeat_interleave(stage.decoded)
        labels = make_labels(config, run, decoded, classes, committee)
        rows = torch.cat([real.classes, shared.classes.to(run.device)])
        synthetic = SyntheticSet(task, stored, rows, space="pixel", stages=[stage], labels=labels)
        synthetic.tensors["images"].requires_grad_(False)
        synthetic.label_source = {"teachers": committee.describe(), "weights": None}
        return synthetic

    run.partial_result(finish)
    for batch in recovery_passes(config, run, shared, guides, batches, clamp=False):
        logits, distances = batch.forward(batch.views(base[batch.fixed_rows] + batch.pixels))
        batch.backward(class_loss(logits, batch.classes, len(distances)) + config.bn_weight * distances)
    return finish()
