"""Plain transcriptions of published distillation steps, for timing ours against them in the same run.

Written by us from descriptions of the procedures (papers and released settings); no released code is copied. What makes
the published steps what they are is kept: fp32, one class after the other, a network built anew for each step, a
normalised float training set in memory, a permutation of the whole class for each batch, one read of the loss a step.
Where the releases are needlessly slow in a way that has nothing to do with the procedure (a Python loop that builds
affine matrices, random parameters drawn twice, crops gathered pixel by pixel), the faster plain way is taken, so the
ratios printed are on the cautious side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condense.augment import OPERATIONS, Parameters
from condense.tasks import Task

View = tuple[str, tuple[float, ...]]
"""One DSA operation and its numbers; see :func:`siamese`."""


def convnet(shape: tuple[int, int, int], classes: int, *, depth: int = 3, width: int = 128) -> nn.Sequential:
    """The family's ConvNet with one-channel GroupNorm and torch's default weights, drawn from its global generator.

    Without its last layer, ``net[:-1]``, it gives the embedding (N, width * (H / 2^depth) * (W / 2^depth)).
    """
    channels, height, columns = shape
    layers: list[nn.Module] = []
    for i in range(depth):
        padding = 3 if i == 0 and shape == (1, 28, 28) else 1
        height, columns = (height + 2 * padding - 2) // 2, (columns + 2 * padding - 2) // 2
        layers += [nn.Conv2d(channels, width, 3, padding=padding), nn.GroupNorm(width, width)]
        layers += [nn.ReLU(inplace=True), nn.AvgPool2d(2, 2)]
        channels = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * height * columns, classes))


def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Gives ``target`` the weights of ``source``, a network of the same convolutions, norms and linear layers."""
    for kind in (nn.Conv2d, nn.GroupNorm, nn.Linear):
        pairs = ([layer for layer in net.modules() if isinstance(layer, kind)] for net in (source, target))
        for old, new in zip(*pairs, strict=True):
            new.load_state_dict(old.state_dict())


def random_view(random: np.random.Generator, operations: Sequence[str], size: tuple[int, int]) -> View:
    """One of ``operations``, drawn uniformly, with numbers drawn for images of ``size`` (H, W)."""
    operation = operations[int(random.integers(len(operations)))]
    if operation == "color":
        return operation, (random.random() - 0.5, 2 * random.random(), random.random() + 0.5)
    if operation == "crop":
        reach = [int(0.125 * side + 0.5) for side in size]
        return operation, tuple(int(random.integers(-k, k + 1)) for k in reach)
    if operation == "cutout":
        squares = [int(0.5 * side + 0.5) for side in size]
        return operation, tuple(int(random.integers(h + 1 - s % 2)) for h, s in zip(size, squares))
    if operation == "flip":
        return operation, (float(random.random() < 0.5),)
    if operation == "scale":
        return operation, tuple(random.uniform(1 / 1.2, 1.2, 2).tolist())
    return operation, (float(np.deg2rad(random.uniform(-15, 15))),)


def same_view(views: Parameters, row: int) -> View:
    """The product's drawn operation of ``row`` (its ``dsa`` variant) as a :data:`View`."""
    operation = OPERATIONS[int(views.operation[row])]
    numbers = {
        "color": torch.stack([views.brightness[row], views.saturation[row], views.contrast[row]]),
        "crop": views.shift[row],
        "cutout": views.centre[row],
        "flip": views.mirrored[row : row + 1],
        "scale": views.zoom[row],
        "rotate": torch.deg2rad(views.angle[row : row + 1]),
    }
    return operation, tuple(numbers[operation].tolist())


