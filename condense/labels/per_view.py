"""Per-view labels: the teacher's logits on the augmented views of several epochs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condense.augment import CropViews, MixedViews, ViewRule, float32_decimal
from condense.errors import CondenseError
from condense.labels.arrays import checked_array, read_init_kwargs, view_arrays
from condense.labels.base import (
    LABEL_KINDS,
    LOSSES,
    Labels,
    check_hard_labels,
    check_loss,
    checked_temperature,
    copy_to,
    epoch_views,
    kl_loss,
    logit_mse_loss,
    mix_rows,
    statistics_text,
    total_nbytes,
)
from condense.labels.teacher_logits import (
    check_statistics,
    compute_view_logits,
    given_or_predicted_classes,
    labelled_groups,
)

SMOOTHING = 0.1
"""Label smoothing of the ground truth that replaces an uncertain label; see :class:`PerViewLabels`."""


class PerViewLabels(Labels):
    """A teacher's logits on E stored epochs of views, float16 (E, N, C); epoch e uses the views of epoch e modulo E
    (FKD, Shen and Xing, ECCV 2022, with mixed views as in SRe2L). The teacher labelled the mixed view.

    With ``loss_kind="kl"`` the target is softmax(logits / T), float32 (B, C), and the loss its KL divergence to the
    student's softmax at T. With ``"mse"`` the target is the logits and the loss the mean squared difference over views
    and classes plus ``gamma`` times the cross-entropy with the classes of the view (G-VBSM, EDC); if gamma is not 0,
    targets are (B, 2, C), logits and class probabilities.

    ``calibrate=(low, mid, top)`` compares the teacher's largest probability p (at T = 1) on a view with three
    thresholds, like FerKD: views with p < low (uninformative) or p > top (too easy) are omitted from the loss, which is
    the mean over the remaining views; if low <= p < mid, the classes of the view, smoothed by 0.1, replace the label.
    The row of the targets is then 0, or the smoothed classes. FerKD's thresholds (.15, .3, .95) are unverified, and its
    release contains no code for this.

    Args:
        logits: (E, N, C) of any floating dtype, stored as float16; may be memory-mapped.
        seed: Seed of the views.
        views: Distribution of the views. Default: plain crops.
        temperature: T of the targets and the loss, rounded to float32. Unused by ``mse``.
        squared: Whether the KL loss is multiplied by T^2, so that the gradient norm hardly depends on T.
        loss_kind: ``kl`` or ``mse``.
        gamma: Weight of the cross-entropy in ``mse``.
        calibrate: None or three thresholds.
        hard: Class of each image, int64 (N,); needed by gamma and calibrate.
        statistics: BatchNorm statistics of the teacher, see :func:`compute_view_logits`.
        micro: Views per micro-batch of the teacher.

    Raises:
        CondenseError: An invalid value, logits of another shape or not finite as float16, or no classes although they
            are needed.
    """

    kind = "per-view"
    per_view = True
    stores_all_logits = True
    exactness = "exact"
    step_cost = "reading 2 C bytes a view"

    def __init__(
        self,
        logits: Tensor,
        seed: int,
        views: CropViews | ViewRule | None = None,
        temperature: float = 20.0,
        squared: bool = True,
        *,
        loss_kind: str = "kl",
        gamma: float = 0.0,
        calibrate: Sequence[float] | None = None,
        hard: Tensor | None = None,
        statistics: str = "running",
        micro: int = 8,
    ) -> None:
        self.logits = logits.half()
        if logits.ndim != 3 or not len(logits):
            raise CondenseError(f"per-view logits must be (epochs, images, classes), not {tuple(logits.shape)}")
        if not all(
            bool(epoch.isfinite().all()) for epoch in self.logits
        ):  # by epoch: all of them may exceed the memory
            raise CondenseError("per-view logits are not finite as float16; was the teacher trained?")
        epochs, images, classes = logits.shape
        self._settle(
            (epochs, images, classes),
            seed,
            views,
            temperature,
            squared,
            loss_kind,
            gamma,
            calibrate,
            hard,
            statistics,
            micro,
        )

    def _settle(
        self,
        shape: tuple[int, int, int],
        seed: int,
        views: CropViews | ViewRule | None = None,
        temperature: float = 20.0,
        squared: bool = True,
        loss_kind: str = "kl",
        gamma: float = 0.0,
        calibrate: Sequence[float] | None = None,
        hard: Tensor | None = None,
        statistics: str = "running",
        micro: int = 8,
    ) -> None:
        """Sets everything except the logits, which a subclass stores as a code of (E, N, C) = ``shape``."""
        self.shape, self.seed, self.views = shape, seed, ViewRule.of(views)
        self.temperature, self.squared = checked_temperature(temperature), squared
        self.loss_kind, self.gamma, self.hard = loss_kind, float32_decimal(gamma), hard
        self.calibrate = None if calibrate is None else tuple(float32_decimal(x) for x in calibrate)
        self.statistics, self.micro = check_statistics(statistics, micro)
        check_loss(loss_kind, self.gamma, hard)
        if self.calibrate is not None:
            if loss_kind != "kl":
                raise CondenseError("calibrate: replaces distributions; set loss_kind=kl")
            if len(self.calibrate) != 3 or not 0 <= self.calibrate[0] <= self.calibrate[1] <= self.calibrate[2] <= 1:
                raise CondenseError(f"calibrate={self.calibrate}: must be low <= mid <= top between 0 and 1")
        if hard is not None:
            check_hard_labels(hard, shape[1], shape[2])
        elif self.calibrate is not None:
            raise CondenseError("calibrate: needs the class of each image; give hard")

    def __len__(self) -> int:
        return self.shape[1]

    @property
    def epochs(self) -> int:
        """Number of stored epochs E, after which views and targets repeat."""
        return self.shape[0]

    def terms(self) -> dict[str, Any]:
        """Returns all arguments of this class except the logits."""
        return {
            "seed": self.seed,
            "views": self.views,
            "temperature": self.temperature,
            "squared": self.squared,
            "loss_kind": self.loss_kind,
            "gamma": self.gamma,
            "calibrate": self.calibrate,
            "hard": self.hard,
            "statistics": self.statistics,
            "micro": self.micro or 8,
        }

    def training_batch(self, images: Tensor, ids: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        views, ids, drawn, logits = self._views_and_logits(images, ids, epoch)
        if self.loss_kind == "mse":
            return views, torch.stack([logits, self._truth(ids, drawn)], 1) if self.gamma else logits
        targets = (logits / self.temperature_at(epoch)).softmax(-1)
        if self.calibrate is not None:
            low, mid, top = self.calibrate
            confidence = logits.softmax(-1).amax(-1, keepdim=True)
            truth = self._truth(ids, drawn)
            smoothed = (1 - SMOOTHING) * truth + SMOOTHING / (truth.shape[1] - 1) * (1 - truth)
            targets = torch.where(confidence < mid, smoothed, targets).where(
                (confidence >= low) & (confidence <= top), 0.0
            )
        return views, targets

    def labelled_groups(self, epoch: int, size: int) -> list[Tensor] | None:
        if self.micro != size:
            return None
        return labelled_groups(self.views, self.seed, epoch % self.epochs, len(self), size)

    def temperature_at(self, epoch: int) -> float:
        """Returns T of the targets in a student's ``epoch``."""
        return self.temperature

    def _views_and_logits(self, images: Tensor, ids: Tensor, epoch: int) -> tuple[Tensor, Tensor, MixedViews, Tensor]:
        """Returns the views, the ids on their device, all views drawn for the epoch, and float32 logits (B, C)."""
        epoch %= self.epochs
        views, ids, drawn = epoch_views(self, images, ids, epoch)
        return views, ids, drawn, self._read(torch.full_like(ids, epoch), ids).to(images.device)

    def _read(self, epochs: Tensor, ids: Tensor) -> Tensor:
        """Returns logits, float32 (B, C), of images ``ids`` (B,) in stored epochs ``epochs`` (B,)."""
        device = self.logits.device
        return self.logits[epochs.to(device), ids.to(device)].float()

    def _truth(self, ids: Tensor, drawn: MixedViews) -> Tensor:
        """Returns the class probabilities of views, float32 (B, C): one class, or two with their shares."""
        assert self.hard is not None
        return mix_rows(F.one_hot(self.hard.to(ids.device), self.shape[2]).float(), ids, drawn)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        if self.loss_kind == "kl":
            return kl_loss(logits, targets, self.temperature, self.squared)
        return logit_mse_loss(logits, targets, self.gamma)

    def arrays(self) -> dict[str, np.ndarray]:
        return {"logits": self.logits.detach().cpu().numpy(), **self._setting_arrays()}

    def _setting_arrays(self) -> dict[str, np.ndarray]:
        """Returns the arrays of :meth:`terms`; :func:`read_init_kwargs` reads them."""
        arrays: dict[str, np.ndarray] = {
            "loss": np.array([self.temperature, self.gamma], np.float32),
            "flags": np.array([self.squared, LOSSES.index(self.loss_kind)], np.uint8),
            **view_arrays(self.views, self.seed, self.statistics, self.micro),
        }
        if self.calibrate is not None:
            arrays["calibrate"] = np.array(self.calibrate, np.float32)
        if self.hard is not None:
            arrays["hard"] = self.hard.cpu().numpy()
        return arrays

    def nbytes(self) -> int:
        """Returns 2 E N C bytes, plus the settings of the views and the loss, plus 8 N if the classes are needed."""
        return total_nbytes(self.arrays())

    def to(self, device: torch.device) -> PerViewLabels:
        return copy_to(self, device, "logits", "hard")

    def label_images(self, images: Tensor, teacher: nn.Module, seed: int, hard: Tensor | None = None) -> PerViewLabels:
        logits = compute_view_logits(
            teacher,
            images,
            self.epochs,
            self.views,
            seed,
            classes=self.shape[2],
            statistics=self.statistics,
            micro=self.micro,
        )
        hard = None if self.hard is None else given_or_predicted_classes(images, teacher, hard)
        return PerViewLabels(logits.to(images.device), **{**self.terms(), "seed": seed, "hard": hard})

    def loss_settings(self) -> dict[str, Any]:
        return {"calibrate": self.calibrate, "loss_kind": self.loss_kind, "gamma": self.gamma, "hard": self.hard}

    def cache_key(self) -> str:
        loss = f"{self.loss_kind}, T={self.temperature}, squared={self.squared}, gamma={self.gamma}"
        return f"{self.epochs} epochs of {self.views}, {statistics_text(self)}, {loss}, calibrate={self.calibrate}"

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], classes: int) -> PerViewLabels:
        logits = torch.from_numpy(checked_array(arrays, "logits", np.float16, (None, None, classes)))
        return cls(logits, **read_init_kwargs(arrays, classes))


LABEL_KINDS.add("per-view", PerViewLabels)
