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

GROUPINGS = ("neighbours", "strided")
"""Ways to put crops into collages, see :func:`group_crops`."""


def square_crops(images: Tensor, draws: rng.Draws, crops: int, size: int) -> tuple[Tensor, ViewBoxes]:
    """Random square crops (N * crops, C, size, size) of images (N, C, H, W), and their boxes; image by image.

    Areas are uniform from 8 % of the image to its largest square, positions too.
    """
    count, _, height, width = images.shape
    areas, positions = draws.uniform(count * crops), draws.uniform((count * crops, 2))
    views = square_boxes((height, width), areas, positions)
    return crop_images(images.repeat_interleave(crops, 0), views, size), views


def square_boxes(image_size: tuple[int, int], areas: Tensor, positions: Tensor) -> ViewBoxes:
    """Square boxes in images of ``image_size`` (H, W) from uniform numbers in [0, 1): areas (R,) and positions (R, 2).
    Areas are uniform from 8 % of the image to its largest square."""
    height, width = image_size
    side = min(height, width)
    least = min(1.0, MIN_CROP_AREA * (height * width / side**2))
    edge = ((areas * (1.0 - least) + least).double().sqrt() * side).round().long().clamp(min=1)
    top = (positions[:, 0].double() * (height - edge + 1)).long()
    left = (positions[:, 1].double() * (width - edge + 1)).long()
    box = torch.stack([top, left, edge, edge], 1)
    return ViewBoxes(image_size, box, torch.zeros(len(box), dtype=torch.bool))


def cut_crops(run: Run, ids: Tensor, areas: Tensor, positions: Tensor, size: int) -> Tensor:
    """Square crops (R, C, size, size) of train images ``ids`` (N,), image by image, R / N of each.

    Images are those of the data before resize and crop, where these are known. For ``areas`` and ``positions`` see
    :func:`square_boxes`.
    """
    task, crops = run.task, len(areas) // len(ids)
    if not task.has_originals:
        views = square_boxes((task.shape[1], task.shape[2]), areas, positions)
        return crop_images(task.batch(ids).repeat_interleave(crops, 0), views, size)
    parts = []
    for image, *numbers in zip(task.originals(ids), areas.split(crops), positions.split(crops)):
        views = square_boxes((image.shape[1], image.shape[2]), *numbers)
        parts.append(crop_images(image.expand(crops, -1, -1, -1), views, size))
    return torch.cat(parts)


def crop_images(images: Tensor, views: ViewBoxes, size: int) -> Tensor:
    """The box of each image (N, C, H, W), resized to (N, C, size, size), with antialiasing."""
    shift = torch.zeros(len(views), 2, dtype=torch.int64)
    rows, columns = resampling_matrices(views, shift, (size, size), antialias=True)
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
    run: Run, net: Network, c: int, pool: int, crops: int, factor: int = 1, side: int | None = None
) -> Tensor:
    """The crops of class ``c`` that a teacher is most confident of, (M, C, side, side), M = ipc * factor^2.

    Each of ``pool`` real images contributes the one of its ``crops`` crops with the lowest cross-entropy at 1 / factor
    of the images' size; the lowest of these are taken. Where the pool is too small, crops are repeated. ``side`` is
    that size by default.
    """
    size, needed = get_crop_size(run.task, factor, f"factor={factor}"), run.ipc * factor**2
    ids, draws = run.task.sample_ids(pool, (run.seed, "pool"), [c]), rng.Draws(run.seed, "patches", c)
    areas, positions = draws.uniform(len(ids) * crops), draws.uniform((len(ids) * crops, 2))
    candidates = cut_crops(run, ids, areas, positions, size)
    classes = torch.full((len(candidates),), c, device=candidates.device)
    lowest, which = crop_losses(run, net, candidates, classes).view(-1, crops).min(1)
    order = lowest.argsort(stable=True)
    order = order[torch.arange(needed, device=order.device) % len(order)]
    chosen = order * crops + which[order]
    if side in (None, size):
        return candidates[chosen]
    rows = chosen.cpu()
    return cut_crops(run, ids[rows // crops], areas[rows], positions[rows], side)


def confident_patches(
    run: Run, net: Network, pool: int, crops: int, factor: int = 1, grouping: str = "neighbours"
) -> Tensor:
    """Images (classes * ipc, C, H, W) in pixel space: collages of the crops that a teacher is most confident of, see
    :func:`group_crops`."""
    tiles = [
        group_crops(most_confident_crops(run, net, c, pool, crops, factor), factor, grouping)
        for c in range(run.task.num_classes)
    ]
    return run.task.transform.inverse(make_collages(torch.cat(tiles), factor)).clamp(0, 1)


def group_crops(crops: Tensor, factor: int, grouping: str) -> Tensor:
    """Crops (N * factor^2, C, s, s) of a class, from the most confident to the least, in the order in which they become
    collages: with "neighbours" as they are; with "strided", as released, those of a collage are N places apart."""
    return crops.unflatten(0, (factor**2, -1)).transpose(0, 1).flatten(0, 1) if grouping == "strided" else crops


def make_collages(tiles: Tensor, factor: int) -> Tensor:
    """Images (N, C, S, S) of factor x factor tiles (N * factor^2, C, s, s) each, row by row."""
    grid = tiles.view(-1, factor, factor, *tiles.shape[1:])
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(len(grid), tiles.shape[1], factor * tiles.shape[2], -1)


def split_collages(images: Tensor, factor: int) -> Tensor:
    """The tiles of :func:`make_collages`."""
    count, channels, height, width = images.shape
    grid = images.view(count, channels, factor, height // factor, factor, width // factor)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels, height // factor, width // factor)
