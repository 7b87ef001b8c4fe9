"""The interface of label providers, the registry of label kinds, and the losses that several kinds share."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condense.augment import MixedViews, ViewRule, float32_decimal
from condense.device import upload_indices
from condense.errors import CondenseError, did_you_mean
from condense.labels.teacher_logits import draw_epoch_views, grouping_version, mixed_batches
from condense.registry import Registry

LOSSES = ("kl", "mse")


@dataclass(frozen=True)
class Fidelity:
    """Difference between the encoded logits z and the decoded logits z', both centred, which changes no softmax."""

    largest: float
    """Upper bound of |z - z'| over all views and classes; with ``fill=mr`` over the stored classes."""
    relative: float
    """Upper bound of sum |z - z'|^2 / sum |z|^2, over the same entries."""
    moved: float
    """Mean over views of sum |p - p'| / 2, the total variation distance of the targets at temperature T."""

    def array(self) -> np.ndarray:
        """Returns the three numbers as float32 (3,)."""
        return np.array(dataclasses.astuple(self), np.float32)


class Labels(Protocol):
    """Interface of a label provider. Kinds derive from it and override the defaults that do not apply to them."""

    kind: str
    """Name in :data:`LABEL_KINDS`, in manifests and on the command line."""
    per_view: bool
    """Whether targets belong to augmented views that the provider draws, so that no other augmentation is applied."""
    is_hard: bool = False
    """Whether the target is a class index."""
    smoothing: float = 0.0
    """Share of the target that is spread evenly over all classes."""
    outputs: int | None = None
    """Number of outputs of a network that is trained on the labels; None: one for each class."""
    stores_all_logits: bool = False
    """Whether the teacher's logits on each view of each epoch are stored, so that other kinds can be made from them."""
    error: Fidelity | None = None
    """Measured error of lossy labels; None if unknown or if there is none."""
    target_version: str = ""
    """Part of the keys of cached scores; another text than in an earlier version that computed other targets."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.kind} labels of {len(self)} images)"

    @property
    def exactness(self) -> str:
        """``exact``: the teacher's logits on exactly these views, to float16; ``lossy``: the same, coded within an
        error that the labels state; ``approximate``: a substitute for them."""

    @property
    def step_cost(self) -> str:
        """Cost of a student's step in addition to drawing and applying the views, as text."""

    def __len__(self) -> int:
        """Number of stored images that have labels."""

    def targets(self, ids: Tensor) -> Tensor:
        """Returns the targets of the stored images ``ids`` (any shape) without augmentation, on the labels' device.

        Raises:
            CondenseError: Labels of this kind belong to views.
        """
        raise CondenseError(
            f"{self.kind} labels belong to augmented views, not to images: iterate "
            "`for images, targets in set.batches(epoch, batch_size)` and use `set.loss(logits, targets)`"
        )

    def training_batch(self, images: Tensor, ids: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """Returns what a student trains on: views (B,C,H,W) of the images ``ids``, and targets whose first axis is B.

        Args:
            images: All stored images (N,C,H,W), in training space.
            ids: Indices of the batch, int64 (B,).
            epoch: Pass over the set, from 0.

        Raises:
            CondenseError: The number of images differs from the number of labels.
        """

    def labelled_groups(self, epoch: int, size: int) -> list[Tensor] | None:
        """Returns the groups of images whose views shared batch statistics when they were labelled for ``epoch``.

        Args:
            epoch: Pass over the set, from 0.
            size: Maximum number of images per group.

        Returns:
            Indices of the images of each group, int64 on the CPU; None if the labels have no groups of this size.
        """
        return None

    def mixed_batches(self, epoch: int, size: int) -> list[Tensor] | None:
        """Returns the batches of an epoch whose views are mixed among themselves.

        Args:
            epoch: Pass over the set, from 0.
            size: Number of images per batch.

        Returns:
            Indices of the images of each batch, int64 on the CPU, one batch for each ``size`` images begun; None if the
            labels have no batches of this size.
        """
        labels: Any = self
        views: ViewRule | None = getattr(labels, "views", None)
        if views is None or views.mix_batch != size:
            return None
        return mixed_batches(views, labels.seed, epoch % getattr(labels, "epochs", epoch + 1), len(self))

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Returns the mean loss over the batch for logits (B, C)."""

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns the arrays to store below ``/labels``; ``from_arrays(arrays, classes)`` of the class reads them."""

    def export_tensors(self, ids: Tensor) -> dict[str, Tensor]:
        """Returns what an export contains of the images ``ids`` besides their targets, on the CPU."""
        return {}

    def nbytes(self) -> int:
        """Returns the bytes that the labels need, as the benchmark counts them."""

    def external_nbytes(self) -> int:
        """Returns the bytes that training needs from outside the file, such as the weights of a public network."""
        return 0

    def to(self, device: torch.device) -> Labels:
        """Returns the same labels on ``device``."""

    def label_images(self, images: Tensor, teacher: nn.Module, seed: int, hard: Tensor | None = None) -> Labels:
        """Labels other images with ``teacher``, using the same kind and settings.

        Args:
            images: (N,C,H,W) in training space, on the teacher's device.
            teacher: Network that labels them; see :meth:`relabelling_teacher`.
            seed: Seed of the views.
            hard: Classes of the images, int64 (N,). Default: the classes that the teacher predicts.
        """

    def relabelling_teacher(self, teacher: nn.Module | None) -> nn.Module | None:
        """Returns the network that :meth:`label_images` needs: ``teacher``, or the labels' own network."""
        return teacher

    def own_teacher(
        self, device: torch.device, *, original: bool
    ) -> tuple[nn.Module, dict[str, Any] | None, tuple[str, ...]] | None:
        """Returns the network that computes the targets, if the labels contain one.

        Args:
            device: Device of the network.
            original: Whether only the original teachers are suitable, not a network that imitates them.

        Returns:
            The network, its description if the manifest of the set has none, and the names of the architectures from
            which its members can be built; or None.
        """
        return None

    def loss_settings(self) -> dict[str, Any]:
        """Returns the settings of the loss that other kinds adopt, as keyword arguments of ``PerViewLabels``."""
        return {}

    def cache_key(self) -> str:
        """Returns the settings on which the labels depend, except the teacher. The text is part of cache keys."""


def kl_loss(logits: Tensor, targets: Tensor, temperature: float | Tensor, squared: bool) -> Tensor:
    """Returns the KL divergence of targets (B, C) to softmax(logits / T), averaged over the rows that are not all 0."""
    rows = targets.flatten(1).any(1).sum().clamp(min=1)
    loss = F.kl_div(F.log_softmax(logits / temperature, -1), targets, reduction="sum") / rows
    return loss * temperature**2 if squared else loss


def check_loss(loss_kind: str, gamma: float, hard: Tensor | None) -> None:
    """Checks the settings of the loss of per-view labels.

    Raises:
        CondenseError: An unknown loss, or a ``gamma`` that is out of range or does not apply.
    """
    if loss_kind not in LOSSES:
        raise CondenseError(f"loss_kind={loss_kind}: unknown{did_you_mean(loss_kind, LOSSES)}")
    if not 0 <= gamma < math.inf:
        raise CondenseError(f"gamma={gamma:g}: must be at least 0 and finite")
    if loss_kind == "kl" and gamma:
        raise CondenseError(f"gamma={gamma:g}: applies to loss_kind=mse only; remove it or set loss_kind=mse")
    if gamma and hard is None:
        raise CondenseError("gamma: needs the class of each image; give hard")


def logit_mse_loss(logits: Tensor, targets: Tensor, gamma: float) -> Tensor:
    """Returns the mean squared difference to the teacher's logits, plus ``gamma`` times the cross-entropy.

    Args:
        logits: (B, C).
        targets: Teacher logits (B, C); if ``gamma`` is not 0, teacher logits and class probabilities (B, 2, C).
        gamma: Weight of the cross-entropy.
    """
    if not gamma:
        return F.mse_loss(logits, targets)
    return F.mse_loss(logits, targets[:, 0]) + gamma * F.cross_entropy(logits, targets[:, 1])


def checked_temperature(value: float) -> float:
    """Rounds a temperature to float32 and checks that it is above 0 and finite."""
    temperature = float32_decimal(value)
    if not 0 < temperature < math.inf:
        raise CondenseError(f"temperature={value:g}: must be above 0 and finite")
    return temperature


def statistics_text(labels: Any) -> str:
    """Returns the BatchNorm settings of the teacher as text for :meth:`Labels.rule`."""
    version = grouping_version(labels.statistics)
    return f"statistics={labels.statistics}, micro={labels.micro}" + f", {version}" * bool(version)


def check_image_count(images: Tensor, labels: Labels) -> None:
    """Checks that there are as many images as labels."""
    if len(images) != len(labels):
        raise CondenseError(
            f"{len(images)} images but {len(labels)} {labels.kind} labels; give the images of their set"
        )


def epoch_views(labels: Any, images: Tensor, ids: Tensor, epoch: int) -> tuple[Tensor, Tensor, MixedViews]:
    """Returns the views of the images ``ids``, the ids on the images' device, and all views drawn for the epoch."""
    check_image_count(images, labels)
    size = (images.shape[2], images.shape[3])
    drawn = draw_epoch_views(labels.views, labels.seed, epoch, len(images), size, images.device)
    ids = ids.to(images.device)
    return labels.views.apply(images, ids, drawn), ids, drawn


def mix_rows(values: Tensor, ids: Tensor, drawn: MixedViews) -> Tensor:
    """Returns the rows ``ids`` of ``values`` (N, C), mixed with the rows of their partners like the views."""
    if drawn.partner is None or drawn.share is None:
        return values[ids]
    share = drawn.share[ids, None]
    return share * values[ids] + (1 - share) * values[drawn.partner[ids]]


def check_hard_labels(hard: Tensor, count: int, classes: int) -> None:
    """Checks that ``hard`` holds the class of each of ``count`` images, int64 in 0..``classes``-1."""
    if hard.dtype != torch.int64 or hard.shape != (count,):
        raise CondenseError(
            f"hard: must be int64 ({count},), the class of each image, not {hard.dtype} {tuple(hard.shape)}"
        )
    if count and not 0 <= int(hard.min()) <= int(hard.max()) < classes:
        raise CondenseError(f"hard: classes {int(hard.min())} to {int(hard.max())} are outside 0..{classes - 1}")


def copy_to(labels: Any, device: torch.device, *names: str) -> Any:
    """Returns a copy of the labels whose tensors ``names`` are on ``device``."""
    moved = copy.copy(labels)
    for name in names:
        tensor = getattr(labels, name)
        if tensor is not None:
            # The host needs the classes in each epoch, to choose its views.
            setattr(moved, name, upload_indices(tensor, device) if name == "hard" else tensor.to(device))
    return moved


def total_nbytes(arrays: Mapping[str, np.ndarray]) -> int:
    """Returns the total number of bytes of the arrays."""
    return sum(array.nbytes for array in arrays.values())


LABEL_KINDS: Registry[Any] = Registry("label kind")
