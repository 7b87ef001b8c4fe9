"""Batches of training steps: the images of one student, or of several that are trained together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from condense import rng
from condense.augment import AugmentationParameters, CropViews, ImagePolicy, ViewBoxes, cutmix
from condense.device import autocast, upload
from condense.labels import HardLabels
from condense.training.config import TrainConfig, batch_groups, batch_ids, epoch_steps
from condense.training.student import FixedSource, Source, Student, TaskSource, WeightedTargets


class Batch(NamedTuple):
    """Images and targets of a training step."""

    images: Tensor
    """(B,C,H,W), augmented and mixed by the recipe or by the labels."""
    targets: WeightedTargets
    clean: Tensor
    """The images before."""
    sizes: list[int]
    """Sizes of the groups of images that share batch statistics."""


def make_batch(student: Student, recipe: TrainConfig, step: int, device: torch.device, precision: str) -> Batch:
    """Returns the batch of ``step`` of one student."""
    source = student.source
    epoch, part = divmod(step, epoch_steps(source.size, recipe.batch))
    if recipe.batch_norm_group:
        labelled = source.labelled_groups(epoch, recipe.batch_norm_group)
        groups = batch_groups(student.seed, source.size, recipe.batch, step, recipe.batch_norm_group, labelled)
    else:
        mixed = source.mixed_batches(epoch, recipe.batch)
        groups = [batch_ids(student.seed, source.size, recipe.batch, step) if mixed is None else mixed[part]]
    # The precision of teachers that label in each step, one group at a time.
    with autocast(device, precision if source.per_view else "fp32"):
        batches = [source.batch(ids, epoch) for ids in groups]
    clean, targets = batches[0] if len(batches) == 1 else map(torch.cat, zip(*batches))
    sizes = [len(ids) for ids in groups]
    if source.per_view:
        return Batch(clean, [(1.0, targets)], clean, sizes)
    images = _augment(clean, recipe, [student.seed], step)
    if recipe.cutmix:
        draws = rng.Draws(student.seed, "cutmix", step)
        if float(draws.uniform(1)) < recipe.cutmix:
            images, partners, share = cutmix(images, draws)
            mixed_targets = [(share, targets), (1 - share, targets[upload(partners, targets.device)])]
            return Batch(images, mixed_targets, clean, sizes)
    return Batch(images, [(1.0, targets)], clean, sizes)


def mean_loss(source: Source, logits: Tensor, targets: WeightedTargets) -> Tensor:
    """Returns the mean loss of a batch; mixed targets are weighted."""
    parts = [
        weight * source.loss(logits, target) if weight != 1 else source.loss(logits, target)
        for weight, target in targets
    ]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum()


class SharedSource(NamedTuple):
    """One source of the images of all students that are trained together, so that a step gathers, augments and
    compares them at once."""

    source: Source
    size: int
    """Number of images of each student's epoch."""
    offsets: list[int]
    """Position of each student's first image in ``source``."""

    @classmethod
    def of(cls, students: Sequence[Student], recipe: TrainConfig) -> SharedSource | None:
        """Returns the source of all students; None where each needs its own.

        Images that are mixed or that belong together in groups or views are prepared for each student.
        """
        sources = [student.source for student in students]
        first = sources[0]
        if recipe.batch_norm_group or recipe.cutmix or any(source.per_view for source in sources):
            return None
        is_same = all(source is first for source in sources)
        # Not of a derived class, whose images may differ between students.
        if is_same or all(type(s) is TaskSource and s.task is getattr(first, "task", None) for s in sources):
            return cls(first, first.size, [0] * len(sources))
        fixed = [source for source in sources if isinstance(source, FixedSource)]
        labels = [source.labels for source in fixed if isinstance(source.labels, HardLabels)]
        if len(labels) < len(sources) or len({(each.classes, each.smoothing) for each in labels}) > 1:
            return None
        classes = torch.cat([each.targets(source.ids) for each, source in zip(labels, fixed)])
        merged = HardLabels(classes, labels[0].classes, labels[0].smoothing)
        images = torch.cat([source.images for source in fixed])
        return cls(FixedSource(images, merged), first.size, [first.size * k for k in range(len(sources))])

    def batch(
        self, students: Sequence[Student], recipe: TrainConfig, step: int
    ) -> tuple[Tensor, Tensor, Tensor, list[int]]:
        """Returns the batches of ``step`` of all K students: images (K,B,C,H,W), targets (K * B, ...), the images
        before augmentation, and the sizes of the groups of a batch."""
        ids = [
            batch_ids(student.seed, self.size, recipe.batch, step) + offset
            for student, offset in zip(students, self.offsets)
        ]
        clean, targets = self.source.batch(torch.cat(ids), step // epoch_steps(self.size, recipe.batch))
        images = _augment(clean, recipe, [student.seed for student in students], step)
        stacked = len(students), len(ids[0])
        return images.unflatten(0, stacked), targets, clean.unflatten(0, stacked), [len(ids[0])]


def _augment(images: Tensor, recipe: TrainConfig, seeds: Sequence[int], step: int) -> Tensor:
    """Augments the images of one or several students, each with the draws of its own seed."""
    if recipe.augment is None:
        return images
    rows, size = len(images) // len(seeds), (images.shape[-2], images.shape[-1])
    streams = [rng.Draws(seed, "augment", step) for seed in seeds]
    if isinstance(recipe.augment, CropViews):
        views = [recipe.augment.draw(draws, rows, size) for draws in streams]
        return recipe.augment.apply(images, ViewBoxes.concatenate(views).to(images.device))
    if isinstance(recipe.augment, ImagePolicy):
        return recipe.augment.apply(images, torch.cat([recipe.augment.draw(draws, rows) for draws in streams]))
    parameters = [recipe.augment.draw(draws, rows, size, groups=1) for draws in streams]
    return recipe.augment.apply(images, AugmentationParameters.concatenate(parameters))
