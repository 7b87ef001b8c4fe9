"""Augmentation: differentiable augmentation of a batch, CutMix, and the reproducible views that labels belong to."""

from condense.augment.policies import POLICIES, ImagePolicy
from condense.augment.siamese import (
    OPERATIONS,
    VARIANTS,
    Augmentation,
    AugmentationParameters,
    cutmix,
    make_augmentation,
)
from condense.augment.views import (
    MIXES,
    PAD_VALUES,
    SHARE_STEPS,
    CropViews,
    MixedViews,
    ViewBoxes,
    ViewRule,
    apply_resampling,
    float32_decimal,
    resampling_matrices,
)

__all__ = [
    "MIXES",
    "OPERATIONS",
    "PAD_VALUES",
    "POLICIES",
    "SHARE_STEPS",
    "VARIANTS",
    "Augmentation",
    "AugmentationParameters",
    "CropViews",
    "ImagePolicy",
    "MixedViews",
    "ViewBoxes",
    "ViewRule",
    "apply_resampling",
    "cutmix",
    "float32_decimal",
    "make_augmentation",
    "resampling_matrices",
]
