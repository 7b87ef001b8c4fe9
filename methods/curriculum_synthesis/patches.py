"""Crops of real images, scored by a teacher (RDED), and collages of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from condense import rng
from condense.augment import ViewBoxes, apply_resampling, resampling_matrices
from condense.data import Task
from condense.engine import Run
from condense.errors import CondenseError
from condense.labels import compute_logits
from condense.methods.curriculum_synthesis.settings import MIN_CROP_AREA
from condense.networks import Network

POOL, CROPS = 300, 5
"""Real images of each class that crops are taken from, and crops of each, as published."""


def square_crops(images: Tensor, draws: rng.Draws, crops: int, size: int) -> tuple[Tensor, ViewBoxes]:
    """Random square crops (N * crops, C, size, size) of images (N, C, H, W), and their boxes; image by image.

    Areas are uniform in 8 to 100 % of the largest square, positions too.
    """
    count, _, height, width = images.shape
    rows = count * crops
    edge = (draws.uniform(rows, MIN_CROP_AREA, 1.0).double().sqrt() * min(height, width)).round().long().clamp(min=1)
    position = draws.uniform((rows, 2)).double()
    top = (position[:, 0] * (height - edge + 1)).long()
    left = (position[:, 1] * (width - edge + 1)).long()
    views = ViewBoxes((height, width), torch.stack([top, left, edge, edge], 1), torch.zeros(rows, dtype=torch.bool))
    return crop_images(images.repeat_interleave(crops, 0), views, size), views


def crop_images(images: Tensor, views: ViewBoxes, size: int) -> Tensor:
    """The box of each image (N, C, H, W), resized to (N, C, size, size)."""
    rows, columns = resampling_matrices(views, torch.zeros(len(views), 2, dtype=torch.int64), (size, size))
    return apply_resampling(images[:, None], rows.to(images.device), columns.to(images.device))[:, 0]


def crop_losses(run: Run, net: Network, crops: Tensor, classes: Tensor) -> Tensor:
    """Cross-entropy (N,) of crops, padded with zeros to the size of images."""
    height, width = run.task.shape[1:]
    down, right = height - crops.shape[2], width - crops.shape[3]
    padded = F.pad(crops, (right // 2, right - right // 2, down // 2, down - down // 2))
    return F.cross_entropy(compute_logits(net, padded), classes, reduction="none")


def sample_pool(run: Run, c: int, pool: int) -> Tensor:
    """Up to ``pool`` random real images of class ``c``, in training space."""
    return run.task.per_class(pool, (run.seed, "pool"), [c])[0]


def get_crop_size(task: Task, factor: int, setting: str) -> int:
    """Edge of a crop in pixels.

    Raises:
        CondenseError: images cannot be divided into such squares; the message names the user's ``setting``.
    """
    _, height, width = task.shape
    if height != width or height % factor:
        divisible = f" that {factor} divides" * (factor > 1)
        raise CondenseError(f"{setting}: images of {task.name} are {height}x{width}; crops need squares{divisible}")
    return height // factor


def most_confident_crops(
    run: Run, net: Network, c: int, pool: int, crops: int, factor: int = 1
) -> tuple[Tensor, Tensor, ViewBoxes]:
    """The crops (M, C, s, s) of class ``c`` that a teacher is most confident of, M = ipc * factor^2, the whole real
    images (M, C, H, W) that they are of, and their boxes.

    Each real image contributes its crop with the lowest cross-entropy; the lowest of these are taken. Where the pool is
    too small, crops are repeated.
    """
    size, needed = get_crop_size(run.task, factor, f"factor={factor}"), run.ipc * factor**2
    images = sample_pool(run, c, pool)
    candidates, views = square_crops(images, rng.Draws(run.seed, "patches", c), crops, size)
    classes = torch.full((len(candidates),), c, device=candidates.device)
    losses = crop_losses(run, net, candidates, classes).view(len(images), crops)
    lowest, which = losses.min(1)
    order = lowest.argsort(stable=True)
    order = order[torch.arange(needed, device=order.device) % len(order)]
    chosen = order * crops + which[order]
    return candidates[chosen], images[order], views[chosen.cpu()]


def confident_patches(run: Run, net: Network, pool: int, crops: int, factor: int = 1) -> Tensor:
    """Images (classes * ipc, C, H, W) in pixel space: collages of the crops that a teacher is most confident of."""
    tiles = torch.cat([most_confident_crops(run, net, c, pool, crops, factor)[0] for c in range(run.task.num_classes)])
    return run.task.transform.inverse(make_collages(tiles, factor)).clamp(0, 1)


def make_collages(tiles: Tensor, factor: int) -> Tensor:
    """Images (N, C, S, S) of factor x factor tiles (N * factor^2, C, s, s) each, row by row."""
    grid = tiles.view(-1, factor, factor, *tiles.shape[1:])
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(len(grid), tiles.shape[1], factor * tiles.shape[2], -1)


def split_collages(images: Tensor, factor: int) -> Tensor:
    """The tiles of :func:`make_collages`."""
    count, channels, height, width = images.shape
    grid = images.view(count, channels, factor, height // factor, factor, width // factor)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels, height // factor, width // factor)
