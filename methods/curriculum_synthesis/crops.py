"""Crops, mirrors and rolls of recovery, drawn for each step."""

from __future__ import annotations

import math

from torch import Tensor

from condense import rng
from condense.augment import CropViews, resampling_matrices
from condense.device import upload
from condense.engine import Run
from condense.methods.curriculum_synthesis.settings import MIN_CROP_AREA, RecoveryOptions


def crop_scale(schedule: str, t: int, steps: int, milestone: float, least: float = MIN_CROP_AREA) -> float:
    """CDA's lower bound of the crop's area at iteration ``t`` of ``steps``, from 1 (whole images) to ``least``.

    Args:
        schedule: fixed (``least`` all the time), step (1 until the milestone), linear or cosine (falling until then).
        t: iteration, from 0.
        steps: of the whole run.
        milestone: fraction of the steps after which it is ``least``.
        least: share of the area.
    """
    if schedule == "fixed" or t >= milestone * steps:
        return least
    done = t / (milestone * steps)
    falling = {"step": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return least + (1 - least) * falling[schedule]


def draw_crops(config: RecoveryOptions, run: Run, index: int, count: int, selected: Tensor) -> tuple[Tensor, Tensor]:
    """Resampling matrices for rows and columns of the views of a step (see :func:`condense.augment.resampling`).

    Args:
        config: settings of the method.
        run: the run.
        index: the step.
        count: views that are drawn, one for each batch or image of the set.
        selected: which of them become matrices, int64; all ranks draw all views.
    """
    least = crop_scale(config.schedule, index, config.steps, config.milestone, config.min_scale)
    crops = CropViews(least, 1.0, config.flip and run.task.mirror)
    views = crops.draw(rng.Draws(run.seed, "crop", index), count, (run.task.shape[1], run.task.shape[2]))
    reach, low = (2 * config.jitter + 1, config.jitter) if config.two_sided else (config.jitter + 1, 0)
    shift = rng.Draws(run.seed, "roll", index).integers(reach, (count, 2)) - low
    rows, columns = (upload(matrix, run.device) for matrix in resampling_matrices(views[selected], shift[selected]))
    return rows, columns
