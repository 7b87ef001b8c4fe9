"""Feature labels: the vector that a network should map each image to, for sets that pretrain networks."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condense.errors import CondenseError
from condense.labels.arrays import read_finite, to_numpy
from condense.labels.base import LABEL_KINDS, Labels, check_image_count, copy_to


class FeatureLabels(Labels):
    """One vector of features per image, the target of all outputs of a network (KRR-ST, Lee et al., ICLR 2024).

    A network that is trained on them has D outputs instead of one per class, and is then given a classifier in their
    place. The loss is the squared error, averaged over outputs and batch.

    Args:
        features: float32 (N, D).
    """

    kind = "features"
    per_view = False
    exactness = "approximate"
    step_cost = "none"

    def __init__(self, features: Tensor) -> None:
        self.features = features
        self.outputs = features.shape[1]

    def __len__(self) -> int:
        return len(self.features)

    def targets(self, ids: Tensor) -> Tensor:
        return self.features[ids]

    def training_batch(self, images: Tensor, ids: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        check_image_count(images, self)
        return images[ids], self.targets(ids)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(logits, targets)

    def arrays(self) -> dict[str, np.ndarray]:
        return {"features": to_numpy(self.features.float())}

    def nbytes(self) -> int:
        return self.features.numel() * 4

    def to(self, device: torch.device) -> FeatureLabels:
        return copy_to(self, device, "features")

    @torch.no_grad()
    def label_images(self, images: Tensor, teacher: nn.Module, seed: int, hard: Tensor | None = None) -> FeatureLabels:
        """Labels other images with the features of ``teacher``, the ``embed`` of a network in eval mode.

        Raises:
            CondenseError: ``teacher`` has no features, or not as many as these labels.
        """
        if not hasattr(teacher, "embed"):
            raise CondenseError(f"features labels need a network with features, not {type(teacher).__name__}")
        features = torch.cat([teacher.embed(part).float() for part in images.split(256)])  # type: ignore[operator]
        if features.shape[1] != self.outputs:
            raise CondenseError(f"the teacher has {features.shape[1]} features, the labels have {self.outputs}")
        return FeatureLabels(features)

    def cache_key(self) -> str:
        return "features of the image"

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], classes: int) -> FeatureLabels:
        features = read_finite(arrays, "features", np.float32, (None, None))
        if not features.shape[1]:
            raise CondenseError("labels/features has no columns; copy or make the set again")
        return cls(features)


LABEL_KINDS.add("features", FeatureLabels)
