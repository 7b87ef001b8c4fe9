"""Pictures of sets."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from condense.files import atomic_write

MIN_TILE = 64
"""Pixels of the width to which small images are enlarged, by a whole factor."""


def save_grid(images: Tensor, path: Path, columns: int, limit: int = 50) -> Path:
    """Writes a PNG with one row of images per class, or a grid of them if there is one image per class.

    Args:
        images: (N,C,H,W) in pixel space, sorted by class; clipped to [0,1]. Of more than three channels the first
            three are drawn, as red, green and blue.
        path: File to write.
        columns: Number of images per class.
        limit: Maximum number of images per row.
    """
    from PIL import Image

    count, channels, height, width = images.shape
    if columns == 1 and count > 1:
        columns = min(limit, math.ceil(math.sqrt(2 * count)))  # twice as wide as high
    rows = math.ceil(count / columns)
    width_in_images = min(columns, limit)
    scale = max(1, MIN_TILE // width)
    values = (images.detach().float().cpu().clamp(0, 1) * 255).round().byte()
    values = torch.cat([values, values.new_full((rows * columns - count, channels, height, width), 255)])
    values = values.view(rows, columns, channels, height, width)[:, :width_in_images]
    values = values.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    height, width = height * scale, width * scale
    canvas = torch.full((rows * (height + 2) + 2, width_in_images * (width + 2) + 2, 3), 255, dtype=torch.uint8)
    for r in range(rows):
        for c in range(width_in_images):
            tile = values[r, c].expand(3, height, width) if channels == 1 else values[r, c, :3]
            if channels == 2:  # red and green
                tile = torch.cat([tile, torch.zeros_like(tile[:1])])
            canvas[2 + r * (height + 2) :, 2 + c * (width + 2) :][:height, :width] = tile.permute(1, 2, 0)
    with atomic_write(path) as temporary:
        Image.fromarray(canvas.numpy()).save(temporary, format="PNG")
    return path
