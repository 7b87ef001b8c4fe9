"""TODO-DOC."""

from __future__ import annotations

import torch
from torch import Tensor

from condense.engine import Run
from condense.methods.curriculum_synthesis.patches import confident_patches
from condense.methods.curriculum_synthesis.settings import Recovery
from condense.networks import Network
from condense.sets import SyntheticOptions, SyntheticSet


def started(config: Recovery, run: Run, net: Network) -> SyntheticSet:
    """The set as it starts: noise, real images, or RDED's patches, scored by ``net``."""
    if config.init == "patches":
        from condense.methods.curriculum_synthesis.rded import RDED

        return from_pixels(run, confident_patches(run, net, RDED()))
    return SyntheticSet.create(run.task, run.ipc, SyntheticOptions(init=config.init), seed=run.seed, device=run.device)


def from_pixels(run: Run, pixels: Tensor) -> SyntheticSet:
    """A set that starts from images (classes * ipc, C,H,W) in pixel space, sorted by class."""
    classes = torch.arange(run.task.num_classes).repeat_interleave(run.ipc)
    return SyntheticSet(run.task, run.task.transform(pixels.to(run.device)).contiguous(), classes)
