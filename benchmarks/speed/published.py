"""Plain transcriptions of published distillation steps, for timing ours against them in the same run.

Written by us from descriptions of the procedures (papers and released settings); no released code is copied. What makes
the published steps what they are is kept: fp32, one class after the other, a network built for each step, a
normalised float training set in memory, a permutation of the whole class for each batch, one read of the loss a step.
Where the releases are needlessly slow in a way that has nothing to do with the procedure (a Python loop that builds
affine matrices, random parameters drawn twice, crops gathered pixel by pixel where one shift serves all images), the
faster plain way is taken, so the ratios printed are on the cautious side.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from condense.augment import OPERATIONS, AugmentationParameters
from condense.data import Task

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


def same_view(views: AugmentationParameters, row: int) -> View:
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
class StepInputs:
    """The draws of one of the product's steps, for a published step to use in place of its own."""

    network: nn.Module
    """Holds the weights, in a network of the same layers; see :func:`copy_weights`."""
    ids: Sequence[np.ndarray]
    """Rows of the train split, for each class."""
    views: AugmentationParameters
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

    def network(self, draws: StepInputs | None) -> nn.Sequential:
        """A new random network in train mode, with the weights of ``draws`` where given."""
        net = convnet(self.shape, self.classes, depth=self.depth, width=self.width).to(self.device)
        if draws is not None:
            copy_weights(draws.network, net)
        return net.train()

    def batches(self, c: int, draws: StepInputs | None) -> tuple[Tensor, Tensor]:
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


class PublishedDM(_Loop):
    """The published loop of distribution matching (Zhao & Bilen, WACV 2023), one :meth:`step` at a time."""

    def step(self, draws: StepInputs | None = None) -> None:
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
    """The published loop of attention matching (Sajedi, Khaki et al., ICCV 2023) with the released power and scale.

    As released, all classes pass at once, and hooks keep every activation.
    """

    power = 1.0
    mmd_weight = 0.01
    scale = 100.0

    def step(self, draws: StepInputs | None = None) -> None:
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
        self.update(self.scale * loss)

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

    def step(self, draws: StepInputs | None = None) -> None:
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


# -- trajectory matching and its experts ------------------------------------------------------------------------------


ViewTensors = tuple[str, Tensor]
"""One DSA operation and its numbers for each image, (N, k) on the device, as :data:`View` has them for all."""


def random_views(
    random: np.random.Generator, operations: Sequence[str], count: int, size: tuple[int, int], device: torch.device
) -> ViewTensors:
    """One of ``operations``, drawn uniformly, with numbers of their own for ``count`` images of ``size`` (H, W).

    The numbers are drawn on the device, by torch's global generator.
    """
    operation = operations[int(random.integers(len(operations)))]
    unit = torch.rand(3, count, device=device)
    if operation == "color":
        return operation, torch.stack([unit[0] - 0.5, 2 * unit[1], unit[2] + 0.5], 1)
    if operation == "crop":
        reach = [int(0.125 * side + 0.5) for side in size]
        return operation, torch.stack([(u * (2 * k + 1)).floor() - k for u, k in zip(unit, reach)], 1)
    if operation == "cutout":
        places = [side + 1 - int(0.5 * side + 0.5) % 2 for side in size]
        return operation, torch.stack([(u * k).floor() for u, k in zip(unit, places)], 1)
    if operation == "flip":
        return operation, (unit[:1].T < 0.5).float()
    if operation == "scale":
        return operation, 1 / 1.2 + (1.2 - 1 / 1.2) * unit[:2].T
    return operation, torch.deg2rad(30 * unit[:1].T - 15)


def same_views(views: AugmentationParameters, device: torch.device) -> ViewTensors:
    """The product's draw for a batch (one operation, a row for each image) as :data:`Views`."""
    numbers = [same_view(views, row)[1] for row in range(len(views))]
    return same_view(views, 0)[0], torch.tensor(numbers, dtype=torch.float32).to(device)