def siamese(images: Tensor, view: View) -> Tensor:
    """All ``images`` (N,C,H,W) changed by the same operation with the same numbers, differentiable in the pixels.

    color: brightness added, factors of saturation and contrast; crop: (dy, dx); cutout: centre (y, x) of the square;
    flip: 1 mirrors; scale: (sx, sy); rotate: radians.
    """
    operation, numbers = view
    height, width = images.shape[2:]
    if operation == "color":
        brightness, saturation, contrast = numbers
        images = images + brightness
        mean = images.mean(1, keepdim=True)
        images = (images - mean) * saturation + mean
        mean = images.mean((1, 2, 3), keepdim=True)
        return (images - mean) * contrast + mean
    if operation == "crop":
        dy, dx = map(int, numbers)
        return F.pad(images, (-dx, dx, -dy, dy))
    if operation == "cutout":
        (top, bottom), (left, right) = (
            (max(int(c) - s // 2, 0), max(int(c) - s // 2 + s, 0))
            for c, s in zip(numbers, (int(0.5 * height + 0.5), int(0.5 * width + 0.5)))
        )
        mask = torch.ones(height, width, device=images.device)
        mask[top:bottom, left:right] = 0
        return images * mask
    if operation == "flip":
        return images.flip(3) if numbers[0] else images
    if operation == "scale":
        rows = [[numbers[0], 0.0, 0.0], [0.0, numbers[1], 0.0]]
    else:
        cos, sin = float(np.cos(numbers[0])), float(np.sin(numbers[0]))
        rows = [[cos, -sin, 0.0], [sin, cos, 0.0]]
    theta = torch.tensor(rows, device=images.device).expand(len(images), 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=True)
    return F.grid_sample(images, grid, align_corners=True)


@dataclass(frozen=True)
class Draws:
    """The draws of one of the product's steps, for a published step to use in place of its own."""

    network: nn.Module
    """Holds the weights, in a network of the same layers; see :func:`copy_weights`."""
    ids: Sequence[np.ndarray]
    """Rows of the train split, for each class."""
    views: Parameters
    """One row for each class."""


class DM:
    """The published loop of distribution matching (Zhao & Bilen, WACV 2023), one :meth:`step` at a time.

    Args:
        task: the real data, served from the CPU; its normalised train images are put on ``device`` at once.
        images: the start, (classes * ipc, C, H, W) in training space, ordered by class.
        operations: DSA operations in the lottery.
        depth: blocks of the ConvNet; ``width`` its channels.

    Attributes:
        images: the synthetic pixels, a leaf on the device.
    """

    def __init__(
        self,
        task: Task,
        images: Tensor,
        *,
        device: torch.device,
        lr_img: float = 1.0,
        momentum: float = 0.5,
        batch_real: int = 256,
        operations: Sequence[str] = OPERATIONS,
        depth: int = 3,
        width: int = 128,
        seed: int = 0,
    ) -> None:
        self.shape, self.classes, self.device = task.shape, task.num_classes, device
        self.batch_real, self.operations, self.depth, self.width = batch_real, operations, depth, width
        self.data = task.batch(torch.arange(len(task.train))).to(device)
        self.class_ids = [np.flatnonzero(task.train.labels == c) for c in range(task.num_classes)]
        self.images = images.detach().to(device).clone().requires_grad_()
        self.ipc = len(images) // task.num_classes
        self.optimizer = torch.optim.SGD([self.images], lr=lr_img, momentum=momentum)
        self.random = np.random.default_rng(seed)
        self.loss = 0.0
        """Loss of the last step, a mean over classes."""

    def step(self, draws: Draws | None = None) -> None:
        """One outer step, with random draws of its own unless ``draws`` are given."""
        net = convnet(self.shape, self.classes, depth=self.depth, width=self.width).to(self.device)
        if draws is not None:
            copy_weights(draws.network, net)
        net.train()
        for parameter in net.parameters():
            parameter.requires_grad = False
        embed = net[:-1]
        loss = torch.zeros((), device=self.device)
        for c in range(self.classes):
            if draws is None:
                ids = self.random.permutation(self.class_ids[c])[: self.batch_real]
                view = random_view(self.random, self.operations, self.shape[1:])
            else:
                ids, view = draws.ids[c], same_view(draws.views, c)
            real = siamese(self.data[torch.from_numpy(ids).to(self.device)], view)
            fake = siamese(self.images[c * self.ipc : (c + 1) * self.ipc], view)
            real_features = embed(real).detach()
            fake_features = embed(fake)
            loss = loss + (real_features.mean(0) - fake_features.mean(0)).square().sum()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.loss = loss.item() / self.classes
