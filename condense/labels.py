"""Label providers: what a student is asked to predict for each distilled image, and what storing that costs.

A provider answers ``targets(ids)`` for stored images, knows the loss that goes with its targets, writes itself as plain
arrays and counts its bytes. Two live here now; providers whose targets depend on the augmented view (stored per-view
logits, live teachers, projectors) take it as ``view`` and set ``per_view = True``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from condense.errors import CondenseError
from condense.registry import Registry


class Labels(Protocol):
    """What every provider offers."""

    kind: str
    per_view: bool
    """True where the target depends on the augmented view, so that no target exists for an image by itself."""

    def __len__(self) -> int:
        """Number of stored images that have labels."""

    def targets(self, ids: Tensor, view: Any = None, mix: Any = None) -> Tensor:
        """Targets of the stored images ``ids`` (any shape), on their device."""

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean loss over the batch for logits (B, C)."""

    def arrays(self) -> dict[str, np.ndarray]:
        """What is written below ``/labels`` in the file."""

    def nbytes(self) -> int:
        """Bytes that the labels need, as the benchmark counts them."""

    def to(self, device: torch.device) -> Labels:
        """The same labels on ``device``."""


class HardLabels:
    """One class per image. ``classes`` is the number of classes C, ``labels`` int64 (N,) in 0..C-1."""

    kind = "hard"
    per_view = False

    def __init__(self, labels: Tensor, classes: int) -> None:
        self.labels, self.classes = labels.long(), classes

    def __len__(self) -> int:
        return len(self.labels)

    def targets(self, ids: Tensor, view: Any = None, mix: Any = None) -> Tensor:
        return self.labels[ids]

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits, targets)

    def arrays(self) -> dict[str, np.ndarray]:
        return {"hard": self.labels.cpu().numpy()}

    def nbytes(self) -> int:
        """ceil(log2 C) bits per image: what a packed store needs, however wide the array in the file is."""
        return math.ceil(len(self.labels) * math.ceil(math.log2(self.classes)) / 8)

    def to(self, device: torch.device) -> HardLabels:
        return HardLabels(self.labels.to(device), self.classes)

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], classes: int) -> HardLabels:
        labels = arrays["hard"]
        if labels.dtype != np.int64 or labels.ndim != 1:
            raise CondenseError(f"labels/hard must be int64 of one dimension, not {labels.dtype} {labels.shape}")
        if len(labels) and (labels.min() < 0 or labels.max() >= classes):
            raise CondenseError(f"labels/hard has values outside 0..{classes - 1}")
        return cls(torch.from_numpy(labels), classes)


class SoftLabels:
    """One distribution per image, stored as logits float32 (N, C); the target is their softmax, the loss
    cross-entropy."""

    kind = "soft"
    per_view = False

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    def __len__(self) -> int:
        return len(self.logits)

    def targets(self, ids: Tensor, view: Any = None, mix: Any = None) -> Tensor:
        return self.logits[ids].softmax(-1)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits, targets)

    def arrays(self) -> dict[str, np.ndarray]:
        return {"logits": self.logits.detach().float().cpu().numpy()}

    def nbytes(self) -> int:
        return self.logits.numel() * 4

    def to(self, device: torch.device) -> SoftLabels:
        return SoftLabels(self.logits.to(device))

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], classes: int) -> SoftLabels:
        logits = arrays["logits"]
        if logits.dtype != np.float32 or logits.ndim != 2 or logits.shape[1] != classes:
            raise CondenseError(f"labels/logits must be float32 (N, {classes}), not {logits.dtype} {logits.shape}")
        return cls(torch.from_numpy(logits))


PROVIDERS: Registry[Any] = Registry("label kind")
PROVIDERS.add("hard", HardLabels)
PROVIDERS.add("soft", SoftLabels)
