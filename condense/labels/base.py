"""the Labels protocol, the registry of kinds, losses."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condense.augment import MixedViews, single
from condense.errors import CondenseError, did_you_mean
from condense.labels.teacher_logits import draw_epoch_views
from condense.registry import Registry

LOSSES = ("kl", "mse")


class Labels(Protocol):
    """What every provider offers."""

    kind: str
    per_view: bool
    """True where targets come with views of the provider's own making, so that no other augmentation is due."""

    @property
    def exactness(self) -> str:
        """exact: a teacher's own answers on the very views, to float16; lossy: these, coded within an error that the
        labels state; approximate: something that stands for them."""

    @property
    def step_cost(self) -> str:
        """What a student's step costs beyond drawing and making the views, in words."""

    def __len__(self) -> int:
        """Number of stored images that have labels."""

    def targets(self, ids: Tensor) -> Tensor:
        """Targets of the stored images ``ids`` (any shape) as they are, on their device.

        Raises:
            CondenseError: such labels belong to views.
        """

    def shown(self, images: Tensor, ids: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """Views (B,C,H,W) of the images ``ids`` (B,) in ``epoch``, and targets whose first axis is B.

        Args:
            images: (N,C,H,W), all stored images, in training space.
            ids: int64, which of them.
            epoch: pass over the set, from 0.

        Raises:
            CondenseError: there are not as many images as labels.
        """

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean loss over the batch for logits (B, C)."""

    def arrays(self) -> dict[str, np.ndarray]:
        """What is written below ``/labels`` in the file; the class's ``from_arrays(arrays, classes)`` reads it."""

    def nbytes(self) -> int:
        """Bytes that the labels need, as the benchmark counts them."""

    def external_nbytes(self) -> int:
        """Bytes that training on the labels needs from outside the file, such as a live teacher's weights."""

    def to(self, device: torch.device) -> Labels:
        """The same labels on ``device``."""

    def anew(self, images: Tensor, teacher: nn.Module, seed: int, hard: Tensor | None = None) -> Labels:
        """Labels of this kind and rule that ``teacher`` gives other images (N,C,H,W), in training space, on its
        device. ``hard`` (N,) are their classes; None: those that the teacher finds likeliest."""

    def rule(self) -> str:
        """What decides such labels besides the teacher."""


def kl_loss(logits: Tensor, targets: Tensor, temperature: float | Tensor, squared: bool) -> Tensor:
    """KL divergence of targets (B, C) to softmax(logits / T): the mean over rows of targets that are not all 0."""
    rows = targets.flatten(1).any(1).sum().clamp(min=1)
    loss = F.kl_div(F.log_softmax(logits / temperature, -1), targets, reduction="sum") / rows
    return loss * temperature**2 if squared else loss


def check_loss(loss_kind: str, gamma: float, hard: Tensor | None) -> None:
    """Refuses a loss of views that cannot be."""
    if loss_kind not in LOSSES:
        raise CondenseError(f"loss_kind={loss_kind}: unknown{did_you_mean(loss_kind, LOSSES)}")
    if not 0 <= gamma < math.inf:
        raise CondenseError(f"gamma={gamma:g}: must be at least 0 and finite")
    if loss_kind == "kl" and gamma:
        raise CondenseError(f"gamma={gamma:g}: weighs the classes in loss_kind=mse; leave it out or take that")
    if gamma and hard is None:
        raise CondenseError("gamma: needs the class of each image; give hard")


def logit_mse_loss(logits: Tensor, targets: Tensor, gamma: float) -> Tensor:
    """Mean squared difference to logits (B, C); where gamma is not 0 targets are (B, 2, C), logits and classes, and
    gamma times the cross-entropy with these is added."""
    if not gamma:
        return F.mse_loss(logits, targets)
    return F.mse_loss(logits, targets[:, 0]) + gamma * F.cross_entropy(logits, targets[:, 1])


def checked_temperature(value: float) -> float:
    temperature = single(value)
    if not 0 < temperature < math.inf:
        raise CondenseError(f"temperature={value:g}: must be above 0 and finite")
    return temperature


def statistics_text(labels: Any) -> str:
    return f"statistics={labels.statistics}, micro={labels.micro}"


def per_view_error(labels: Labels) -> CondenseError:
    return CondenseError(
        f"{labels.kind} labels belong to augmented views, not to images: iterate "
        "`for images, targets in set.batches(epoch, batch_size)` and use `set.loss(logits, targets)`"
    )


def check_image_count(images: Tensor, labels: Labels) -> None:
    if len(images) != len(labels):
        raise CondenseError(f"{len(images)} images but {len(labels)} {labels.kind} labels; give those of their set")


def epoch_views(labels: Any, images: Tensor, ids: Tensor, epoch: int) -> tuple[Tensor, Tensor, MixedViews]:
    """The views of images ``ids``, the ids on the device of the images, and all that was drawn for the epoch."""
    check_image_count(images, labels)
    size = (images.shape[2], images.shape[3])
    drawn = draw_epoch_views(labels.views, labels.seed, epoch, len(images), size, images.device)
    ids = ids.to(images.device)
    return labels.views.apply(images, ids, drawn), ids, drawn


def mixed(values: Tensor, ids: Tensor, drawn: MixedViews) -> Tensor:
    """Rows ``ids`` of ``values`` (N, C), mixed with those of their partners as the views are."""
    if drawn.partner is None or drawn.share is None:
        return values[ids]
    share = drawn.share[ids, None]
    return share * values[ids] + (1 - share) * values[drawn.partner[ids]]


def check_hard_labels(hard: Tensor, count: int, classes: int) -> None:
    if hard.dtype != torch.int64 or hard.shape != (count,):
        raise CondenseError(
            f"hard: must be int64 ({count},), the class of each image, not {hard.dtype} {tuple(hard.shape)}"
        )
    if count and not 0 <= int(hard.min()) <= int(hard.max()) < classes:
        raise CondenseError(f"hard: classes {int(hard.min())} to {int(hard.max())} are outside 0..{classes - 1}")


def copy_to(labels: Any, device: torch.device, *names: str) -> Any:
    """A copy whose tensors ``names`` are on ``device``."""
    moved = copy.copy(labels)
    for name in names:
        tensor = getattr(labels, name)
        setattr(moved, name, tensor if tensor is None else tensor.to(device))
    return moved


def total_nbytes(arrays: Mapping[str, np.ndarray]) -> int:
    return sum(array.nbytes for array in arrays.values())


_LIGHT = "condense.light_labels"

PROVIDERS: Registry[Any] = Registry(
    "label kind",
    {**dict.fromkeys(("lowrank", "topk", "pool", "teacher-int8"), _LIGHT), "projector": "condense.projectors"},
)
