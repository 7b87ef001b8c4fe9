"""Configuration of a training: optimiser, learning-rate schedule, and the order of the images."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from condense import rng
from condense.augment import Augmentation, CropViews, ImagePolicy
from condense.errors import CondenseError, did_you_mean
from condense.labels import split_evenly

STUDENT_VERSION = 2
"""Increased by every change of networks, augmentation or training that alters a student; part of the keys of cached
scores and networks."""


@dataclass(frozen=True)
class TrainConfig:
    """Configuration of a training."""

    steps: int
    """Optimizer steps."""
    batch: int
    """Images per step; a smaller set is one batch. The last batch of an epoch may be smaller."""
    lr: float
    """Initial learning rate."""
    momentum: float
    """Momentum of SGD; AdamW always uses betas 0.9 and 0.999."""
    weight_decay: float
    """sgd: L2 penalty on all parameters. adamw: decoupled decay, see ``decay_all``."""
    lr_milestones: tuple[float, ...] = (0.5,)
    """Fractions of the steps after which the learning rate is multiplied by ``lr_gamma``; the momentum buffer
    stays."""
    lr_gamma: float = 0.1
    """Factor on the learning rate at each of ``lr_milestones``."""
    augment: Augmentation | CropViews | ImagePolicy | None = None
    """Drawn in each step: one operation for the batch, parameters for each image; or a crop and a flip for each image.
    Not applied to per-view labels."""
    cutmix: float = 0.0
    """Probability of CutMix in a step: one box for the batch, which is mixed with its own images in another order."""
    optimizer: str = "sgd"
    """sgd or adamw."""
    schedule: str = "drops"
    """drops (see ``lr_milestones``) or cosine: the learning rate follows half a cosine."""
    stretch: float = 1.0
    """Length of the half cosine relative to the training; at 2 the learning rate ends at half its initial value."""
    warmup: float = 0.0
    """Fraction of the steps in which the learning rate is also multiplied by a linear warm-up factor."""
    decay_all: bool = False
    """Whether AdamW decays biases and the scales of norms too, and not only weights with two or more axes."""
    batch_norm_group: int = 0
    """Maximum number of images that share batch statistics: a batch passes through the network in equal groups of at
    most this size, for one optimizer step. Groups that were labelled together stay together. 0: the whole batch."""

    def __post_init__(self) -> None:
        check_optimizer(self.optimizer, self.schedule, self.stretch)
        check_batch_norm_group(self.batch_norm_group, self.batch)
        if not 0 <= self.warmup <= 1:
            raise CondenseError(f"warmup={self.warmup:g}: must be 0 to 1")

    def cache_key_fields(self) -> dict[str, Any]:
        """Returns the settings that are part of cache keys, under the names that existing caches use.

        Settings that were added later are omitted at their default, so that old caches stay valid.
        """
        key_names = {"lr_milestones": "drops", "lr_gamma": "drop_factor"}
        return {
            key_names.get(field.name, field.name): getattr(self, field.name)
            for field in fields(self)
            if field.name not in OMITTED_AT_DEFAULT or getattr(self, field.name) != field.default
        }

    def cache_key(self) -> str:
        """Returns the text that identifies this training in cache keys and manifests."""
        return f"Recipe({', '.join(f'{name}={value!r}' for name, value in self.cache_key_fields().items())})"

    def lr_at(self, step: int) -> float:
        """Returns the learning rate at ``step``."""
        if self.schedule == "cosine":
            rate = self.lr / 2 * (1 + math.cos(math.pi * step / (self.steps * self.stretch)))
        else:  # rounding may put a fraction computed from whole epochs slightly above the step
            rate = self.lr * self.lr_gamma ** sum(
                step >= fraction * self.steps - 1e-6 for fraction in self.lr_milestones
            )
        factor = (step + 1) / (self.warmup * self.steps) if self.warmup else 1.0
        return rate * factor if factor < 1 else rate


OMITTED_AT_DEFAULT = ("optimizer", "schedule", "stretch", "warmup", "decay_all", "batch_norm_group")
"""Settings added after caches had been written; see :meth:`TrainConfig.cache_key_fields`."""

OPTIMIZERS, LR_SCHEDULES = ("sgd", "adamw"), ("drops", "cosine")


def check_optimizer(optimizer: str, schedule: str, stretch: float = 1.0, prefix: str = "") -> None:
    """Checks the names of optimiser and schedule, and the stretch; ``prefix`` is put before the settings' names.

    Raises:
        CondenseError: One line that names the setting.
    """
    for key, value, choices in (("optimizer", optimizer, OPTIMIZERS), ("schedule", schedule, LR_SCHEDULES)):
        if value not in choices:
            raise CondenseError(f"{prefix}{key}={value}: unknown{did_you_mean(value, choices)}")
    if not stretch >= 1:  # a shorter cosine would increase again before the end
        raise CondenseError(f"{prefix}stretch={stretch:g}: must be at least 1")


def check_batch_norm_group(size: int, batch: int) -> None:
    """Checks the size of the groups of a batch that share batch statistics; 0 for no groups.

    Raises:
        CondenseError: One line that names the setting.
    """
    if size and (size < 2 or batch % size):
        raise CondenseError(f"batch_norm_group={size}: must be 0, or at least 2 and divide batch={batch}")


def epoch_steps(size: int, batch: int) -> int:
    """Returns the number of steps of one epoch over ``size`` images."""
    return -(-size // batch)


def batch_ids(seed: int, size: int, batch: int, step: int) -> Tensor:
    """Returns the positions of the images of ``step``: consecutive parts of a new permutation for each epoch."""
    epoch, part = divmod(step, epoch_steps(size, batch))
    return _epoch_order(seed, size, epoch)[part * batch : (part + 1) * batch]


def batch_groups(
    seed: int, size: int, batch: int, step: int, group: int, labelled: Sequence[Tensor] | None = None
) -> Sequence[Tensor]:
    """Returns the positions of the images of ``step`` in groups of at most ``group`` images.

    Args:
        seed, size, batch, step: See :func:`batch_ids`.
        group: See :attr:`TrainConfig.batch_norm_group`.
        labelled: Groups of the epoch of ``step``; by default those of a new permutation.
    """
    steps = epoch_steps(size, batch)
    epoch, part = divmod(step, steps)
    groups = _epoch_groups(seed, size, epoch, group) if labelled is None else labelled
    each, more = divmod(len(groups), steps)
    first = part * each + min(part, more)
    return groups[first : first + each + (part < more)]


@functools.lru_cache(maxsize=8)
def _epoch_groups(seed: int, size: int, epoch: int, group: int) -> list[Tensor]:
    return split_evenly(_epoch_order(seed, size, epoch), group)


@functools.lru_cache(maxsize=64)
def _epoch_order(seed: int, size: int, epoch: int) -> Tensor:
    return rng.Draws(seed, "shuffle", epoch).permutation(size)


def make_optimizer(parameters: Sequence[Tensor], recipe: TrainConfig, stacked: bool = False) -> torch.optim.Optimizer:
    """Creates the optimiser of a recipe. If ``stacked``, parameters have a leading axis of networks.

    Raises:
        CondenseError: There are no parameters.
    """
    if not parameters:
        raise CondenseError("the network has no trainable parameters; set requires_grad of some of them")
    fused = True if parameters[0].device.type == "cuda" else None  # one kernel launch
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay, fused=fused
        )
    # By default biases and scales of norms are not decayed, as for SRe2L's students on ImageNet: decaying them weakens
    # the output of a norm without making any weight small.
    matrices = [recipe.decay_all or parameter.ndim - stacked >= 2 for parameter in parameters]
    groups = [
        {
            "params": [parameter for parameter, is_matrix in zip(parameters, matrices) if is_matrix == decayed],
            "weight_decay": recipe.weight_decay if decayed else 0.0,
        }
        for decayed in (True, False)
        if decayed in matrices
    ]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.999), fused=fused)
