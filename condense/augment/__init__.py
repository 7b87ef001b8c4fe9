"""Augmentation: differentiable augmentation of a batch, CutMix, and the reproducible views that labels belong to."""

from condense.augment.resample import send
from condense.augment.siamese import OPERATIONS, VARIANTS, Augmentation, Parameters, cutmix, dsa
from condense.augment.views import MIXES, SHARES, CropViews, MixedViews, ViewRule, Views, resampling, seen, single

__all__ = [
    "MIXES",
    "OPERATIONS",
    "SHARES",
    "VARIANTS",
    "Augmentation",
    "CropViews",
    "MixedViews",
    "Parameters",
    "ViewRule",
    "Views",
    "cutmix",
    "dsa",
    "resampling",
    "seen",
    "send",
    "single",
]