def augmented(images: Tensor, views: ViewTensors) -> Tensor:
    """``images`` (N,C,H,W), all changed by the same operation but each with its own numbers; see :func:`siamese`."""
    operation, numbers = views
    count, _, height, width = images.shape
    if operation == "color":
        brightness, saturation, contrast = numbers.T[..., None, None, None]
        images = images + brightness
        mean = images.mean(1, keepdim=True)
        images = (images - mean) * saturation + mean
        mean = images.mean((1, 2, 3), keepdim=True)
        return (images - mean) * contrast + mean
    if operation == "crop":
        reach = [int(0.125 * side + 0.5) for side in (height, width)]
        padded = F.pad(images, (reach[1], reach[1], reach[0], reach[0])).permute(0, 2, 3, 1)
        ys, xs = (
            torch.arange(side, device=images.device) + numbers[:, axis : axis + 1].long() + reach[axis]
            for axis, side in enumerate((height, width))
        )
        rows = torch.arange(count, device=images.device)[:, None, None]
        return padded[rows, ys[:, :, None], xs[:, None, :]].permute(0, 3, 1, 2)
    if operation == "cutout":
        inside = []
        for axis, side in enumerate((height, width)):
            square = int(0.5 * side + 0.5)
            offset = torch.arange(side, device=images.device) - numbers[:, axis : axis + 1] + square // 2
            inside.append((offset >= 0) & (offset < square))
        return images * ~(inside[0][:, None, :, None] & inside[1][:, None, None, :])
    if operation == "flip":
        return torch.where(numbers[:, :, None, None] > 0.5, images.flip(3), images)
    theta = torch.zeros(count, 2, 3, device=images.device)
    if operation == "scale":
        theta[:, 0, 0], theta[:, 1, 1] = numbers.T
    else:
        theta[:, 0, 0] = theta[:, 1, 1] = numbers[:, 0].cos()
        theta[:, 1, 0] = numbers[:, 0].sin()
        theta[:, 0, 1] = -theta[:, 1, 0]
    grid = F.affine_grid(theta, list(images.shape), align_corners=True)
    return F.grid_sample(images, grid, align_corners=True)


