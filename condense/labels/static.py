"""Static labels (INFER): one vector of logits per image, mixed as its views are mixed."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from condense.augment import CropViews, ViewRule
from condense.errors import CondenseError
from condense.labels.arrays import checked_array, read_views, view_arrays
from condense.labels.base import (
    LABEL_KINDS,
    Labels,
    checked_temperature,
    copy_to,
    epoch_views,
    kl_loss,
    mix_rows,
    total_nbytes,
)
from condense.labels.teacher_logits import compute_logits


class StaticLabels(Labels):
    """One vector of logits z per image; the target of a view mixed from images i and j is softmax((lambda z_i +
    (1 - lambda) z_j) / T), whatever its crop and flip (INFER, Zhang et al., ICLR 2025).

    The loss is the KL divergence to the student's softmax at T. Every epoch has its own views. In the paper z is the
    mean logits of several teachers in eval mode on the unaugmented image, with T = 30, MixUp Beta(.8, .8), shifts by up
    to 4 pixels on small images, and no factor T^2.

    Args:
        logits: (N, C); float16 is stored unchanged, other dtypes as float32.
        seed: Seed of the views.
        views: Distribution of the views. Default: that of the paper.
        temperature: T, rounded to float32.
        squared: Whether the loss is multiplied by T^2.

    Raises:
        CondenseError: An invalid value, or logits of another shape or not finite.
    """

    kind = "static"
    per_view = True
    exactness = "approximate"
    step_cost = "reading one or two vectors a view"

    def __init__(
        self,
        logits: Tensor,
        seed: int,
        views: CropViews | ViewRule | None = None,
        temperature: float = 30.0,
        squared: bool = False,
    ) -> None:
        self.logits = logits if logits.dtype == torch.float16 else logits.float()
        self.seed, self.temperature, self.squared = seed, checked_temperature(temperature), squared
        self.views = ViewRule(pad=4, mix="mixup", alpha=0.8) if views is None else ViewRule.of(views)
        if logits.ndim != 2:
            raise CondenseError(f"static logits must be (images, classes), not {tuple(logits.shape)}")
        if not bool(self.logits.isfinite().all()):
            raise CondenseError(f"static logits are not finite as {self.logits.dtype}; was the teacher trained?")
        if not bool((self.logits.float() / self.temperature).isfinite().all()):
            raise CondenseError(f"temperature={self.temperature:g}: the static logits divided by it are not finite")

    def __len__(self) -> int:
        return len(self.logits)

    def targets(self, ids: Tensor) -> Tensor:
        """Returns the distributions at T of the unmixed images, float32 (..., C)."""
        return (self.logits[ids].float() / self.temperature).softmax(-1)

    def training_batch(self, images: Tensor, ids: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        views, ids, drawn = epoch_views(self, images, ids, epoch)
        logits = mix_rows(self.logits.to(images.device).float(), ids, drawn)
        return views, (logits / self.temperature).softmax(-1)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return kl_loss(logits, targets, self.temperature, self.squared)

    def arrays(self) -> dict[str, np.ndarray]:
        return {
            "logits": self.logits.detach().cpu().numpy(),
            "loss": np.array([self.temperature], np.float32),
            "flags": np.array([self.squared], np.uint8),
            **view_arrays(self.views, self.seed),
        }

    def nbytes(self) -> int:
        """Returns 2 or 4 N C bytes, plus the settings of the views and the loss."""
        return total_nbytes(self.arrays())

    def to(self, device: torch.device) -> StaticLabels:
        return copy_to(self, device, "logits")

    def label_images(self, images: Tensor, teacher: nn.Module, seed: int, hard: Tensor | None = None) -> StaticLabels:
        logits = compute_logits(teacher, images).to(self.logits.dtype)
        return StaticLabels(logits, seed, self.views, self.temperature, self.squared)

    def cache_key(self) -> str:
        return f"{self.logits.dtype} of the image, {self.views}, T={self.temperature}, squared={self.squared}"

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], classes: int) -> StaticLabels:
        views, seed, _, _ = read_views(arrays)
        (temperature,) = checked_array(arrays, "loss", np.float32, (1,)).tolist()
        (squared,) = checked_array(arrays, "flags", np.uint8, (1,)).tolist()
        kind = np.float16 if arrays["logits"].dtype == np.float16 else np.float32
        logits = torch.from_numpy(checked_array(arrays, "logits", kind, (None, classes)))
        return cls(logits, seed, views, temperature, bool(squared))


LABEL_KINDS.add("static", StaticLabels)
