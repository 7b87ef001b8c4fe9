"""Random draws keyed by (seed, purpose, step): no global state, no clock.

The key of a draw names its purpose, so a run that is killed and resumed, or split over ranks, draws the same numbers.
Indices, views and augmentation parameters come from :class:`Draws`, a counter-based integer hash that gives the same
bits on every device and torch version (golden values in ``tests/test_rng.py``). Stored labels depend on it, so a change
of its output must raise ``HASH_VERSION``. Gaussian noise and network weights come from torch's generators, seeded by
:func:`key`; they are reproducible within one torch version.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

HASH_VERSION = 1

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def key(*parts: int | str) -> int:
    """Hashes integers and strings to a 63-bit key, e.g. ``key(seed, "network", step)``."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """Returns a CPU torch generator seeded by ``key(*parts)``."""
    return torch.Generator().manual_seed(key(*parts))


@contextlib.contextmanager
def seeded(*parts: int | str, device: torch.device | None = None) -> Iterator[None]:
    """Forks and seeds torch's global generators of the CPU and of ``device`` for the block.

    For code that takes no generator (module constructors, dropout). Create tensors on the CPU inside the block: then
    the same key gives the same values on every device.
    """
    cuda = device is not None and device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else []):
        torch.random.default_generator.manual_seed(key(*parts))
        if cuda:
            torch.cuda.manual_seed(key(*parts))
        yield


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Logical (zero-filling) right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def hash64(counters: Tensor, stream: int) -> Tensor:
    """The splitmix64 finaliser of ``stream + counter * golden ratio``: int64 counters to int64 random bits."""
    x = counters * _GOLDEN + stream
    x = (x ^ _shifted(x, 30)) * _MIX_1
    x = (x ^ _shifted(x, 27)) * _MIX_2
    return x ^ _shifted(x, 31)


class Draws:
    """A stream of draws with a key: ``Draws(seed, "real-batch", step).integers(10, (3,))``.

    Each call continues the stream, so the order of calls matters; the device does not. Results are on the CPU unless
    ``device`` is given.
    """

    def __init__(self, *parts: int | str, device: torch.device | str = "cpu") -> None:
        self.stream = key(*parts)
        self.device = torch.device(device)
        self.position = 0

    def bits(self, shape: tuple[int, ...] | int) -> Tensor:
        """63 random bits per element, as non-negative int64 of ``shape``."""
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        count = math.prod(shape)
        counters = torch.arange(self.position, self.position + count, dtype=torch.int64, device=self.device)
        self.position += count
        return _shifted(hash64(counters, self.stream), 1).reshape(shape)

    def uniform(self, shape: tuple[int, ...] | int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """float32 in [low, high), with 24 random bits per element."""
        unit = (self.bits(shape) >> 39).to(torch.float32) * 2.0**-24
        return unit * (high - low) + low

    def integers(self, high: int, shape: tuple[int, ...] | int) -> Tensor:
        """int64 in {0, ..., high - 1}; high is at most 2**31, so that the bias is below one in 2**31 draws."""
        return ((self.bits(shape) >> 31) * high) >> 32

    def permutation(self, n: int) -> Tensor:
        """A random order of 0..n-1."""
        return torch.argsort(self.bits(n), stable=True)

    def sample(self, n: int, k: int) -> Tensor:
        """k different elements of 0..n-1 in random order (all of them if k >= n)."""
        return self.permutation(n)[:k]
