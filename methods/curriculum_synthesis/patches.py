"""RDED's crops."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from condense import rng
from condense.augment import Views, resampling, seen
from condense.data import Task
from condense.engine import Run
from condense.errors import CondenseError
from condense.labels import answers
from condense.methods.curriculum_synthesis.settings import LEAST
from condense.networks import Network

if TYPE_CHECKING:
    from condense.methods.curriculum_synthesis.rded import RDED


def square_crops(images: Tensor, draws: rng.Draws, crops: int, size: int) -> tuple[Tensor, Views]:
    """Random square crops (N * crops, C, size, size) of images (N,C,S,S'), and their boxes; image by image.

    Areas are uniform in 8 to 100 % of the largest square, places too.
    """
    count, _, height, width = images.shape
    rows = count * crops
    edge = (draws.uniform(rows, LEAST, 1.0).double().sqrt() * min(height, width)).round().long().clamp(min=1)
    unit = draws.uniform((rows, 2)).double()
    top = (unit[:, 0] * (height - edge + 1)).long()
    left = (unit[:, 1] * (width - edge + 1)).long()
    views = Views((height, width), torch.stack([top, left, edge, edge], 1), torch.zeros(rows, dtype=torch.bool))
    return cropped(images.repeat_interleave(crops, 0), views, size), views


def cropped(images: Tensor, views: Views, size: int) -> Tensor:
    """The box of each image (N,C,H,W), resized to (N,C,size,size)."""
    tall, wide = resampling(views, torch.zeros(len(views), 2, dtype=torch.int64), (size, size))
    return seen(images[:, None], tall.to(images.device), wide.to(images.device))[:, 0]


def _scores(run: Run, net: Network, crops: Tensor, classes: Tensor) -> Tensor:
    """Cross-entropy (N,) of crops, padded with zeros to the size of images."""
    height, width = run.task.shape[1:]
    down, right = height - crops.shape[2], width - crops.shape[3]
    padded = F.pad(crops, (right // 2, right - right // 2, down // 2, down - down // 2))
    return F.cross_entropy(answers(net, padded), classes, reduction="none")


def pooled(run: Run, c: int, pool: int) -> Tensor:
    """Up to ``pool`` random real images of class ``c``, in training space."""
    return run.task.per_class(pool, (run.seed, "pool"), [c])[0]


def side(task: Task, factor: int, words: str) -> int:
    """Of a crop, in pixels; refuses what cannot be cut into squares, by the user's ``words``."""
    _, height, width = task.shape
    if height != width or height % factor:
        raise CondenseError(f"{words}: images of {task.name} are {height}x{width}; crops need squares"
                            + f" that {factor} divides" * (factor > 1))  # fmt: skip
    return height // factor


def surest(run: Run, net: Network, config: RDED, c: int) -> tuple[Tensor, Tensor, Views]:
    """The crops (M,C,s,s) of class ``c`` that the teacher is surest of, M = ipc * factor^2, whole real images
    (M,C,H,W) that they are of, and where they lie.

    Of each real image the crop with the lowest cross-entropy counts, of these the lowest are taken; where the pool is
    too small, crops come again.
    """
    size, need = side(run.task, config.factor, f"factor={config.factor}"), run.ipc * config.factor**2
    images = pooled(run, c, config.pool)
    crops, views = square_crops(images, rng.Draws(run.seed, "patches", c), config.crops, size)
    classes = torch.full((len(crops),), c, device=crops.device)
    scores = _scores(run, net, crops, classes).view(len(images), config.crops)
    least, which = scores.min(1)
    order = least.argsort(stable=True)
    order = order[torch.arange(need, device=order.device) % len(order)]
    chosen = order * config.crops + which[order]
    return crops[chosen], images[order], views[chosen.cpu()]


def confident_patches(run: Run, net: Network, config: RDED) -> Tensor:
    """RDED's images (classes * ipc, C,H,W) in pixel space: collages of the crops that the teacher is surest of."""
    tiles = torch.cat([surest(run, net, config, c)[0] for c in range(run.task.num_classes)])
    return run.task.transform.inverse(collages(tiles, config.factor)).clamp(0, 1)


def collages(tiles: Tensor, factor: int) -> Tensor:
    """Images (N,C,S,S) of factor x factor tiles (N * factor^2,C,s,s) each, row by row."""
    grid = tiles.view(-1, factor, factor, *tiles.shape[1:])
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(len(grid), tiles.shape[1], factor * tiles.shape[2], -1)


def cut_up(images: Tensor, factor: int) -> Tensor:
    """The tiles of :func:`collages`."""
    count, channels, height, width = images.shape
    grid = images.view(count, channels, factor, height // factor, factor, width // factor)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels, height // factor, width // factor)
