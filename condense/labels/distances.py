"""Distance labels (NRR-DD): the teacher's negative log-likelihood of the two classes in each mixed view."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condense.augment import ViewRule, float32_decimal
from condense.errors import CondenseError
from condense.labels.arrays import checked_array, read_hard_labels, read_views, view_arrays
from condense.labels.base import (
    LABEL_KINDS,
    Labels,
    check_hard_labels,
    copy_to,
    epoch_views,
    statistics_text,
    total_nbytes,
)
from condense.labels.teacher_logits import (
    check_statistics,
    compute_view_nll,
    given_or_predicted_classes,
    labelled_groups,
)


class DistanceLabels(Labels):
    """Two numbers per view: the teacher's negative log-likelihood of the classes of the two mixed images (NRR-DD's
    distance-based representative, CVPR 2025).

    The stored array is float16 (E, N, 2), (-log p_i, -log p_j) of the teacher at T = 1, where i and j are the classes
    of the image and of its partner; epoch e uses the views of epoch e modulo E. The student's loss is its cross-entropy
    with the classes, weighted by their shares of the view, plus ``weight`` times |d_i - d_i^T| + |d_j - d_j^T|. Targets
    are float32 (B, 5): class, partner's class, share, and the teacher's two distances. No code is public: the form and
    the weight are a reconstruction.

    Args:
        distances: (E, N, 2) of any floating dtype, from :func:`compute_view_nll`.
        hard: Class of each image, int64 (N,).
        classes: Number of classes C.
        seed: Seed of the views.
        views: Distribution of the views, with mixing. Default: crops with CutMix.
        weight: Weight of the distances in the loss.
        statistics: BatchNorm statistics of the teacher, see :func:`compute_view_logits`.
        micro: Views per micro-batch of the teacher.

    Raises:
        CondenseError: An invalid value, or distances of another shape or not finite as float16.
    """

    kind = "distances"
    per_view = True
    exactness = "approximate"
    step_cost = "reading 4 bytes a view"

    def __init__(
        self,
        distances: Tensor,
        hard: Tensor,
        classes: int,
        seed: int,
        views: ViewRule | None = None,
        weight: float = 1.0,
        *,
        statistics: str = "running",
        micro: int = 8,
    ) -> None:
        self.distances, self.hard, self.classes = distances.half(), hard.long(), classes
        self.seed, self.weight, self.views = seed, float32_decimal(weight), views or ViewRule(mix="cutmix")
        self.statistics, self.micro = check_statistics(statistics, micro)
        if distances.ndim != 3 or not len(distances) or distances.shape[2] != 2:
            raise CondenseError(f"distances must be (epochs, images, 2), not {tuple(distances.shape)}")
        if not all(bool(epoch.isfinite().all()) for epoch in self.distances):
            raise CondenseError("distances are not finite as float16; was the teacher trained?")
        if self.views.mix == "none":
            raise CondenseError("mix=none: distances belong to the classes of two images; set mix=cutmix or mixup")
        if not 0 <= self.weight < math.inf:
            raise CondenseError(f"weight={weight:g}: must be at least 0 and finite")
        check_hard_labels(self.hard, distances.shape[1], classes)

    def __len__(self) -> int:
        return self.distances.shape[1]

    @property
    def epochs(self) -> int:
        """Number of stored epochs E, after which views and targets repeat."""
        return len(self.distances)

    def labelled_groups(self, epoch: int, size: int) -> list[Tensor] | None:
        if self.micro != size:
            return None
        return labelled_groups(self.views, self.seed, epoch % self.epochs, len(self), size)

    def training_batch(self, images: Tensor, ids: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        epoch %= self.epochs
        views, ids, drawn = epoch_views(self, images, ids, epoch)
        assert drawn.partner is not None and drawn.share is not None
        hard = self.hard.to(images.device)
        pairs = torch.stack([hard[ids], hard[drawn.partner[ids]]], 1).float()
        stored = self.distances[epoch][ids.to(self.distances.device)].to(images.device).float()
        return views, torch.cat([pairs, drawn.share[ids, None], stored], 1)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        distances = -F.log_softmax(logits, -1).gather(1, targets[:, :2].long())
        share = targets[:, 2]
        entropy = share * distances[:, 0] + (1 - share) * distances[:, 1]
        return (entropy + self.weight * (distances - targets[:, 3:]).abs().sum(1)).mean()

    def arrays(self) -> dict[str, np.ndarray]:
        return {
            "distances": self.distances.detach().cpu().numpy(),
            "hard": self.hard.cpu().numpy(),
            "loss": np.array([self.weight], np.float32),
            **view_arrays(self.views, self.seed, self.statistics, self.micro),
        }

    def nbytes(self) -> int:
        """Returns 4 E N bytes, 8 N for the classes, and the settings of the views and the loss."""
        return total_nbytes(self.arrays())

    def to(self, device: torch.device) -> DistanceLabels:
        return copy_to(self, device, "distances", "hard")

    def label_images(self, images: Tensor, teacher: nn.Module, seed: int, hard: Tensor | None = None) -> DistanceLabels:
        hard = given_or_predicted_classes(images, teacher, hard)
        distances = compute_view_nll(
            teacher,
            images,
            hard,
            self.epochs,
            self.views,
            seed,
            classes=self.classes,
            statistics=self.statistics,
            micro=self.micro,
        )
        return DistanceLabels(
            distances.to(images.device),
            hard,
            self.classes,
            seed,
            self.views,
            self.weight,
            statistics=self.statistics,
            micro=self.micro,
        )

    def cache_key(self) -> str:
        return f"{self.epochs} epochs of {self.views}, {statistics_text(self)}, weight={self.weight}"

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], classes: int) -> DistanceLabels:
        views, seed, statistics, micro = read_views(arrays)
        distances = torch.from_numpy(checked_array(arrays, "distances", np.float16, (None, None, 2)))
        (weight,) = checked_array(arrays, "loss", np.float32, (1,)).tolist()
        return cls(
            distances,
            read_hard_labels(arrays, classes),
            classes,
            seed,
            views,
            weight,
            statistics=statistics,
            micro=micro,
        )


LABEL_KINDS.add("distances", DistanceLabels)