class MTT:
    """The published loop of trajectory matching (Cazenavette et al., CVPR 2022), all images in each inner step.

    Autograd goes through the whole graph of the student's training. Reading the experts from disk is left out.

    Args:
        images: the start, (classes * ipc, C, H, W) in training space, ordered by class.
        stretch: an expert's weights where students start and those they shall reach, flat in the order of
            :func:`convnet`'s parameters, on the CPU.
        syn_steps: training steps of the student.
        lr_start: its step size at the start, learned at the rate ``lr_lr``.

    Attributes:
        images: the synthetic pixels, a leaf on the device.
        rate: the student's step size, likewise.
        loss: of the last step.
    """

    def __init__(
        self,
        images: Tensor,
        classes: int,
        stretch: tuple[Tensor, Tensor],
        *,
        device: torch.device,
        lr_img: float,
        lr_lr: float,
        lr_start: float,
        momentum: float = 0.5,
        syn_steps: int = 20,
        operations: Sequence[str] = OPERATIONS,
        depth: int = 3,
        width: int = 128,
        seed: int = 0,
    ) -> None:
        channels, height, columns = images.shape[1:]
        self.shape, self.classes, self.device = (channels, height, columns), classes, device
        self.stretch, self.syn_steps, self.operations = stretch, syn_steps, operations
        self.depth, self.width = depth, width
        self.images = images.detach().to(device).clone().requires_grad_()
        self.labels = torch.arange(classes, device=device).repeat_interleave(len(images) // classes)
        self.rate = torch.tensor(lr_start, device=device).requires_grad_()
        self.optimizers = [
            torch.optim.SGD([leaf], lr=rate, momentum=momentum)
            for leaf, rate in ((self.images, lr_img), (self.rate, lr_lr))
        ]
        self.random = np.random.default_rng(seed)
        self.loss = 0.0

    def step(self, draws: Sequence[AugmentationParameters] | None = None) -> None:
        """One outer step, with random draws of its own unless those of each inner step are given."""
        net = convnet(self.shape, self.classes, depth=self.depth, width=self.width).to(self.device).train()
        named = {name: parameter.shape for name, parameter in net.named_parameters()}
        start, goal = (weights.to(self.device) for weights in self.stretch)
        theta = start.clone().requires_grad_()
        for i in range(self.syn_steps):
            ids = torch.arange(len(self.images), device=self.device)
            if draws is None:
                ids = torch.from_numpy(self.random.permutation(len(ids))).to(self.device)
            batch_images = self.images[ids]
            if self.operations:
                if draws is None:
                    views = random_views(self.random, self.operations, len(ids), self.shape[1:], self.device)
                else:
                    views = same_views(draws[i], self.device)
                batch_images = augmented(batch_images, views)
            parts = theta.split([shape.numel() for shape in named.values()])
            weights = {name: part.view(shape) for (name, shape), part in zip(named.items(), parts)}
            loss = F.cross_entropy(torch.func.functional_call(net, weights, (batch_images,)), self.labels[ids])
            (gradient,) = torch.autograd.grad(loss, theta, create_graph=True)
            theta = theta - self.rate * gradient
        loss = (theta - goal).square().sum() / (start - goal).square().sum()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        self.loss = loss.item()


class SRe2L:
    """The published recovery of SRe2L (Yin et al., NeurIPS 2023): one batch of every class after the other, hooks on
    each BatchNorm, fp32. A step is one iteration of each batch, as all of them must be made.

    Args:
        images: the start, (classes * ipc, C, H, W) in training space, ordered by class.
        teacher: a network with BatchNorm2d, in eval mode.
        bounds: the least and the largest value of each channel in training space, (C,) each.
        steps: iterations of the whole run, along which the rate falls.

    Attributes:
        images: the synthetic pixels.
        loss: of the last batch.
    """

    def __init__(
        self,
        images: Tensor,
        classes: int,
        teacher: nn.Module,
        bounds: tuple[Tensor, Tensor],
        *,
        device: torch.device,
        lr_img: float = 0.25,
        bn_weight: float = 0.01,
        first: float = 10.0,
        least: float = 0.08,
        jitter: int = 4,
        steps: int = 1000,
        flip: bool = True,
        seed: int = 0,
    ) -> None:
        self.images, self.classes, self.device = images.detach().to(device).clone(), classes, device
        self.teacher = teacher.to(device).eval().requires_grad_(False)
        self.bounds = [bound.tolist() for bound in bounds]
        self.lr_img, self.bn_weight, self.jitter, self.steps = lr_img, bn_weight, jitter, steps
        self.crop = transforms.Compose(
            [
                transforms.RandomResizedCrop(tuple(images.shape[2:]), (least, 1.0)),
                transforms.RandomHorizontalFlip(0.5 if flip else 0.0),
            ]
        )
        self.terms: list[Tensor] = []
        norms = [layer for layer in self.teacher.modules() if isinstance(layer, nn.BatchNorm2d)]
        for number, layer in enumerate(norms):
            layer.register_forward_hook(self._hook(first if number == 0 else 1.0))
        ipc = len(images) // classes
        self.labels = torch.arange(classes, device=device)
        self.leaves = [self.images[k::ipc].clone().requires_grad_() for k in range(ipc)]
        self.optimizers = [torch.optim.Adam([leaf], lr=lr_img, betas=(0.5, 0.9)) for leaf in self.leaves]
        self.random, self.done, self.loss = np.random.default_rng(seed), 0, 0.0
        torch.manual_seed(seed)

    def _hook(self, weight: float) -> Any:
        def hook(layer: Any, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
            x = inputs[0]
            mean = x.mean([0, 2, 3])
            variance = x.permute(1, 0, 2, 3).contiguous().view(x.shape[1], -1).var(1, unbiased=False)
            gap = torch.norm(layer.running_var - variance, 2) + torch.norm(layer.running_mean - mean, 2)
            self.terms.append(weight * gap)

        return hook

    def step(self, draws: Sequence[tuple[Sequence[int], bool, Sequence[int]]] | None = None) -> None:
        """One iteration of each batch; ``draws``: box (top, left, height, width), mirror and roll of each to repeat."""
        size = list(self.images.shape[2:])
        for k, (leaf, optimizer) in enumerate(zip(self.leaves, self.optimizers)):
            for group in optimizer.param_groups:
                group["lr"] = self.lr_img * (1 + math.cos(math.pi * self.done / self.steps)) / 2
            if draws is None:
                batch_images = self.crop(leaf)
                shift = self.random.integers(0, self.jitter + 1, 2).tolist()
            else:
                box, mirrored, shift = draws[k]
                batch_images = transforms.functional.resized_crop(leaf, *box, size)
                batch_images = transforms.functional.hflip(batch_images) if mirrored else batch_images
            batch_images = torch.roll(batch_images, shifts=tuple(shift), dims=(2, 3))
            optimizer.zero_grad()
            self.terms.clear()
            loss = F.cross_entropy(self.teacher(batch_images), self.labels) + self.bn_weight * sum(self.terms)
            loss.backward()
            optimizer.step()
            for channel, (low, high) in enumerate(zip(*self.bounds)):
                leaf.data[:, channel] = torch.clamp(leaf.data[:, channel], low, high)
            self.images[k :: len(self.leaves)] = leaf.data
            self.loss = loss.item()
        self.done += 1


class _Images(Dataset):
    """A float dataset in memory that serves one image at a time."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]


class Expert:
    """The published training of an expert by plain SGD: one network, fp32, batches of single images put together.

    What each epoch adds, a test of the network and a copy of its weights, is left out.

    Args:
        task: the real data, served from the CPU; all normalised train images are held in its memory.
        gsam: how far FTD's sharpness-aware steps look around and GSAM's coefficient; None for MTT's plain steps.

    Attributes:
        net: the network, in train mode on the device.
        loss: of the last step; ``right``: the share of its images that the network knew.
    """

    def __init__(
        self,
        task: Task,
        *,
        device: torch.device,
        batch: int = 256,
        lr: float = 0.01,
        operations: Sequence[str] = OPERATIONS,
        gsam: tuple[float, float] | None = None,
        depth: int = 3,
        width: int = 128,
        seed: int = 0,
    ) -> None:
        self.size, self.operations, self.gsam, self.device = task.shape[1:], operations, gsam, device
        data = _Images(task.batch(torch.arange(len(task.train))), torch.from_numpy(task.train.labels))
        self.loader = DataLoader(data, batch, shuffle=True)
        self.net = convnet(task.shape, task.num_classes, depth=depth, width=width).to(device).train()
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=lr)
        self.random = np.random.default_rng(seed)
        self.loss = self.right = 0.0

    def train(self, steps: int) -> None:
        """So many steps, from the beginning of an epoch."""
        left = steps
        while left:
            for images, labels in itertools.islice(self.loader, left):
                self.step(images, labels)
                left -= 1

    def step(self, images: Tensor, labels: Tensor, views: ViewTensors | None = None) -> None:
        """One step on a batch from the CPU, with views of its own unless given."""
        images, labels = images.float().to(self.device), labels.long().to(self.device)
        if self.operations:
            views = views or random_views(self.random, self.operations, len(images), self.size, self.device)
            images = augmented(images, views)
        logits = self.net(images)
        loss = F.cross_entropy(logits, labels)
        self.right = (logits.detach().cpu().argmax(1) == labels.cpu()).float().mean().item()
        self.loss = loss.item()
        self.optimizer.zero_grad()
        loss.backward()
        if self.gsam is not None:
            self._sharpen(images, labels, *self.gsam)
        self.optimizer.step()

    def _sharpen(self, images: Tensor, labels: Tensor, rho: float, coefficient: float) -> None:
        """Makes the plain gradients GSAM's, adaptive as FTD has it, one tensor after the other."""
        parameters, plain, moves = list(self.net.parameters()), [], []
        with torch.no_grad():
            length = torch.stack([(p.abs() * _slope(p)).norm() for p in parameters]).norm()
            for p in parameters:
                plain.append(_slope(p).clone())
                moves.append(p.square() * _slope(p) * (rho / (length + 1e-12)))
                p.add_(moves[-1])
        self.optimizer.zero_grad()
        F.cross_entropy(self.net(images), labels).backward()
        with torch.no_grad():
            sharp = [_slope(p) for p in parameters]
            lengths = [torch.stack([slope.norm() for slope in slopes]).norm() for slopes in (plain, sharp)]
            inner = torch.zeros((), device=self.device)
            for before, after in zip(plain, sharp):
                inner = inner + (before * after).sum()
            cosine = inner / (lengths[0] * lengths[1] + 1e-12)
            for p, before, after, move in zip(parameters, plain, sharp, moves):
                after.sub_(coefficient * (before - cosine * lengths[0] * after / (lengths[1] + 1e-12)))
                p.sub_(move)


def _slope(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad
