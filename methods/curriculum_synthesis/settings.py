"""TODO-DOC."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import ClassVar

import torch

from condense.augment import ViewRule
from condense.config import one_of, require
from condense.errors import CondenseError
from condense.labels import STATISTICS
from condense.pretraining import TeacherOptions

# -- views ------------------------------------------------------------------------------------------------------------

SCHEDULES = ("fixed", "step", "linear", "cosine")

LEAST = 0.08
"""Least share of the image that a crop keeps."""

# -- settings that all share ------------------------------------------------------------------------------------------

STORES = {"uint8": torch.uint8, "float16": torch.float16, "float32": torch.float32}

STARTS = ("noise", "real", "patches")

LABELS = ("per-view", "teacher", "static", "distances", "soft", "hard")


@dataclass(frozen=True)
class Relabelling(TeacherOptions):
    """What labels a set brings, and who gives them."""

    labels: str = "per-view"
    """per-view (stored logits of augmented views), teacher (the teachers' weights; they answer while students learn),
    static (one vector of logits an image, mixed as images are), distances (NRR-DD's two numbers a view), soft, hard."""
    label_epochs: int = 300
    """Epochs of views that are labelled, where labels belong to views."""
    temperature: float = 20.0
    """Temperature of targets and loss."""
    squared: bool = True
    """Whether the loss is multiplied by the squared temperature. Released students on CIFAR and ImageNet-1K do without;
    their AdamW hardly minds, but SGD would hardly move."""
    label_scale: float = LEAST
    """Least share of the image in a labelled view."""
    label_pad: int = 0
    """Labelled views are shifted by up to so many pixels instead of being cropped; 0: cropped."""
    mix: str = "cutmix"
    """How labelled views are mixed with those of other images: none, cutmix or mixup."""
    mix_alpha: float = 1.0
    """Shares of the mixture are drawn from Beta(mix_alpha, mix_alpha)."""
    label_statistics: str = "running"
    """BatchNorm of the teachers that label: running, or batch (that of the labelled views themselves)."""
    label_micro: int = 8
    """Views that share statistics where label_statistics=batch."""
    calibrate: str = ""
    """FerKD's LOW,MID,TOP of the teacher's confidence in a view, for labels=per-view: below LOW and above TOP the view
    is left out, below MID its class, smoothed, takes the label's place. Empty: all labels as they are."""
    store: str = "uint8"
    """How images are kept: uint8, float16 or float32. Labels are those of the images as kept."""

    kinds: ClassVar[tuple[str, ...]] = LABELS  # pool too, where the settings have those of Pruning

    def __post_init__(self) -> None:
        self.check_teachers()
        one_of(self, labels=self.kinds, store=STORES, label_statistics=STATISTICS)
        require(self, label_epochs=(1, math.inf), label_micro=(2, math.inf), temperature=(1e-6, sys.float_info.max))
        self.rule(mirror=True)
        self.thresholds()
        if self.labels == "distances" and self.mix == "none":
            raise CondenseError("mix=none: labels=distances are to the classes of two images; take cutmix or mixup")

    def thresholds(self) -> list[float] | None:
        """``calibrate`` as three numbers; None where it is empty."""
        if not self.calibrate:
            return None
        if self.labels != "per-view":
            raise CondenseError(f"calibrate={self.calibrate}: serves labels=per-view, not labels={self.labels}")
        try:
            low, mid, top = map(float, self.calibrate.split(","))
        except ValueError:
            raise CondenseError(f"calibrate={self.calibrate}: must be LOW,MID,TOP, e.g. 0.15,0.3,0.95") from None
        return [low, mid, top]

    def rule(self, mirror: bool) -> ViewRule:
        """The views that are labelled."""
        return ViewRule(self.label_scale, 1.0, mirror, self.label_pad, self.mix, self.mix_alpha)


@dataclass(frozen=True)
class Recovery(Relabelling):
    """Hyper-parameters of recovering images from teachers; SRe2L's on small images."""

    steps: int = 1000
    """Iterations of each image."""
    init: str = "noise"
    """How images start: noise (N(0,1)), real (random real images) or patches (RDED's)."""
    lr_img: float = 0.25
    """Learning rate of Adam on the pixels; it falls to 0 along a cosine."""
    bn_weight: float = 0.01
    """Weight of the distances to BatchNorm statistics (lambda), which are sums over layers: deep teachers need less."""
    bn_first: float = 10.0
    """Weight of the first BatchNorm; all others weigh 1."""
    bn_mean: bool = False
    """Average the distances over BatchNorms instead of adding them up: one weight then serves teachers of any depth."""
    bn_variance: float = 1.0
    """Weight of variances; means weigh 1."""
    batch_classes: int = 100
    """Classes of a batch, which has one image of each; its images share moments and crops."""
    min_scale: float = LEAST
    """Least share of the image that a crop keeps; 1 for no crops."""
    schedule: str = "fixed"
    """Curriculum of the least share: fixed, or falling from 1 by step, linear or cosine (CDA)."""
    milestone: float = 1.0
    """Fraction of the steps at which the curriculum has arrived."""
    flip: bool = True
    """Whether views are mirrored at random; never where a mirror image is another class."""
    jitter: int = 4
    """Views are rolled by up to so many pixels, to the right and down."""
    two_sided: bool = False
    """Rolled to the left and up as well, as in SRe2L's program for Tiny-ImageNet."""
    per_image: bool = False
    """Crops drawn for each image; by default for each batch, as in all published programs."""

    at_once: int | None = None
    """Images of each class that move together; all by default. Fewer need less memory: beside all pixels once, some
    eight times the float32 pixels of these. A time limit then leaves the last ones as they started."""

    starts: ClassVar[tuple[str, ...]] = STARTS

    def __post_init__(self) -> None:
        super().__post_init__()
        largest = sys.float_info.max
        one_of(self, init=self.starts, schedule=SCHEDULES)
        require(
            self, steps=(1, math.inf), lr_img=(0, largest), bn_weight=(0, largest), bn_first=(0, largest),
            bn_variance=(0, largest), batch_classes=(1, math.inf), min_scale=(1e-4, 1), milestone=(0, 1),
            jitter=(0, math.inf), at_once=(1, math.inf),
        )  # fmt: skip
