"""A network's parameters as one flat vector."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from condense import rng
from condense.data import Task
from condense.errors import CondenseError
from condense.networks import architectures


@dataclass(frozen=True)
class Layout:
    """Names and shapes of a network's parameters, in the order in which a flat vector of P numbers contains them."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, net: nn.Module) -> Layout:
        """Returns the layout of a network's parameters, without buffers."""
        named = list(net.named_parameters())
        return cls(tuple(name for name, _ in named), tuple(tuple(value.shape) for _, value in named))

    @classmethod
    def read(cls, described: Sequence[Any]) -> Layout:
        """Creates a layout from the result of :meth:`describe`."""
        return cls(tuple(str(name) for name, _ in described), tuple(tuple(map(int, shape)) for _, shape in described))

    @property
    def sizes(self) -> list[int]:
        """Number of elements of each parameter."""
        return [math.prod(shape) for shape in self.shapes]

    @property
    def size(self) -> int:
        """Total number of elements P."""
        return sum(self.sizes)

    def flatten(self, state: Mapping[str, Tensor] | nn.Module) -> Tensor:
        """Copies the parameters of a network, or of a mapping by name, to a new vector (P,) on their device.

        Raises:
            CondenseError: a parameter is complex or in double precision, which a vector of float32 cannot hold.
        """
        parameters = dict(state.named_parameters()) if isinstance(state, nn.Module) else state
        for name in self.names:
            if (dtype := parameters[name].dtype) == torch.float64 or dtype.is_complex:
                raise CondenseError(f"the network's parameter '{name}' is {dtype}; trajectories need torch.float32")
        return torch.cat(
            [parameters[name].detach().reshape(-1) for name in self.names]
        )  # cat copies even a single tensor

    def unflatten(self, theta: Tensor) -> dict[str, Tensor]:
        """Splits a flat vector (..., P) into the parameters, as views with gradients, for
        ``torch.func.functional_call``."""
        parts = theta.split(self.sizes, -1)
        return {
            name: part.view((*theta.shape[:-1], *shape)) for name, part, shape in zip(self.names, parts, self.shapes)
        }

    def describe(self) -> list[list[Any]]:
        """Returns name and shape of each parameter, for the manifest."""
        return [[name, list(shape)] for name, shape in zip(self.names, self.shapes)]


def layout_of(network: str | Callable[..., nn.Module], task: Task) -> Layout:
    """Returns the layout of a network for the images and classes of a task."""
    with rng.seeded("layout"):
        return Layout.of(architectures.build_network(network, task.shape, task.num_classes))
