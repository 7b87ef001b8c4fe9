"""Settings of each kind of labels."""

from __future__ import annotations

import math
import re
import sys
from dataclasses import dataclass

import torch

from condense.config import require_one_of, require_range
from condense.errors import CondenseError
from condense.labels import PruningOptions, check_loss
from condense.lighten.projection import Projection

DEFAULT_LABEL_EPOCHS = 300
"""Labelled epochs of views, unless the set or the settings give a number."""

# Settings -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ViewOptions:
    """How views are drawn and labelled. Settings that are left out are those of the set's labels of views."""

    label_scale: float | None = None
    """Least share of the image area in a view; otherwise 0.08."""
    label_pad: int | None = None
    """Views are shifted by up to this many pixels instead of being cropped; 0: cropped."""
    label_pad_value: str | None = None
    """Padding of shifted views: mean (zeros in training space) or black."""
    mix: str | None = None
    """How views are mixed with those of other images: none, cutmix or mixup; otherwise cutmix."""
    mix_alpha: float | None = None
    """Mixing ratios are drawn from Beta(mix_alpha, mix_alpha)."""
    mix_batch: int | None = None
    """Images that share a mixing ratio and a box, and are mixed among themselves; 0: each image has its own."""
    label_statistics: str | None = None
    """BatchNorm statistics of the teachers: running, or batch (those of the labelled views themselves)."""
    label_micro: int | None = None
    """Views that share batch statistics, for label_statistics=batch."""
    label_seed: int | None = None
    """Seed of the views; otherwise derived from that of the set."""


@dataclass(frozen=True)
class TargetOptions(ViewOptions):
    """Views, and the targets of students."""

    temperature: float | None = None
    """Temperature of targets and loss; otherwise 20."""
    squared: bool | None = None
    """Whether the loss is multiplied by the squared temperature; otherwise true."""

    def __post_init__(self) -> None:
        require_range(self, temperature=(1e-6, sys.float_info.max))


@dataclass(frozen=True)
class PerViewOptions(TargetOptions):
    """Settings of labels of views."""

    label_epochs: int | None = None
    """Labelled epochs of views; otherwise all that are stored, or 300."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self, label_epochs=(1, math.inf))


@dataclass(frozen=True)
class LowRankOptions(PerViewOptions):
    """Settings of labels=lowrank."""

    rank: int | None = None
    """Axes (r), and bytes per view; otherwise a quarter of the classes, at most 64."""


@dataclass(frozen=True)
class TopKOptions(PerViewOptions):
    """Settings of labels=topk."""

    k: int | None = None
    """Logits stored per view; otherwise a quarter of the classes, at most 10."""
    fill: str = "mrs"
    """Value of the other logits: mrs (the view's smallest logit) or mr (nothing; the k share all probability)."""


@dataclass(frozen=True)
class PoolOptions(PruningOptions, PerViewOptions):
    """Settings of labels=pool."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_pruning()


@dataclass(frozen=True)
class TeacherLabelOptions(TargetOptions):
    """Settings of labels=teacher."""

    weights: str = "int8"
    """Data type of the stored weights: int8 (of convolutions and linear layers) or float32."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_one_of(self, weights=("int8", "float32"))


@dataclass(frozen=True)
class ProjectorOptions(Projection, TargetOptions):
    """Settings of labels=projector."""

    loss_kind: str = ""
    """Loss of students: kl (at the temperature) or mse (of logits, as published); otherwise as in the set's labels, or
    kl."""
    gamma: float | None = None
    """Weight of the cross-entropy with the images' classes, for loss_kind=mse (beta); otherwise as in the set's labels,
    or 0."""
    weak_epochs: str = ""
    """If --teachers is a file of experts: the epochs whose mean logits are used, e.g. 2,4,6; the labels' epoch by
    default."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_projection()
        check_loss(self.loss_kind or "kl", self.gamma or 0.0, torch.zeros(0))
        if self.weak_epochs and not re.fullmatch(r"[0-9]+(,[0-9]+)*", self.weak_epochs):
            raise CondenseError(f"weak_epochs={self.weak_epochs}: must be numbers of epochs, e.g. 2,4,6")


@dataclass(frozen=True)
class StaticOptions(TargetOptions):
    """Settings of labels=static. What is left out is as in the set's static labels, otherwise as in sets that INFER
    makes: label_pad=4, mix=mixup, mix_alpha=0.8, temperature=30, squared=true."""


@dataclass(frozen=True)
class DistanceOptions(ViewOptions):
    """Settings of labels=distances."""

    label_epochs: int | None = None
    """Labelled epochs of views; otherwise all that are stored, or 300."""
    weight: float = 1.0
    """Of the distances in the loss."""

    def __post_init__(self) -> None:
        require_range(self, label_epochs=(1, math.inf), weight=(0, sys.float_info.max))


@dataclass(frozen=True)
class SoftOptions:
    """Soft labels have nothing to set."""


@dataclass(frozen=True)
class HardOptions:
    """Settings of labels=hard."""

    smoothing: float = 0.0
    """Share of the target that is spread evenly over all classes."""
