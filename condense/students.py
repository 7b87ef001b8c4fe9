"""The loop that trains networks on a small or a large set: evaluated students, experts and teachers.

Students of one architecture are trained either in lock-step as one stacked network (``torch.func``), which fills a GPU
with many small steps, or one after the other. The maths is the same; ``pick_together`` says which is faster where.
Every draw is keyed by the student's own seed and step, so neither the number of students nor the way they are batched
changes any.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from condense import rng
from condense.augment import Augmentation, cutmix
from condense.distilled import replacing
from condense.errors import CondenseError, did_you_mean
from condense.labels import HardLabels, Labels, content
from condense.networks import Network, uses_dropout
from condense.run import fast, read_state
from condense.tasks import Task

_log = logging.getLogger(__name__)

STUDENT_VERSION = 2
"""Raised by every change of networks, augmentation or training that alters a student; cached scores and networks depend
on it."""
TEST_CHUNK = 256
CHECKPOINT_SECONDS = 30.0
"""Least time between two checkpoints of a training."""


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


@dataclass(frozen=True)
class Recipe:
    """How a student is trained."""

    steps: int
    """Optimizer steps."""
    batch: int
    """Images per step; a smaller set is one batch. The last batch of a pass may be smaller."""
    lr: float
    """Learning rate at the start."""
    momentum: float
    """Momentum of SGD; AdamW has its own, 0.9 and 0.999."""
    weight_decay: float
    """sgd: L2 penalty on all parameters. adamw: decay, decoupled from the gradient, of weights of two or more axes."""
    drops: tuple[float, ...] = (0.5,)
    """Fractions of the steps after which the learning rate is multiplied by ``drop_factor``; momentum is kept."""
    drop_factor: float = 0.1
    """Factor of each drop."""
    augment: Augmentation | None = None
    """Drawn per step: one operation for the batch, parameters for each image. Left out for per-view labels."""
    cutmix: float = 0.0
    """Probability of CutMix in a step, one box for the batch, whose partners are its own images in another order."""
    optimizer: str = "sgd"
    """sgd or adamw."""
    schedule: str = "drops"
    """drops (see ``drops``) or cosine: the learning rate falls along half a cosine, from step to step."""
    stretch: float = 1.0
    """cosine: the half cosine is so many times as long as the training; at 2 the rate ends at half its start."""
    warmup: float = 0.0
    """Fraction of the steps in which the learning rate also grows linearly, from its first part to the whole."""

    def __post_init__(self) -> None:
        check_rule(self.optimizer, self.schedule, self.stretch)
        if not 0 <= self.warmup <= 1:
            raise CondenseError(f"warmup={self.warmup:g}: must be 0 to 1")

    def __repr__(self) -> str:
        # What a training is known by: a setting that came later is not told where it is as it was done before.
        return f"Recipe({', '.join(f'{name}={value!r}' for name, value in self.known().items())})"

    def known(self) -> dict[str, Any]:
        """Every setting by name, but for those added later that stand at what was done before; keys are made of it."""
        settings = {field.name: (getattr(self, field.name), field.default) for field in fields(self)}
        return {name: value for name, (value, was) in settings.items() if name not in LATER or value != was}

    def rate(self, step: int) -> float:
        """Learning rate at ``step``."""
        if self.schedule == "cosine":
            rate = self.lr / 2 * (1 + math.cos(math.pi * step / (self.steps * self.stretch)))
        else:  # a fraction that was made from whole epochs may lie a rounding above them
            rate = self.lr * self.drop_factor ** sum(step >= fraction * self.steps - 1e-6 for fraction in self.drops)
        grown = (step + 1) / (self.warmup * self.steps) if self.warmup else 1.0
        return rate * grown if grown < 1 else rate


LATER = ("optimizer", "schedule", "stretch", "warmup")
"""Settings of a recipe that came after files and scores had been made that are known by theirs."""
OPTIMIZERS, SCHEDULES = ("sgd", "adamw"), ("drops", "cosine")


def check_rule(optimizer: str, schedule: str, stretch: float = 1.0, prefix: str = "") -> None:
    """Refuses an optimizer or schedule that is none; ``prefix`` begins what messages call the settings.

    Raises:
        CondenseError: one line that names the setting.
    """
    for key, word, words in (("optimizer", optimizer, OPTIMIZERS), ("schedule", schedule, SCHEDULES)):
        if word not in words:
            raise CondenseError(f"{prefix}{key}={word}: unknown{did_you_mean(word, words)}")
    if not stretch >= 1:  # a shorter cosine would rise again before the end
        raise CondenseError(f"{prefix}stretch={stretch:g}: must be at least 1")


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


def train(
    students: Sequence[Student],
    recipe: Recipe,
    *,
    device: torch.device,
    precision: str = "fp32",
    together: bool | None = None,
    report: Callable[[int], None] | None = None,
    checkpoint: Path | None = None,
    watch: Watch | None = None,
    watch_every: int = 1,
    update: Update | None = None,
) -> float:
    """Trains all students in place, on ``device``, and leaves them in train mode.

    Returns the seconds that it took, over all resumptions.

    Args:
        together: stacked in lock-step (needs equal architectures and sources of equal size); None picks by device.
        report: called with the number of student steps that are done, of ``len(students) * recipe.steps``.
        checkpoint: a file for the state in mid-training, written every ``CHECKPOINT_SECONDS`` and removed at the end
            (students trained one by one have one each, numbered). The same call after a kill goes on from it and ends
            with the same bits. A file that is damaged or of another training is ignored.
        watch: called as ``watch(k, step, state)`` with the live weights and buffers of student k after every
            ``watch_every`` steps, before these are in the checkpoint: what a resumption passes over was seen.
        update: what gradients the optimiser steps along; None: those of the mean loss.
    """
    for student in students:
        student.network.to(device).train()
    if together is None:
        together = pick_together(device)
    equal = len({student.source.size for student in students}) == 1
    drops = uses_dropout(students[0].network)
    if together and equal and not drops and len(students) > 1:  # dropout is keyed by student, so these go one by one
        keeper = _Keeper(checkpoint, students, recipe, device, precision, update)
        try:
            _train_stacked(students, recipe, device, precision, report, keeper, watch, watch_every, update)
            keeper.remove()
            return keeper.seconds
        except torch.OutOfMemoryError:  # the students themselves are untouched until the end
            torch.cuda.empty_cache()
            keeper.remove()
    keepers, seconds = [], 0.0
    for k, student in enumerate(students):
        path = checkpoint and (checkpoint.with_name(f"{checkpoint.name}.{k}") if len(students) > 1 else checkpoint)
        keepers.append(_Keeper(path, [student], recipe, device, precision, update, keep_end=len(students) > 1))
        shifted = report and functools.partial(_shift, report, k * recipe.steps)
        watched = watch and functools.partial(watch, k)
        _train_one(student, recipe, device, precision, shifted, keepers[k], watched, watch_every, update)
        seconds += keepers[k].seconds
    for keeper in keepers:  # only now, so that the first students need no second training when the last one is killed
        keeper.remove()
    return seconds


def pick_together(device: torch.device) -> bool:
    """Stacked on a GPU, where launches rule; one after the other on a CPU, where grouped convolutions are slower."""
    return device.type == "cuda"


def _shift(report: Callable[[int], None], offset: int, done: int) -> None:
    report(offset + done)


def steps_per_pass(size: int, batch: int) -> int:
    """Steps in which all of ``size`` images are seen once."""
    return -(-size // batch)


def batch_ids(seed: int, size: int, batch: int, step: int) -> Tensor:
    """Positions of the images of ``step``: consecutive parts of a fresh permutation for each pass over the set."""
    epoch, part = divmod(step, steps_per_pass(size, batch))
    return _pass_order(seed, size, epoch)[part * batch : (part + 1) * batch]


@functools.lru_cache(maxsize=64)
def _pass_order(seed: int, size: int, epoch: int) -> Tensor:
    return rng.Draws(seed, "shuffle", epoch).permutation(size)


Targets = list[tuple[float, Tensor]]
"""Targets of a batch with the weight of each in its loss; more than one where images were mixed."""


def _batch(
    student: Student, recipe: Recipe, step: int, device: torch.device, precision: str
) -> tuple[Tensor, Targets, Tensor]:
    """Images and targets of ``step``, augmented and mixed by the recipe or as the labels' own views; then the images
    before that."""
    source = student.source
    ids = batch_ids(student.seed, source.size, recipe.batch, step)
    with fast(device, precision if source.per_view else "fp32"):  # live teachers answer in it
        clean, targets = source.batch(ids, step // steps_per_pass(source.size, recipe.batch))
    images = clean
    if source.per_view:
        return images, [(1.0, targets)], clean
    if recipe.augment is not None:
        height, width = images.shape[-2:]
        draws = rng.Draws(student.seed, "augment", step)
        images = recipe.augment.apply(images, recipe.augment.draw(draws, len(images), (height, width), groups=1))
    if recipe.cutmix:
        draws = rng.Draws(student.seed, "cutmix", step)
        if float(draws.uniform(1)) < recipe.cutmix:
            images, partners, share = cutmix(images, draws)
            return images, [(share, targets), (1 - share, targets[partners.to(targets.device)])], clean
    return images, [(1.0, targets)], clean


def _loss(source: Source, logits: Tensor, targets: Targets) -> Tensor:
    """Mean loss of a batch, mixed targets weighted."""
    parts = [weight * source.loss(logits, wanted) if weight != 1 else source.loss(logits, wanted)
             for weight, wanted in targets]  # fmt: skip
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum()


class _Keeper:
    """The checkpoint of one training; does nothing where there is no ``path``.

    It is known by its students' seeds, initial weights and first batches, the recipe, the update, and where and how it
    runs.
    ``keep_end``: the state after the last step is written too.
    """

    def __init__(
        self,
        path: Path | None,
        students: Sequence[Student],
        recipe: Recipe,
        device: torch.device,
        precision: str,
        update: Update | None = None,
        keep_end: bool = False,
    ) -> None:
        self.path, self.steps, self.keep_end = path, recipe.steps, keep_end
        self.began = self.saved = time.monotonic()
        if path is None:
            return
        known = [str(recipe), str(update), str(device.type), precision, torch.__version__]
        for student in students:
            first = batch_ids(student.seed, student.source.size, recipe.batch, 0)
            images, targets = student.source.batch(first, epoch=0)
            state = {**student.network.state_dict(), "first images": images, "first targets": targets}
            known += [str(student.seed), str(student.source.size), content(state)]
            known += [student.source.key] if hasattr(student.source, "key") else []  # what first targets do not show
        self.key = " ".join(known)

    @property
    def seconds(self) -> float:
        """Of training so far, over all resumptions."""
        return time.monotonic() - self.began

    def read(self) -> dict[str, Any] | None:
        """What :meth:`after` wrote for this same training; None where there is nothing of use."""
        if self.path is None or not self.path.exists():
            return None
        state = read_state(self.path)
        if state is None or state.get("key") != self.key:
            return None
        self.began -= state["seconds"]
        return state

    def after(self, step: int, state: Callable[[], dict[str, Any]]) -> None:
        """Writes ``state()`` after ``step`` steps if it is time; a failure costs safety, not the result."""
        end = self.keep_end and step == self.steps
        if self.path is None or (time.monotonic() - self.saved < CHECKPOINT_SECONDS and not end):
            return
        try:
            with replacing(self.path) as temporary, temporary.open("wb") as file:
                torch.save({"key": self.key, "step": step, "seconds": self.seconds, **state()}, file)
        except (CondenseError, OSError, RuntimeError) as fault:
            _log.warning("condense: the training goes on without a checkpoint: %s", fault)
        self.saved = time.monotonic()

    def remove(self) -> None:
        if self.path is not None:
            with contextlib.suppress(OSError):
                self.path.unlink()


def _optimizer(parameters: Sequence[Tensor], recipe: Recipe, stacked: bool = False) -> torch.optim.Optimizer:
    """The recipe's optimiser. Where ``stacked``, parameters have a leading axis of networks."""
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
    # Biases and the scales of norms are not decayed, as for SRe2L's students, whose settings are the family's usual
    # ones: pulling them to 0 weakens what a norm passes on, and keeps no weight small.
    matrices = [parameter.ndim - stacked >= 2 for parameter in parameters]
    groups = [
        {"params": [parameter for parameter, is_matrix in zip(parameters, matrices) if is_matrix == decayed],
         "weight_decay": recipe.weight_decay if decayed else 0.0}
        for decayed in (True, False)
        if decayed in matrices
    ]  # fmt: skip
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.999))


