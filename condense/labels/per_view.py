"""TODO-DOC."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condense.augment import CropViews, MixedViews, ViewRule, single
from condense.errors import CondenseError
from condense.labels.arrays import checked_array, read_init_kwargs, view_arrays
from condense.labels.base import (
    LOSSES,
    PROVIDERS,
    check_hard_labels,
    check_loss,
    checked_temperature,
    copy_to,
    epoch_views,
    kl_loss,
    logit_mse_loss,
    mixed,
    per_view_error,
    statistics_text,
    total_nbytes,
)
from condense.labels.teacher_logits import check_statistics, given_or_predicted_classes, view_answers

SMOOTHING = 0.1
"""Of the ground truth that takes the place of a doubtful label, see :class:`PerViewLabels`."""

# Labels of views ------------------------------------------------------------------------------------------------------


class PerViewLabels:
    """A teacher's logits on E stored epochs of views, float16 (E, N, C); epoch e shows the views of epoch e modulo E
    (FKD, Shen and Xing, ECCV 2022, with mixed views as in SRe2L). The teacher saw the mixed view.

    With ``loss_kind="kl"`` the target is softmax(logits / T), float32 (B, C), and the loss its KL divergence to the
    student's softmax at T. With ``"mse"`` the target is the logits themselves and the loss the mean squared difference
    over views and classes plus ``gamma`` times the cross-entropy with the classes of the view (G-VBSM, EDC); where
    gamma is not 0 targets are (B, 2, C), logits and classes.

    ``calibrate=(low, mid, top)`` goes by the teacher's largest probability p (at T = 1) on a view, as FerKD does: a
    view with p < low (it shows nothing) or p > top (it teaches nothing) is left out of the loss, the mean being over
    the others; where low <= p < mid the classes of the view, smoothed by 0.1, take the place of the label. The row of
    the targets is then 0, or the smoothed classes. FerKD's thresholds (.15, .3, .95) are recollections that nobody has
    verified, and its release holds no code of this.

    Args:
        logits: (E, N, C) of any floating dtype, stored as float16; may lie in a memory-mapped file.
        seed: of the views.
        views: how they are drawn; plain crops when None.
        temperature: T of the targets and the loss, kept as its float32 neighbour prints. Unused by ``mse``.
        squared: multiply the KL loss by T^2, so that the size of gradients hardly depends on T.
        loss_kind: ``kl`` or ``mse``.
        gamma: weight of the classes in ``mse``.
        calibrate: None or three thresholds.
        hard: int64 (N,), class of each image; needed by gamma and calibrate.
        statistics: how the teacher's BatchNorm normalised, see :func:`view_answers`.
        micro: views that it normalised together.

    Raises:
        CondenseError: a value that cannot be, logits of another shape or not finite as float16, or no classes where
            they are needed.
    """

    kind = "per-view"
    per_view = True
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
        if not all(bool(epoch.isfinite().all()) for epoch in self.logits):  # by epoch: the store may exceed the memory
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
        """All but the logits themselves, which are kept as (E, N, C) = ``shape`` in one way or another."""
        self.shape, self.seed, self.views = shape, seed, ViewRule.of(views)
        self.temperature, self.squared = checked_temperature(temperature), squared
        self.loss_kind, self.gamma, self.hard = loss_kind, single(gamma), hard
        self.calibrate = None if calibrate is None else tuple(single(x) for x in calibrate)
        self.statistics, self.micro = check_statistics(statistics, micro)
        check_loss(loss_kind, self.gamma, hard)
        if self.calibrate is not None:
            if loss_kind != "kl":
                raise CondenseError("calibrate: needs distributions to replace; take loss_kind=kl")
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
        """Stored epochs E, after which views and targets repeat."""
        return self.shape[0]

    def terms(self) -> dict[str, Any]:
        """Everything that the labels follow from besides the logits, as keywords of this class."""
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

    def targets(self, ids: Tensor) -> Tensor:
        raise per_view_error(self)

    def shown(self, images: Tensor, ids: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        views, ids, drawn, logits = self._found(images, ids, epoch)
        if self.loss_kind == "mse":
            return views, torch.stack([logits, self._truth(ids, drawn)], 1) if self.gamma else logits
        targets = (logits / self.temperature_at(epoch)).softmax(-1)
        if self.calibrate is not None:
            low, mid, top = self.calibrate
            sure = logits.softmax(-1).amax(-1, keepdim=True)
            truth = self._truth(ids, drawn)
            smoothed = (1 - SMOOTHING) * truth + SMOOTHING / (truth.shape[1] - 1) * (1 - truth)
            targets = torch.where(sure < mid, smoothed, targets).where((sure >= low) & (sure <= top), 0.0)
        return views, targets

    def temperature_at(self, epoch: int) -> float:
        """T of the targets in a student's ``epoch``."""
        return self.temperature

    def _found(self, images: Tensor, ids: Tensor, epoch: int) -> tuple[Tensor, Tensor, MixedViews, Tensor]:
        """Views of the images, the ids on their device, what was drawn for the epoch, and float32 logits (B, C)."""
        epoch %= self.epochs
        views, ids, drawn = epoch_views(self, images, ids, epoch)
        return views, ids, drawn, self._read(torch.full_like(ids, epoch), ids).to(images.device)

    def _read(self, epochs: Tensor, ids: Tensor) -> Tensor:
        """Stored logits, float32 (B, C), of images ``ids`` (B,) in stored epochs ``epochs`` (B,)."""
        where = self.logits.device
        return self.logits[epochs.to(where), ids.to(where)].float()

    def _truth(self, ids: Tensor, drawn: MixedViews) -> Tensor:
        """The classes of views, float32 (B, C): one, or two with their shares."""
        assert self.hard is not None
        own = F.one_hot(self.hard.to(ids.device), self.shape[2]).float()
        return mixed(own, ids, drawn)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        if self.loss_kind == "kl":
            return kl_loss(logits, targets, self.temperature, self.squared)
        return logit_mse_loss(logits, targets, self.gamma)

    def arrays(self) -> dict[str, np.ndarray]:
        return {"logits": self.logits.detach().cpu().numpy(), **self._settled()}

    def _settled(self) -> dict[str, np.ndarray]:
        """The arrays of :meth:`terms`; :func:`read_init_kwargs` reads them."""
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
        """2 E N C, some bytes that the views and the loss follow from, and 8 N where the classes are needed."""
        return total_nbytes(self.arrays())

    def external_nbytes(self) -> int:
        return 0

    def to(self, device: torch.device) -> PerViewLabels:
        return copy_to(self, device, "logits", "hard")

    def anew(self, images: Tensor, teacher: nn.Module, seed: int, hard: Tensor | None = None) -> PerViewLabels:
        logits = view_answers(
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

    def rule(self) -> str:
        loss = f"{self.loss_kind}, T={self.temperature}, squared={self.squared}, gamma={self.gamma}"
        return f"{self.epochs} epochs of {self.views}, {statistics_text(self)}, {loss}, calibrate={self.calibrate}"

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], classes: int) -> PerViewLabels:
        logits = torch.from_numpy(checked_array(arrays, "logits", np.float16, (None, None, classes)))
        return cls(logits, **read_init_kwargs(arrays, classes))


PROVIDERS.add("per-view", PerViewLabels)
