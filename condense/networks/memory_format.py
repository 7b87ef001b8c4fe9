"""The memory format of feature maps: contiguous or channels-last."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

CONTIGUOUS, CHANNELS_LAST = "contiguous", "channels_last"


@dataclass(frozen=True)
class MemoryFormat:
    """Formats of the inputs of convolutions on a CPU: ``contiguous``, ``channels_last``, or None for the network's own.

    Results differ only by rounding.
    """

    inference: str | None = None
    """Without gradients."""
    training: str | None = None
    """With gradients of weights or images."""


DEFAULT_FORMAT = MemoryFormat()

_current: ContextVar[MemoryFormat] = ContextVar("memory_format", default=DEFAULT_FORMAT)


@contextlib.contextmanager
def memory_format(chosen: MemoryFormat) -> Iterator[None]:
    """Networks use these formats in the block."""
    token = _current.set(chosen)
    try:
        yield
    finally:
        _current.reset(token)


def is_channels_last(x: Tensor, inference: str = CONTIGUOUS) -> bool:
    """Whether convolutions on ``x`` use channels-last maps here.

    Args:
        x: images or feature maps.
        inference: the network's own format without gradients; with gradients it is contiguous.
    """
    if x.device.type != "cpu":
        return False
    chosen = _current.get()
    if torch.is_grad_enabled():
        return (chosen.training or CONTIGUOUS) == CHANNELS_LAST
    return (chosen.inference or inference) == CHANNELS_LAST


def arrange(x: Tensor) -> Tensor:
    """Returns images (N, C, H, W) in the format of the block."""
    return x.contiguous(memory_format=torch.channels_last) if is_channels_last(x) else x
