"""HeLlO: RDED's images, labelled by a public network with low-rank changes of its weights."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from condense import rng
from condense.config import require_range
from condense.data import Task
from condense.engine import ParamGroup, Run
from condense.labels import Labels, ProjectorLabels, check_loss
from condense.lighten import Projection, head_kind, train_projector
from condense.methods.curriculum_synthesis.initial import set_from_pixels
from condense.methods.curriculum_synthesis.patches import (
    confident_patches,
    get_crop_size,
    group_crops,
    most_confident_crops,
    split_collages,
)
from condense.methods.curriculum_synthesis.rded import RDED
from condense.methods.curriculum_synthesis.relabelling import finish_set, get_teachers
from condense.methods.curriculum_synthesis.settings import RELABEL_KINDS, RelabelOptions
from condense.networks import Encoder, pretrained
from condense.pretraining import Committee, iter_training_groups
from condense.registry import method
from condense.sets import SyntheticSet

DRY_RUN_STEPS = 4
"""Training steps of a projector in a dry run."""

TILE_CHUNK = 256
"""Tiles per forward pass of the public network during refinement."""


@dataclass(frozen=True)
class HeLlO(Projection, RDED):
    """Hyper-parameters of HeLlO; unpublished ones are our own choice, tried on 32x32 images."""

    labels: str = "projector"
    """{inherited} Also projector: logits of a public network with low-rank changes of its weights."""
    teacher_epochs: int = 10
    """{inherited} Weak teachers suit small sets best; published are nine checkpoints of one training."""
    refine_steps: int = 100
    """Steps in which the shrunken tiles of collages are optimised to have the features of the full-size crops in the
    public network; none with factor=1."""
    refine_lr: float = 0.01
    """Learning rate of Adam on the pixels of these tiles."""
    loss_kind: str = "kl"
    """Loss of students: kl (at the temperature), or mse (of logits), as published."""
    gamma: float = 0.0
    """Weight of the cross-entropy with the images' classes, for loss_kind=mse (beta). Not published."""

    label_kinds: ClassVar[tuple[str, ...]] = (*RELABEL_KINDS, "projector")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_projection()
        check_loss(self.loss_kind, self.gamma, torch.zeros(0))
        require_range(self, refine_steps=(0, math.inf), refine_lr=(0, sys.float_info.max))


def features(encoder: Encoder, run: Run, images: Tensor) -> Tensor:
    """Features (N, D) of the public network for images (N, C, H, W) in training space."""
    with run.autocast():
        parts = [encoder(run.task.transform.inverse(part)).float() for part in images.split(TILE_CHUNK)]
    return torch.cat(parts)


def upsample_tiles(tiles: Tensor, size: int) -> Tensor:
    """Tiles (N, C, s, s) at the size at which students see them: (N, C, size, size)."""
    return F.interpolate(tiles, (size, size), mode="bilinear", align_corners=False)


def train_projector_labels(
    config: RelabelOptions,
    run: Run,
    stored: Tensor,
    classes: Tensor,
    committee: Committee,
    weights: Sequence[float] | None = None,
) -> Labels:
    """Labels of a projector that is trained on the real data; in place of ``make_labels``."""
    assert isinstance(config, HeLlO)
    again = f"stopped while training its projector; continue with: {run.resume_call}"
    rule, seed = config.view_rule(run.task.mirror, run.task.transform), rng.key(run.seed, "labels")
    place = run.directory if run.ranks.is_main_process else None
    with run.stage("labelling", config.projector_steps, trial=DRY_RUN_STEPS) as stage:
        for _, report in iter_training_groups(run, [0], stage.units, "a projector", again):

            def note(done: int, report: Callable[[int], None] = report) -> None:
                stage.report(done)
                report(done)

            projector, description = train_projector(
                run.task,
                committee.ensemble(weights),
                dataclasses.replace(config, projector_steps=stage.units),
                rule,
                seed,
                statistics=config.label_statistics,
                micro=config.label_micro,
                device=run.device,
                precision=run.precision,
                report=note,
                checkpoint=None if place is None else place / "projector.train",
            )
    return ProjectorLabels.of(
        projector,
        description,
        len(stored),
        seed,
        rule,
        config.temperature,
        config.squared,
        loss_kind=config.loss_kind,
        gamma=config.gamma,
        hard=classes if config.gamma else None,
    )


@method(
    "hello",
    config=HeLlO,
    year=2025,
    labels="projector",
    protocol="rded-v1",
    network="resnet18-bn",
    paper="Heavy Labels Out! Dataset Distillation with Label Space Lightening",
    pretrains="teachers",
)
def hello(task: Task, config: HeLlO, run: Run) -> SyntheticSet:
    """RDED's images with labels of a public network, of which only low-rank weight changes are stored.

    When to use: if stored labels outweigh the images and a public network was trained on similar images. Cost: a
    teacher, a short training of the changes, and a forward pass of the public network in each step of a student. Known
    failure: a small 8-bit teacher (labels=teacher of condense lighten) may take fewer bytes; RDED's labels are better
    on large sets.

    Yu et al., ICCV 2025. No code is public: weight of the classes, steps, rates and prompts are a reconstruction, and
    the mean of all teachers stands for the nine checkpoints. Published students train with loss_kind=mse and some
    gamma; kl is the loss of the other methods' students. A time limit does not shorten the projector's training.
    """
    get_crop_size(task, config.factor, f"factor={config.factor}")
    if config.labels == "projector":  # a missing backbone is reported before any training
        head_kind(config, pretrained.find_backbone(config.backbone, task.shape, torch.device("cpu")))
    committee = get_teachers(config, run, batch_norm=False)
    scorer = committee.members[0].network
    pixels = confident_patches(run, scorer, config.pool, config.crops, config.factor, config.grouping)
    synthetic = set_from_pixels(run, pixels)
    if config.factor > 1 and config.refine_steps:
        encoder = pretrained.find_backbone(config.backbone, task.shape, run.device).encoder
        targets = []
        for c in range(task.num_classes):
            large = most_confident_crops(run, scorer, c, config.pool, config.crops, config.factor, task.shape[1])
            targets.append(features(encoder, run, group_crops(large, config.factor, config.grouping)))
        target = torch.cat(targets)
        low, high = (task.transform(torch.full((task.shape[0], 1, 1), end, device=run.device)) for end in (0.0, 1.0))
        group = ParamGroup(lr=config.refine_lr, optimizer="adam", clamp=(low, high))
        for step in run.optimise(synthetic, config.refine_steps, images=group):
            for rows in torch.arange(len(target), device=run.device).split(TILE_CHUNK):
                tiles = split_collages(synthetic.images, config.factor)[rows]
                gap = features(encoder, run, upsample_tiles(tiles, task.shape[1])) - target[rows]
                step.accumulate(gap.square().mean(1).sum() / len(target))
            step.update()
    make = train_projector_labels if config.labels == "projector" else None
    return finish_set(config, run, synthetic.images, synthetic.classes, committee, make=make)
