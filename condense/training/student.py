"""Student and what it learns from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from condense.data import Task
from condense.labels import HardLabels, Labels
from condense.networks import Network


class Source(Protocol):
    """What a student learns from: ``size`` images in training space with targets and the loss that goes with them."""

    size: int
    per_view: bool
    """True where the images come augmented, as the targets need them, so that the recipe's augmentation is left out."""

    def batch(self, ids: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """Images (B,C,H,W) and targets of positions ``ids`` in pass ``epoch`` over the set, on the device."""

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean loss of a batch."""


class FixedSource:
    """Images (N,C,H,W) held in memory, with a label provider indexed by ``ids`` (the stored image of each)."""

    def __init__(self, images: Tensor, labels: Labels, ids: Tensor | None = None) -> None:
        self.images, self.labels = images, labels
        self.ids = torch.arange(len(images), device=images.device) if ids is None else ids.to(images.device)
        self.size, self.per_view = len(images), labels.per_view

    def batch(self, ids: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        ids = ids.to(self.images.device)
        if self.per_view:  # such labels have one image each
            return self.labels.shown(self.images, ids, epoch)
        return self.images[ids], self.labels.targets(self.ids[ids])

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return self.labels.loss(logits, targets)


class TaskSource:
    """All real training images, hard labels, served by the task."""

    per_view = False

    def __init__(self, task: Task, device: torch.device) -> None:
        self.task = task
        self.labels = HardLabels(torch.as_tensor(task.train.labels).to(device), task.num_classes)
        self.size = len(task.train.labels)

    def batch(self, ids: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        return self.task.batch(ids), self.labels.targets(ids.to(self.labels.labels.device))

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return self.labels.loss(logits, targets)


@dataclass
class Student:
    """A network with what it learns from and the seed of its shuffles and augmentations."""

    network: Network
    source: Source
    seed: int


Watch = Callable[[int, int, Mapping[str, Tensor]], None]
"""Looks on while students are trained; see :func:`train`."""


@dataclass
class Work:
    """One training step of one network, or of K stacked ones, as an update sees it."""

    weights: list[Tensor]
    """The leaves, which require grad; with a leading axis of networks where ``stacked``."""
    stacked: bool
    step: int
    """Steps done before this one."""
    epoch: int
    """Pass over the data that the step belongs to, from 0."""
    clean: Tensor
    """The images before augmentation and mixing, (B,C,H,W), or (K,B,C,H,W) where ``stacked``."""
    loss: Callable[[], Tensor]
    """The sum over networks of the mean loss on the batch, at the weights as they now are. An update may move these in
    place, under ``no_grad``, and must put them back bit for bit. In train mode each call moves running statistics."""
    forward: Callable[[Tensor], Tensor]
    """Images shaped like ``clean`` to float32 logits, (B,classes) or (K,B,classes), at the weights as they now are."""


Update = Callable[[Work], Sequence[Tensor]]
"""Gives a gradient for each of ``work.weights``, along which the optimiser then steps. Its ``str`` must say all that it
does, as it tells one training from another. Norms over weights it takes for each network alone."""

Targets = list[tuple[float, Tensor]]
"""Targets of a batch with the weight of each in its loss; more than one where images were mixed."""