def _step(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()


def _train_one(
    student: Student,
    recipe: Recipe,
    device: torch.device,
    precision: str,
    report: Callable[[int], None] | None,
    keeper: _Keeper,
    watch: Callable[[int, Mapping[str, Tensor]], None] | None,
    watch_every: int,
    update: Update | None,
) -> None:
    network, start = student.network, 0
    weights: list[Tensor] = [weight for weight in network.parameters() if weight.requires_grad]
    optimizer = _optimizer(weights, recipe)

    def forward(images: Tensor) -> Tensor:
        with fast(device, precision):
            logits = network(images)
        return logits.float()

    def state() -> dict[str, Any]:
        return {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "random": _random_state(device)}

    with rng.seeded(student.seed, "dropout", device=device):
        saved = keeper.read()
        if saved is not None:
            network.load_state_dict(saved["network"])
            optimizer.load_state_dict(saved["optimizer"])
            _set_random_state(saved["random"], device)
            start = saved["step"]
        for step in range(start, recipe.steps):
            images, targets, clean = _batch(student, recipe, step, device, precision)

            def loss(images: Tensor = images, targets: Targets = targets) -> Tensor:
                return _loss(student.source, forward(images), targets)

            if update is None:
                optimizer.zero_grad()
                loss().backward()
            else:
                epoch = step // steps_per_pass(student.source.size, recipe.batch)
                _set_gradients(weights, update(Work(weights, False, step, epoch, clean, loss, forward)))
            _step(optimizer, recipe.rate(step))
            if watch is not None and (step + 1) % watch_every == 0:
                watch(step + 1, network.state_dict())
            keeper.after(step + 1, state)
            if report is not None:
                report(step + 1)


def _set_gradients(weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = gradient.detach()


def _random_state(device: torch.device) -> list[Tensor]:
    """The global generators that dropout draws from."""
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def _set_random_state(state: Sequence[Tensor], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)


def _train_stacked(
    students: Sequence[Student],
    recipe: Recipe,
    device: torch.device,
    precision: str,
    report: Callable[[int], None] | None,
    keeper: _Keeper,
    watch: Watch | None,
    watch_every: int,
    update: Update | None,
) -> None:
    """K networks as one: parameters (K, ...), batches (K, B, ...), the sum of K losses has K separate gradients."""
    nets, start = [student.network for student in students], 0
    parameters, buffers = torch.func.stack_module_state(nets)
    shell = copy.deepcopy(nets[0])
    leaves = {name: value.detach().requires_grad_() for name, value in parameters.items()}
    optimizer = _optimizer(list(leaves.values()), recipe, stacked=True)

    def call(weights: dict[str, Tensor], state: dict[str, Tensor], images: Tensor) -> Tensor:
        return torch.func.functional_call(shell, (weights, state), (images,))

    def state() -> dict[str, Any]:
        weights = {name: leaf.detach() for name, leaf in leaves.items()}
        return {"weights": weights, "buffers": buffers, "optimizer": optimizer.state_dict()}

    stacked = torch.func.vmap(call)

    def forward(images: Tensor) -> Tensor:
        with fast(device, precision):
            logits = stacked(leaves, buffers, images)
        return logits.float()

    saved = keeper.read()
    if saved is not None:
        with torch.no_grad():
            for name, value in (saved["weights"] | saved["buffers"]).items():
                (leaves | buffers)[name].copy_(value)
        optimizer.load_state_dict(saved["optimizer"])
        start = saved["step"]
    for step in range(start, recipe.steps):
        batches = [_batch(student, recipe, step, device, precision) for student in students]
        images = torch.stack([batch[0] for batch in batches])

        def loss(images: Tensor = images, targets: Sequence[Targets] = [batch[1] for batch in batches]) -> Tensor:
            logits = forward(images)
            return torch.stack([_loss(s.source, logits[k], targets[k]) for k, s in enumerate(students)]).sum()

        if update is None:
            optimizer.zero_grad()
            loss().backward()
        else:
            epoch = step // steps_per_pass(students[0].source.size, recipe.batch)
            clean, weights = torch.stack([batch[2] for batch in batches]), list(leaves.values())
            _set_gradients(weights, update(Work(weights, True, step, epoch, clean, loss, forward)))
        _step(optimizer, recipe.rate(step))
        if watch is not None and (step + 1) % watch_every == 0:
            for k in range(len(students)):
                watch(k, step + 1, {name: value[k].detach() for name, value in (leaves | buffers).items()})
        keeper.after(step + 1, state)
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
