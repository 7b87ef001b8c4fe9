"""Networks with public weights, which were trained on images of another normalisation than that of the task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from condense.data import Standardise, Transform
from condense.networks import architectures

SPACE_BUFFERS = ("space_mean", "space_std")
"""Buffers that describe the training space of the task; they are not part of the identity of the weights."""


class PublicNetwork(architectures.Network):
    """A network with public weights for images in a task's training space, which it maps to pixels and then to the
    normalisation that the weights were trained with.

    Args:
        net: The network, for images with three channels.
        transform: Map from pixels to the training space of the task.
        mean: Mean of the normalisation of the weights, per channel.
        std: Standard deviation of the same.
    """

    def __init__(
        self, net: architectures.Network, transform: Transform, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        self.net, self.transform = net, transform
        self.own_mean: Tensor
        self.own_std: Tensor
        for name, value in (("own_mean", mean), ("own_std", std)):
            self.register_buffer(name, torch.tensor(value, dtype=torch.float32)[:, None, None])
        if isinstance(transform, Standardise):  # so that the state describes the whole map
            self.register_buffer("space_mean", transform.mean.detach().cpu().clone())
            self.register_buffer("space_std", transform.std.detach().cpu().clone())

    @classmethod
    def from_state(cls, net: architectures.Network, channels: int, state: Mapping[str, Tensor]) -> PublicNetwork | None:
        """Wraps ``net`` as the network whose state is given; None if the state does not describe the map.

        Args:
            net: The network with its weights.
            channels: Channels of the images of the task.
            state: All entries; those of ``net`` begin with ``net.``.
        """
        sizes = {"own_mean": (3, 1, 1), "own_std": (3, 1, 1), "space_mean": (channels,), "space_std": (channels,)}
        for name, size in sizes.items():
            value = state.get(name)
            if value is None or tuple(value.shape) != size or not bool(value.isfinite().all()):
                return None
            if name.endswith("std") and not bool((value > 0).all()):
                return None
        values = {name: state[name].float() for name in sizes}
        transform = Standardise(values["space_mean"], values["space_std"])
        return cls(net, transform, values["own_mean"].flatten().tolist(), values["own_std"].flatten().tolist())

    def identity(self) -> dict[str, Tensor]:
        """The state without the training space of the task."""
        return {name: value for name, value in self.state_dict().items() if name not in SPACE_BUFFERS}

    def embed(self, x: Tensor, maps: list[Tensor] | None = None) -> Tensor:
        if self.transform.mean.device != x.device:
            self.transform = self.transform.to(x.device)
        pixels = self.transform.inverse(x).expand(-1, 3, -1, -1)  # grey images are repeated
        return self.net.embed((pixels - self.own_mean) / self.own_std, maps)

    def classify(self, embedding: Tensor) -> Tensor:
        """Maps (N, D) to (N, classes)."""
        return self.net.classify(embedding)
