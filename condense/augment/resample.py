"""Shifts and bilinear resampling with exact positions."""

from __future__ import annotations

import torch
from torch import Tensor

from condense.data import working_dtype
from condense.device import upload


def send_like(x: Tensor, images: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Copies a CPU tensor to the device of ``images``, optionally as ``dtype``."""
    return upload(x if dtype is None else x.to(dtype), images.device)


def shift_images(x: Tensor, shift: Tensor, fill: Tensor | None = None) -> Tensor:
    """Shifts each image by its own (dy, dx), padding with ``fill`` (C,) or zeros. With zeros the opposite shift is the
    adjoint."""
    n, c, h, w = x.shape
    ys = torch.arange(h, device=x.device) + shift[:, :1]
    xs = torch.arange(w, device=x.device) + shift[:, 1:]
    rows, columns = ys.clamp(0, h - 1), xs.clamp(0, w - 1)
    inside = (rows == ys)[:, :, None] & (columns == xs)[:, None, :]
    source = rows[:, :, None] * w + columns[:, None, :]
    moved = x.flatten(2).gather(2, source.reshape(n, 1, h * w).expand(n, c, h * w)).reshape(x.shape)
    if fill is not None:
        return torch.where(inside[:, None], moved, fill[:, None, None])
    return moved.masked_fill(~inside[:, None], 0)


def bilinear_neighbours(outputs: Tensor, size: int, length: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the neighbouring input pixels of each output pixel when ``length`` pixels are resized to ``size``.

    Args:
        outputs: Positions of output pixels, int64 (N, R).
        size: Number of output pixels.
        length: Number of input pixels, int64 (N, 1).

    Returns:
        The lower and the upper neighbour, and the weight of the upper one in units of 1 / (2 size); all int64 (N, R),
        so that positions are exact.
    """
    # Output o is at (2o + 1) * length / 2 size - 1/2, clamped to the input; here in units of 1 / 2 size.
    position = ((2 * outputs + 1) * length - size).clamp(min=0).minimum(2 * size * (length - 1))
    below = position // (2 * size)
    return below, (below + 1).minimum(length - 1), position % (2 * size)


def stretch_axis(x: Tensor, axis: int, outputs: Tensor, start: Tensor, length: Tensor) -> Tensor:
    """Resizes the ``length`` (N, 1) pixels from ``start`` to the whole axis and returns the positions ``outputs``
    (N, size) of the result."""
    size = x.shape[axis]
    below, above, part = bilinear_neighbours(outputs, size, length)
    share = part.to(working_dtype(x)) / (2 * size)
    shape = (len(x), 1, size, 1) if axis == 2 else (len(x), 1, 1, size)
    low, high = (x.gather(axis, (start + i).reshape(shape).expand_as(x)) for i in (below, above))
    return torch.lerp(low.to(share.dtype), high.to(share.dtype), share.reshape(shape)).to(x.dtype)
