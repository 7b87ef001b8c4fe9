"""Students, their data sources, and the interface of gradient rules."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from condense import rng
from condense.data import Task
from condense.device import upload
from condense.labels import HardLabels, Labels
from condense.networks import Network
from condense.selection import alternating_permutation


class Source(Protocol):
    """Data source of a student: images in training space with targets and their loss."""

    size: int
    """Number of images of an epoch."""
    per_view: bool
    """Whether the images are already augmented, so that the recipe's augmentation is not applied."""

    def batch(self, ids: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """Returns images (B,C,H,W) and targets of positions ``ids`` in ``epoch``, on the device."""

    def labelled_groups(self, epoch: int, size: int) -> list[Tensor] | None:
        """Returns the groups of at most ``size`` positions that were labelled together for ``epoch``, if any."""

    def mixed_batches(self, epoch: int, size: int) -> list[Tensor] | None:
        """Returns the batches of ``size`` positions that are mixed among themselves in ``epoch``, if any."""

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Returns the mean loss of a batch."""


class FixedSource:
    """Images (N,C,H,W) in memory, with a label provider.

    Args:
        images: In training space, on the device.
        labels: Label provider.
        ids: Index of each image's label, int64 (N,). Default: its position.
    """

    def __init__(self, images: Tensor, labels: Labels, ids: Tensor | None = None) -> None:
        self.images, self.labels = images, labels
        self.ids = torch.arange(len(images), device=images.device) if ids is None else ids.to(images.device)
        self.size, self.per_view = len(images), labels.per_view

    def batch(self, ids: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        ids = upload(ids, self.images.device)
        if self.per_view:  # each per-view label belongs to one image
            return self.labels.training_batch(self.images, ids, epoch)
        return self.images[ids], self.labels.targets(self.ids[ids])

    def labelled_groups(self, epoch: int, size: int) -> list[Tensor] | None:
        return self.labels.labelled_groups(epoch, size) if self.per_view else None

    def mixed_batches(self, epoch: int, size: int) -> list[Tensor] | None:
        return self.labels.mixed_batches(epoch, size) if self.per_view else None

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return self.labels.loss(logits, targets)


class TaskSource:
    """All real training images of a task with their classes."""

    per_view = False

    def __init__(self, task: Task, device: torch.device) -> None:
        self.task = task
        self.labels = HardLabels(torch.as_tensor(task.train.labels).to(device), task.num_classes)
        self.size = len(task.train.labels)

    def batch(self, ids: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        return self.task.batch(ids), self.labels.targets(upload(ids, self.labels.labels.device))

    def labelled_groups(self, epoch: int, size: int) -> list[Tensor] | None:
        return None

    def mixed_batches(self, epoch: int, size: int) -> list[Tensor] | None:
        return None

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return self.labels.loss(logits, targets)


class ResampledSource(TaskSource):
    """A new subset of the real training images with their classes in each epoch: RS2 without replacement.

    The subsets are consecutive parts of a permutation in which classes alternate. When it has too few images left for
    another subset, a new permutation begins.

    Args:
        task: The real data.
        size: Images of an epoch; at most all.
        parts: Key of the draws.
        device: Device of the labels.
    """

    def __init__(self, task: Task, size: int, parts: tuple[int | str, ...], device: torch.device) -> None:
        super().__init__(task, device)
        self.size = min(size, self.size)
        self._permutation = functools.lru_cache(maxsize=1)(
            lambda number: alternating_permutation(task.train.labels, rng.Draws(*parts, number))
        )

    def batch(self, ids: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        permutation, position = divmod(epoch, len(self.task.train) // self.size)
        return super().batch(self._permutation(permutation)[position * self.size + ids], epoch)


@dataclass
class Student:
    """A network, its data source, and the seed of its shuffles and augmentations."""

    network: Network
    source: Source
    seed: int


StepCallback = Callable[[int, int, Mapping[str, Tensor]], None]
"""Callback of a training; see :func:`train`."""


@dataclass
class TrainingStep:
    """One training step of one network, or of K stacked ones: the argument of an :data:`Update`."""

    weights: list[Tensor]
    """Leaf tensors that require grad; with a leading axis of networks if ``stacked``."""
    stacked: bool
    """Whether the step trains K stacked networks."""
    step: int
    """Number of completed steps."""
    epoch: int
    """Epoch of the step, from 0."""
    clean: Tensor
    """The images before augmentation and mixing, (B,C,H,W), or (K,B,C,H,W) if ``stacked``."""
    loss: Callable[[], Tensor]
    """Computes the sum over networks of the mean loss on the batch, at the current weights. An update may change these
    in place, under ``no_grad``, and must restore them bit for bit. In train mode each call updates running
    statistics."""
    forward: Callable[[Tensor], Tensor]
    """Maps images shaped like ``clean`` to float32 logits, (B,classes) or (K,B,classes), at the current weights."""


GradientRule = Callable[[TrainingStep], Sequence[Tensor]]
"""Gradient rule: returns a gradient for each of ``work.weights``, which the optimiser uses. Its ``str`` must contain
all its settings, because it is part of cache keys. Norms over weights must be computed for each network separately."""

WeightedTargets = list[tuple[float, Tensor]]
"""Targets of a batch with their weights in its loss; several if images were mixed."""
