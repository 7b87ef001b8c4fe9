"""Self-supervised training of teachers: Barlow Twins (Zbontar et al., ICML 2021)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from condense import networks, rng
from condense.augment import Augmentation, AugmentationParameters, CropViews, ViewBoxes, make_augmentation
from condense.data import Task
from condense.device import upload
from condense.engine import Run
from condense.pretraining.pipeline import Architecture
from condense.training import Student, TaskSource, fit_linear_probe


def barlow_twins_loss(first: Tensor, second: Tensor, weight: float) -> Tensor:
    """The sum over pairs of outputs of (c_ii - 1)^2 and of ``weight`` times c_ij^2, where c is the correlation between
    the outputs of two views over the batch.

    Args:
        first: outputs of the first view of each image, (B, D).
        second: outputs of the second view, (B, D).
        weight: weight of the redundancy (the paper's lambda).
    """
    first, second = (
        (z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt()  # an output that is constant has no correlation
        for z in (first, second)
    )
    correlation = first.T @ second / len(first)
    on_diagonal = correlation.diagonal()
    redundancy = correlation.square().sum() - on_diagonal.square().sum()
    return (on_diagonal - 1).square().sum() + weight * redundancy


class TwoViews(TaskSource):
    """All real training images without their classes: a batch holds two views of each image, one half after the other.

    Args:
        task: The real data.
        objective: Views and loss.
        seed: Seed of the views.
        device: Device of the batches.
    """

    per_view = True

    def __init__(self, task: Task, objective: BarlowTwins, seed: int, device: torch.device) -> None:
        super().__init__(task, device)
        self.objective, self.seed, self.key = objective, seed, str(objective)
        self.views = (objective.augment, make_augmentation("color"))

    def batch(self, ids: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        images = self.task.batch(ids)
        # The first image of a batch tells the batches of an epoch apart.
        views = [self._view(images, (self.seed, "view", number, epoch, int(ids[0]))) for number in range(2)]
        return torch.cat(views), upload(ids.repeat(2), images.device)

    def _view(self, images: Tensor, parts: tuple[int | str, ...]) -> Tensor:
        size = (images.shape[2], images.shape[3])
        for number, operation in enumerate(self.views):
            drawn = operation.draw(rng.Draws(*parts, number), len(images), size)
            images = _apply(operation, images, drawn)
        return images

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        first, second = logits.float().chunk(2)
        return barlow_twins_loss(first, second, self.objective.weight)


def _apply(operation: Augmentation | CropViews, images: Tensor, drawn: AugmentationParameters | ViewBoxes) -> Tensor:
    if isinstance(operation, CropViews):
        assert isinstance(drawn, ViewBoxes)
        return operation.apply(images, drawn.to(images.device))
    assert isinstance(drawn, AugmentationParameters)
    return operation.apply(images, drawn)


@dataclass(frozen=True)
class BarlowTwins:
    """Training of a network without classes: its outputs on two views of an image agree, and are not redundant.

    The views are crops and flips (``augment``), then DSA's change of brightness, saturation and contrast. The outputs
    are those of a projector on the features, which is dropped after the training. Both views of a batch pass through
    the network together, so they share batch statistics; in the paper each view has its own.
    """

    augment: Augmentation | CropViews
    """Crops and flips of the views."""
    weight: float
    """Weight of the redundancy."""
    projector: int
    """Width of the three layers of the projector."""

    def student(self, run: Run, source: Task, architecture: Architecture, *purpose: str | int) -> Student:
        """Builds the network of a training; weights, batches and views follow from the run's seed and ``purpose``."""
        with rng.seeded(run.seed, *purpose):
            body = networks.build_network(architecture, source.shape, source.num_classes)
            networks.require_embedding(body, architecture, "Barlow Twins")
            inputs = networks.embedding_size(body, source.shape)
            net = networks.WithHead(body, make_projector(inputs, self.projector))
        seed = rng.key(run.seed, *purpose)
        return Student(net, TwoViews(source, self, seed, run.device), seed)

    @torch.no_grad()
    def finish(self, net: networks.Network, source: Task, device: torch.device, precision: str) -> networks.Network:
        """Returns the trained network without its projector. Its last layer becomes a linear probe, fitted on frozen
        features: it measures their quality, and makes the network one like those that are trained on classes."""
        assert isinstance(net, networks.WithHead)
        probe, last = (
            fit_linear_probe(net.body, source, device=device, precision=precision),
            networks.last_linear(net.body),
        )
        last.weight.copy_(probe.weight)
        if last.bias is not None:
            last.bias.copy_(probe.bias)
        return net.body


def make_projector(inputs: int, width: int) -> nn.Module:
    """The three layers between features and outputs, the first two with BatchNorm and ReLU."""
    return nn.Sequential(
        nn.Linear(inputs, width, bias=False),
        nn.BatchNorm1d(width),
        nn.ReLU(inplace=True),
        nn.Linear(width, width, bias=False),
        nn.BatchNorm1d(width),
        nn.ReLU(inplace=True),
        nn.Linear(width, width, bias=False),
    )
