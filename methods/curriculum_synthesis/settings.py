"""Settings that the methods of curriculum synthesis share: how images are recovered, and how they are labelled."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import ClassVar

import torch

from condense.config import require_one_of, require_range
from condense.errors import CondenseError
from condense.labels import STATISTICS, LabelViewOptions
from condense.pretraining import TeacherOptions

CROP_SCHEDULES = ("fixed", "step", "linear", "cosine")

MIN_CROP_AREA = 0.08
"""Least share of the image area that a crop keeps."""

STORAGE_DTYPES = {"uint8": torch.uint8, "float16": torch.float16, "float32": torch.float32}

RECOVERY_INITS = ("noise", "real", "patches")

RELABEL_KINDS = ("per-view", "teacher", "static", "distances", "soft", "hard")


@dataclass(frozen=True)
class RelabelOptions(LabelViewOptions, TeacherOptions):
    """Which labels a set stores, and which teachers give them."""

    labels: str = "per-view"
    """per-view (stored logits of augmented views), teacher (the teachers' weights, which label views while students
    train), static (one vector of logits per image, mixed as images are), distances (two negative log-likelihoods per
    view, as in NRR-DD), soft (one vector of logits per image) or hard (classes)."""
    label_epochs: int = 300
    """Epochs of views that are labelled, for labels that belong to views."""
    temperature: float = 20.0
    """Temperature of targets and loss."""
    squared: bool = True
    """Whether the loss is multiplied by the squared temperature. Released students on CIFAR and ImageNet-1K omit it,
    which matters little to their AdamW; SGD would make very small steps."""
    label_statistics: str = "running"
    """BatchNorm statistics of the teachers that label: running, or batch (those of the labelled views themselves)."""
    label_micro: int = 8
    """Views that share batch statistics, for label_statistics=batch."""
    calibrate: str = ""
    """FerKD's thresholds LOW,MID,TOP of the teacher's confidence in a view, for labels=per-view: views below LOW and
    above TOP are left out, views below MID get their smoothed class as label. Empty: no calibration."""
    store: str = "uint8"
    """Data type of the stored images: uint8, float16 or float32. Labels are made for the images as stored."""

    label_kinds: ClassVar[tuple[str, ...]] = RELABEL_KINDS  # and pool, for settings that include PruningOptions

    def __post_init__(self) -> None:
        self.check_teachers()
        require_one_of(self, labels=self.label_kinds, store=STORAGE_DTYPES, label_statistics=STATISTICS)
        require_range(
            self, label_epochs=(1, math.inf), label_micro=(2, math.inf), temperature=(1e-6, sys.float_info.max)
        )
        self.check_views()
        self.thresholds()
        if self.labels == "distances" and self.mix == "none":
            raise CondenseError("mix=none: labels=distances are to the classes of two images; take cutmix or mixup")

    def thresholds(self) -> list[float] | None:
        """``calibrate`` as three numbers; None if it is empty."""
        if not self.calibrate:
            return None
        if self.labels != "per-view":
            raise CondenseError(f"calibrate={self.calibrate}: serves labels=per-view, not labels={self.labels}")
        try:
            low, mid, top = map(float, self.calibrate.split(","))
        except ValueError:
            raise CondenseError(f"calibrate={self.calibrate}: must be LOW,MID,TOP, e.g. 0.15,0.3,0.95") from None
        return [low, mid, top]


@dataclass(frozen=True)
class RecoveryOptions(RelabelOptions):
    """Hyper-parameters of recovering images from teachers; the defaults are SRe2L's for small images."""

    steps: int = 1000
    """Optimisation steps of each image."""
    init: str = "noise"
    """Initial images: noise (N(0,1)), real (random real images) or patches (crops that a teacher is confident of,
    RDED)."""
    lr_img: float = 0.25
    """Learning rate of Adam on the pixels, annealed to 0 along a cosine."""
    bn_weight: float = 0.01
    """Weight of the distances to BatchNorm statistics (lambda). They are sums over layers, so deep teachers need
    less."""
    bn_first: float = 10.0
    """Weight of the first BatchNorm; all others have weight 1."""
    bn_mean: bool = False
    """Average the distances over BatchNorms instead of summing them, so that one weight fits teachers of any depth."""
    bn_variance: float = 1.0
    """Weight of variances; means have weight 1."""
    batch_classes: int = 100
    """Classes per batch, with one image each; the images of a batch share moments and crops."""
    min_scale: float = MIN_CROP_AREA
    """Least share of the image area that a crop keeps; 1 for no crops."""
    schedule: str = "fixed"
    """Curriculum of the least share: fixed, or falling from 1 by step, linear or cosine (CDA)."""
    milestone: float = 1.0
    """Fraction of the steps at which the curriculum has reached min_scale."""
    flip: bool = True
    """Mirror views at random; never for data whose mirror images belong to another class."""
    jitter: int = 4
    """Views are rolled by up to this many pixels, to the right and down."""
    two_sided: bool = False
    """Roll to the left and up as well, as in SRe2L's program for Tiny-ImageNet."""
    per_image: bool = False
    """Draw crops for each image; by default one for each batch, as in all published programs."""

    at_once: int | None = None
    """Images of each class that are optimised together; all by default. Fewer need less memory: all pixels once, plus
    about eight times the float32 pixels of these. With a time limit the last ones then stay as initialised."""

    inits: ClassVar[tuple[str, ...]] = RECOVERY_INITS
    steps_change_schedule: ClassVar[bool] = True  # a finished run cannot be given more steps

    def __post_init__(self) -> None:
        super().__post_init__()
        largest = sys.float_info.max
        require_one_of(self, init=self.inits, schedule=CROP_SCHEDULES)
        counts = dict.fromkeys(("steps", "batch_classes", "at_once"), (1, math.inf))
        factors = dict.fromkeys(("lr_img", "bn_weight", "bn_first", "bn_variance"), (0, largest))
        require_range(self, **counts, **factors, min_scale=(1e-4, 1), milestone=(0, 1), jitter=(0, math.inf))
