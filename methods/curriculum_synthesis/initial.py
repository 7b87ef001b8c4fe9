"""Initial images of recovery: noise, real images, or crops of real images that a teacher is confident of."""

from __future__ import annotations

import torch
from torch import Tensor

from condense.engine import Run
from condense.methods.curriculum_synthesis.patches import CROPS, POOL, confident_patches
from condense.methods.curriculum_synthesis.settings import RecoveryOptions
from condense.networks import Network
from condense.sets import SyntheticOptions, SyntheticSet


def create_initial_set(config: RecoveryOptions, run: Run, net: Network) -> SyntheticSet:
    """The set before its first step: noise, real images, or RDED's patches, scored by ``net``."""
    if config.init == "patches":
        return set_from_pixels(run, confident_patches(run, net, POOL, CROPS))
    return SyntheticSet.create(run.task, run.ipc, SyntheticOptions(init=config.init), seed=run.seed, device=run.device)


def set_from_pixels(run: Run, pixels: Tensor) -> SyntheticSet:
    """A set that starts from images (classes * ipc, C, H, W) in pixel space, sorted by class."""
    classes = torch.arange(run.task.num_classes).repeat_interleave(run.ipc)
    return SyntheticSet(run.task, run.task.transform(pixels.to(run.device)).contiguous(), classes)
