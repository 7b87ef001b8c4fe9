"""Labels of whole images: one class (``hard``) or one distribution (``soft``) per image."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condense.augment import float32_decimal
from condense.errors import CondenseError
from condense.labels.arrays import checked_array, read_finite, read_hard_labels
from condense.labels.base import LABEL_KINDS, Labels, check_image_count
from condense.labels.teacher_logits import compute_logits


class HardLabels(Labels):
    """One class per image.

    Args:
        labels: Class of each image, int64 (N,) in 0..C-1.
        classes: Number of classes C.
        smoothing: Share of the target that is spread evenly over all C classes.

    Raises:
        CondenseError: The smoothing is not in [0, 1).
    """

    kind = "hard"
    per_view = False
    is_hard = True
    exactness = "approximate"
    step_cost = "none"

    def __init__(self, labels: Tensor, classes: int, smoothing: float = 0.0) -> None:
        self.labels, self.classes, self.smoothing = labels.long(), classes, float32_decimal(smoothing)
        if not 0 <= self.smoothing < 1:
            raise CondenseError(f"smoothing={smoothing:g}: must be at least 0 and below 1")

    def __len__(self) -> int:
        return len(self.labels)

    def targets(self, ids: Tensor) -> Tensor:
        return self.labels[ids]

    def training_batch(self, images: Tensor, ids: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        check_image_count(images, self)
        return images[ids], self.targets(ids)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits, targets, label_smoothing=self.smoothing)

    def arrays(self) -> dict[str, np.ndarray]:
        smoothing = {"smoothing": np.array([self.smoothing], np.float32)} if self.smoothing else {}
        return {"hard": self.labels.cpu().numpy(), **smoothing}

    def nbytes(self) -> int:
        """Returns ceil(log2 C) bits per image, the size of a packed array whatever the dtype in the file, plus 4 bytes
        for smoothing."""
        packed = math.ceil(len(self.labels) * math.ceil(math.log2(self.classes)) / 8)
        return packed + 4 * (self.smoothing > 0)

    def to(self, device: torch.device) -> HardLabels:
        return HardLabels(self.labels.to(device), self.classes, self.smoothing)

    def label_images(self, images: Tensor, teacher: nn.Module, seed: int, hard: Tensor | None = None) -> HardLabels:
        return HardLabels(compute_logits(teacher, images).argmax(1), self.classes, self.smoothing)

    def cache_key(self) -> str:
        return f"likeliest class, smoothing={self.smoothing}"

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], classes: int) -> HardLabels:
        smoothing = checked_array(arrays, "smoothing", np.float32, (1,)) if "smoothing" in arrays else [0.0]
        return cls(read_hard_labels(arrays, classes), classes, float(smoothing[0]))


class SoftLabels(Labels):
    """One distribution per image, stored as logits; the target is their softmax, the loss the cross-entropy.

    Args:
        logits: float32 (N, C).
    """

    kind = "soft"
    per_view = False
    exactness = "approximate"
    step_cost = "a softmax"

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    def __len__(self) -> int:
        return len(self.logits)

    def targets(self, ids: Tensor) -> Tensor:
        return self.logits[ids].softmax(-1)

    def training_batch(self, images: Tensor, ids: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        check_image_count(images, self)
        return images[ids], self.targets(ids)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits, targets)

    def arrays(self) -> dict[str, np.ndarray]:
        return {"logits": self.logits.detach().float().cpu().numpy()}

    def export_tensors(self, ids: Tensor) -> dict[str, Tensor]:
        return {"logits": self.logits[ids].detach().float().cpu()}

    def nbytes(self) -> int:
        return self.logits.numel() * 4

    def to(self, device: torch.device) -> SoftLabels:
        return SoftLabels(self.logits.to(device))

    def label_images(self, images: Tensor, teacher: nn.Module, seed: int, hard: Tensor | None = None) -> SoftLabels:
        return SoftLabels(compute_logits(teacher, images))

    def cache_key(self) -> str:
        return "logits of the image"

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], classes: int) -> SoftLabels:
        return cls(read_finite(arrays, "logits", np.float32, (None, classes)))


class RegressionLabels(SoftLabels):
    """Targets of a regression per image, e.g. those of kernel methods (0.9 for the class and -0.1 for the others).

    Args:
        logits: float32 (N, C): the values that the outputs of a network should have.
    """

    kind = "regression"
    step_cost = "none"

    def targets(self, ids: Tensor) -> Tensor:
        return self.logits[ids]

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Half the squared distance, summed over classes and averaged over the batch."""
        return (logits - targets).square().sum(1).mean() / 2

    def to(self, device: torch.device) -> RegressionLabels:
        return RegressionLabels(self.logits.to(device))

    def label_images(
        self, images: Tensor, teacher: nn.Module, seed: int, hard: Tensor | None = None
    ) -> RegressionLabels:
        return RegressionLabels(compute_logits(teacher, images))

    def cache_key(self) -> str:
        return "regression targets of the image"


LABEL_KINDS.add("hard", HardLabels)

LABEL_KINDS.add("regression", RegressionLabels)

LABEL_KINDS.add("soft", SoftLabels)
