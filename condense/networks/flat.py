"""a network's weights as one vector."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from condense import rng
from condense.data import Task
from condense.networks import architectures


@dataclass(frozen=True)
class Layout:
    """Names and shapes of a network's parameters, in module order, as they lie in a flat vector of P numbers."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, net: nn.Module) -> Layout:
        """The layout of a network; buffers are not in it."""
        named = list(net.named_parameters())
        return cls(tuple(name for name, _ in named), tuple(tuple(value.shape) for _, value in named))

    @classmethod
    def read(cls, described: Sequence[Any]) -> Layout:
        """From what :meth:`describe` gave."""
        return cls(tuple(str(name) for name, _ in described), tuple(tuple(map(int, shape)) for _, shape in described))

    @property
    def sizes(self) -> list[int]:
        """Numbers of each parameter."""
        return [math.prod(shape) for shape in self.shapes]

    @property
    def size(self) -> int:
        """P."""
        return sum(self.sizes)

    def flatten(self, state: Mapping[str, Tensor] | nn.Module) -> Tensor:
        """The parameters of a network or of a mapping of names as a new vector (P,), where they are."""
        found = dict(state.named_parameters()) if isinstance(state, nn.Module) else state
        return torch.cat([found[name].detach().reshape(-1) for name in self.names])  # cat copies, also a single one

    def unflatten(self, theta: Tensor) -> dict[str, Tensor]:
        """Views of a flat vector (..., P), through which gradients flow, for ``torch.func.functional_call``."""
        parts = theta.split(self.sizes, -1)
        return {name: part.view(*theta.shape[:-1], *shape) for name, part, shape in zip(self.names, parts, self.shapes)}

    def describe(self) -> list[list[Any]]:
        """For the manifest: name and shape of each parameter."""
        return [[name, list(shape)] for name, shape in zip(self.names, self.shapes)]


def layout_of(network: str | Callable[..., nn.Module], task: Task) -> Layout:
    """The layout of a network for the images and classes of a task."""
    with rng.seeded("layout"):
        return Layout.of(architectures.build(network, task.shape, task.num_classes))
