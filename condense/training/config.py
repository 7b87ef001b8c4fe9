"""TODO-DOC."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from condense import rng
from condense.augment import Augmentation
from condense.errors import CondenseError, did_you_mean

STUDENT_VERSION = 2
"""Raised by every change of networks, augmentation or training that alters a student; cached scores and networks depend
on it."""


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


def make_optimizer(parameters: Sequence[Tensor], recipe: Recipe, stacked: bool = False) -> torch.optim.Optimizer:
    """The recipe's optimiser. Where ``stacked``, parameters have a leading axis of networks."""
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
    # Biases and the scales of norms are not decayed, as for SRe2L's students, whose settings are the family's usual
    # ones: pulling them to 0 weakens what a norm passes on, and keeps no weight small.
    matrices = [parameter.ndim - stacked >= 2 for parameter in parameters]
    groups = [
        {
            "params": [parameter for parameter, is_matrix in zip(parameters, matrices) if is_matrix == decayed],
            "weight_decay": recipe.weight_decay if decayed else 0.0,
        }
        for decayed in (True, False)
        if decayed in matrices
    ]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.999))
