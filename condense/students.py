"""The loop that trains networks on a small or a large set: evaluated students, and later experts and teachers.

Students of one architecture are trained either in lock-step as one stacked network (``torch.func``), which fills a GPU
with many small steps, or one after the other. The maths is the same; ``pick_together`` says which is faster where.
Every draw is keyed by the student's own seed and step, so neither the number of students nor the way they are batched
changes any.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from condense import rng
from condense.augment import Augmentation
from condense.labels import HardLabels, Labels
from condense.networks import Network
from condense.run import fast
from condense.tasks import Task

TEST_CHUNK = 256


class Source(Protocol):
    """What a student learns from: ``size`` images in training space with targets and the loss that goes with them."""

    size: int

    def batch(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B,C,H,W) and targets of positions ``ids``, on the device."""

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean loss of a batch."""


class FixedSource:
    """Images (N,C,H,W) held in memory, with a label provider indexed by ``ids`` (the stored image of each)."""

    def __init__(self, images: Tensor, labels: Labels, ids: Tensor | None = None) -> None:
        self.images, self.labels = images, labels
        self.ids = torch.arange(len(images), device=images.device) if ids is None else ids.to(images.device)
        self.size = len(images)

    def batch(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        ids = ids.to(self.images.device)
        return self.images[ids], self.labels.targets(self.ids[ids])

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return self.labels.loss(logits, targets)


class TaskSource:
    """All real training images, hard labels, served by the task."""

    def __init__(self, task: Task, device: torch.device) -> None:
        self.task = task
        self.labels = HardLabels(torch.as_tensor(task.train.labels).to(device), task.num_classes)
        self.size = len(task.train.labels)

    def batch(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.task.batch(ids), self.labels.targets(ids.to(self.labels.labels.device))

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return self.labels.loss(logits, targets)


@dataclass(frozen=True)
class Recipe:
    """How a student is trained."""

    steps: int
    """Optimizer steps."""
    batch: int
    """Images per step; a smaller set is one batch. The last batch of a pass may be smaller."""
    lr: float
    """Learning rate of SGD."""
    momentum: float
    """Momentum of SGD."""
    weight_decay: float
    """L2 penalty on all parameters."""
    drops: tuple[float, ...] = (0.5,)
    """Fractions of the steps after which the learning rate is multiplied by ``drop_factor``; momentum is kept."""
    drop_factor: float = 0.1
    """Factor of each drop."""
    augment: Augmentation | None = None
    """Drawn per step: one operation for the batch, parameters for each image."""

    def rate(self, step: int) -> float:
        """Learning rate at ``step``."""
        return self.lr * self.drop_factor ** sum(step >= fraction * self.steps for fraction in self.drops)


@dataclass
class Student:
    """A network with what it learns from and the seed of its shuffles and augmentations."""

    network: Network
    source: Source
    seed: int


def train(
    students: Sequence[Student],
    recipe: Recipe,
    *,
    device: torch.device,
    precision: str = "fp32",
    together: bool | None = None,
    report: Callable[[int], None] | None = None,
) -> None:
    """Trains all students in place, on ``device``, and leaves them in train mode.

    Args:
        together: stacked in lock-step (needs equal architectures and sources of equal size); None picks by device.
        report: called with the number of student steps that are done, of ``len(students) * recipe.steps``.
    """
    for student in students:
        student.network.to(device).train()
    if together is None:
        together = pick_together(device)
    equal = len({student.source.size for student in students}) == 1
    drops = any("drop" in type(module).__name__.lower() for module in students[0].network.modules())
    if together and equal and not drops and len(students) > 1:  # dropout is keyed by student, so these go one by one
        try:
            _train_stacked(students, recipe, device, precision, report)
            return
        except torch.OutOfMemoryError:  # the students themselves are untouched until the end
            torch.cuda.empty_cache()
    for k, student in enumerate(students):
        _train_one(student, recipe, device, precision, report and functools.partial(_shift, report, k * recipe.steps))


def pick_together(device: torch.device) -> bool:
    """Stacked on a GPU, where launches rule; one after the other on a CPU, where grouped convolutions are slower."""
    return device.type == "cuda"


def _shift(report: Callable[[int], None], offset: int, done: int) -> None:
    report(offset + done)


def batch_ids(seed: int, size: int, batch: int, step: int) -> Tensor:
    """Positions of the images of ``step``: consecutive parts of a fresh permutation for each pass over the set."""
    per_pass = -(-size // batch)
    epoch, part = divmod(step, per_pass)
    return _pass_order(seed, size, epoch)[part * batch : (part + 1) * batch]


@functools.lru_cache(maxsize=64)
def _pass_order(seed: int, size: int, epoch: int) -> Tensor:
    return rng.Draws(seed, "shuffle", epoch).permutation(size)


def _augmented(images: Tensor, student: Student, recipe: Recipe, step: int) -> Tensor:
    if recipe.augment is None:
        return images
    height, width = images.shape[-2:]
    draws = rng.Draws(student.seed, "augment", step)
    return recipe.augment.apply(images, recipe.augment.draw(draws, len(images), (height, width), groups=1))


def _optimizer(parameters: Sequence[Tensor], recipe: Recipe) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)


def _train_one(
    student: Student, recipe: Recipe, device: torch.device, precision: str, report: Callable[[int], None] | None
) -> None:
    optimizer = _optimizer(list(student.network.parameters()), recipe)
    with rng.seeded(student.seed, "dropout", device=device):
        for step in range(recipe.steps):
            images, targets = student.source.batch(batch_ids(student.seed, student.source.size, recipe.batch, step))
            images = _augmented(images, student, recipe, step)
            with fast(device, precision):
                logits = student.network(images)
            optimizer.zero_grad()
            student.source.loss(logits.float(), targets).backward()
            optimizer.param_groups[0]["lr"] = recipe.rate(step)
            optimizer.step()
            if report is not None:
                report(step + 1)


def _train_stacked(
    students: Sequence[Student],
    recipe: Recipe,
    device: torch.device,
    precision: str,
    report: Callable[[int], None] | None,
) -> None:
    """K networks as one: parameters (K, ...), batches (K, B, ...), the sum of K losses has K separate gradients."""
    nets = [student.network for student in students]
    parameters, buffers = torch.func.stack_module_state(nets)
    shell = copy.deepcopy(nets[0])
    leaves = {name: value.detach().requires_grad_() for name, value in parameters.items()}
    optimizer = _optimizer(list(leaves.values()), recipe)

    def forward(weights: dict[str, Tensor], state: dict[str, Tensor], images: Tensor) -> Tensor:
        return torch.func.functional_call(shell, (weights, state), (images,))

    stacked = torch.func.vmap(forward)
    for step in range(recipe.steps):
        pairs = [s.source.batch(batch_ids(s.seed, s.source.size, recipe.batch, step)) for s in students]
        images = torch.stack([_augmented(pair[0], s, recipe, step) for pair, s in zip(pairs, students)])
        with fast(device, precision):
            logits = stacked(leaves, buffers, images)
        losses = [s.source.loss(logits[k].float(), pairs[k][1]) for k, s in enumerate(students)]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.param_groups[0]["lr"] = recipe.rate(step)
        optimizer.step()
        if report is not None:
            report((step + 1) * len(students))
    with torch.no_grad():
        for k, net in enumerate(nets):
            for name, parameter in net.named_parameters():
                parameter.copy_(leaves[name][k])
            for name, buffer in net.named_buffers():
                buffer.copy_(buffers[name][k])


@torch.no_grad()
def accuracy(network: Network, task: Task, *, device: torch.device, precision: str = "fp32") -> float:
    """Fraction of the task's test images that the network, put into eval mode, gets right."""
    network.to(device).eval()
    labels = torch.as_tensor(task.test.labels).to(device)
    right = torch.zeros((), dtype=torch.int64, device=device)
    for ids in torch.arange(len(labels)).split(TEST_CHUNK):
        with fast(device, precision):
            embedding = network.embed(task.test_batch(ids))
        guesses = network.classify(embedding.float()).argmax(1)  # bf16 logits would tie, in favour of low classes
        right += (guesses == labels[ids.to(device)]).sum()
    return float(right) / len(labels)
