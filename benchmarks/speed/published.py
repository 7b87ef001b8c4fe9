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
from typing import Any

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


class _Loop:
    """What the published loops share: data in memory, images, their optimiser and the draws of a step.

    Args:
        task: the real data, served from the CPU; its normalised train images are put on ``device`` at once.
        images: the start, (classes * ipc, C, H, W) in training space, ordered by class.
        operations: DSA operations in the lottery; none where empty.
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
        self.labels = torch.arange(self.classes, device=device).repeat_interleave(self.ipc)
        self.optimizer = torch.optim.SGD([self.images], lr=lr_img, momentum=momentum)
        self.random = np.random.default_rng(seed)
        self.loss = 0.0
        """Loss of the last step, a mean over classes."""

    def network(self, draws: Draws | None) -> nn.Sequential:
        """A new random network in train mode, with the weights of ``draws`` where given."""
        net = convnet(self.shape, self.classes, depth=self.depth, width=self.width).to(self.device)
        if draws is not None:
            copy_weights(draws.network, net)
        return net.train()

    def batches(self, c: int, draws: Draws | None) -> tuple[Tensor, Tensor]:
        """Real and synthetic images of class ``c`` under one view, drawn here unless ``draws`` are given."""
        if draws is None:
            ids = self.random.permutation(self.class_ids[c])[: self.batch_real]
        else:
            ids = draws.ids[c]
        real = self.data[torch.from_numpy(ids).to(self.device)]
        fake = self.images[c * self.ipc : (c + 1) * self.ipc]
        if not self.operations:
            return real, fake
        if draws is None:
            view = random_view(self.random, self.operations, self.shape[1:])
        else:
            view = same_view(draws.views, c)
        return siamese(real, view), siamese(fake, view)

    def update(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.loss = loss.item() / self.classes


class DM(_Loop):
    """The published loop of distribution matching (Zhao & Bilen, WACV 2023), one :meth:`step` at a time."""

    def step(self, draws: Draws | None = None) -> None:
        """One outer step, with random draws of its own unless ``draws`` are given."""
        net = self.network(draws)
        for parameter in net.parameters():
            parameter.requires_grad = False
        embed = net[:-1]
        loss = torch.zeros((), device=self.device)
        for c in range(self.classes):
            real, fake = self.batches(c, draws)
            real_features = embed(real).detach()
            fake_features = embed(fake)
            loss = loss + (real_features.mean(0) - fake_features.mean(0)).square().sum()
        self.update(loss)


class DataDAM(_Loop):
    """The published loop of attention matching (Sajedi, Khaki et al., ICCV 2023) with the paper's power.

    As released, all classes pass at once, and hooks keep every activation.
    """

    power = 4.0
    mmd_weight = 0.01

    def step(self, draws: Draws | None = None) -> None:
        """One outer step, with random draws of its own unless ``draws`` are given."""
        net = self.network(draws)
        for parameter in net.parameters():
            parameter.requires_grad = False
        pairs = [self.batches(c, draws) for c in range(self.classes)]
        sizes = [len(real) for real, _ in pairs]
        kept: list[Tensor] = []
        hooks = [
            layer.register_forward_hook(lambda _layer, _inputs, output: kept.append(output.clone()))
            for layer in net
            if isinstance(layer, nn.ReLU)
        ]
        real_features = net[:-1](torch.cat([real for real, _ in pairs])).detach()
        real_maps, kept[:] = [activation.detach() for activation in kept], []
        fake_features = net[:-1](torch.cat([fake for _, fake in pairs]))
        for hook in hooks:
            hook.remove()
        loss = self.mmd_weight * self._distance(real_features, fake_features, sizes)
        for real_map, fake_map in zip(real_maps[:-1], kept[:-1]):
            loss = loss + self._distance(self._attention(real_map), self._attention(fake_map), sizes)
        self.update(loss)

    def _attention(self, maps: Tensor) -> Tensor:
        return F.normalize(maps.abs().pow(self.power).sum(1).flatten(1), dim=1)

    def _distance(self, real: Tensor, fake: Tensor, sizes: Sequence[int]) -> Tensor:
        total = torch.zeros((), device=self.device)
        for a, b in zip(real.split(list(sizes)), fake.split(self.ipc)):
            total = total + (a.mean(0) - b.mean(0)).square().sum()
        return total


class DC(_Loop):
    """The published loop of gradient matching (Zhao, Mopuri & Bilen, ICLR 2021), with a view per class that of DSA.

    Args:
        outer: matching steps per network.
        inner: epochs of training the network on the images between two of them.
    """

    together = False
    """Whether the gradients of all classes are averaged before they are compared, as DCC does after its warm-up."""

    def __init__(self, *arguments: Any, outer: int, inner: int, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.outer, self.inner, self.made = outer, inner, 0

    def step(self, draws: Draws | None = None) -> None:
        """One matching step and, between those of one network, its training; draws of its own unless given."""
        if self.made % self.outer == 0:
            self.net = self.network(draws)
        parameters = list(self.net.parameters())
        loss = torch.zeros((), device=self.device)
        sums = [torch.zeros_like(parameter) for parameter in parameters]
        seen = []
        for c in range(self.classes):
            real, fake = self.batches(c, draws)
            truth = torch.full((len(real),), c, device=self.device)
            gradients = torch.autograd.grad(F.cross_entropy(self.net(real), truth), parameters)
            target = [gradient.detach().clone() for gradient in gradients]
            if self.together:
                sums = [total + gradient / self.classes for total, gradient in zip(sums, target)]
                seen.append(fake)
                continue
            own = F.cross_entropy(self.net(fake), self.labels[: self.ipc] * 0 + c)
            loss = loss + self._distance(target, torch.autograd.grad(own, parameters, create_graph=True))
        if self.together:
            whole = F.cross_entropy(self.net(torch.cat(seen)), self.labels)
            loss = self._distance(sums, torch.autograd.grad(whole, parameters, create_graph=True))
        self.update(loss)
        self.made += 1
        if self.made % self.outer:
            self._train()

    def _distance(self, real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
        """Row-wise cosine distances of all weights but vectors, summed."""
        total = torch.zeros((), device=self.device)
        for a, b in zip(real, fake):
            if a.dim() == 1:
                continue
            a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
            cosine = (a * b).sum(-1) / (torch.norm(a, dim=-1) * torch.norm(b, dim=-1) + 1e-6)
            total = total + (1 - cosine).sum()
        return total

    def _train(self) -> None:
        """Epochs of plain SGD on the images, augmented where the method augments, in batches of 256."""
        images = self.images.detach().clone()
        optimizer = torch.optim.SGD(self.net.parameters(), lr=0.01)
        for _ in range(self.inner):
            order = torch.from_numpy(self.random.permutation(len(images))).to(self.device)
            for ids in order.split(256):
                batch = images[ids]
                if self.operations:  # with the numbers of one draw for all images, which is faster than one each
                    batch = siamese(batch, random_view(self.random, self.operations, self.shape[1:]))
                loss = F.cross_entropy(self.net(batch), self.labels[ids])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                loss.item()


class DCC(DC):
    """The published loop of class-averaged gradient matching (Lee et al., ICML 2022), after its warm-up."""

    together = True
