"""Ensembles: the mean logits of several networks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from condense.errors import CondenseError
from condense.networks import architectures
from condense.networks.flat import Layout


class MeanLogits(nn.Module):
    """Network that computes the weighted mean of several networks' logits, float32 (B, classes).

    Args:
        members: Networks with the same classes.
        weights: One non-negative weight per network, normalised to sum 1. Default: equal.

    Raises:
        CondenseError: There are no networks, the number of weights differs, or the weights are negative or all 0.
    """

    def __init__(self, members: Sequence[nn.Module], weights: Sequence[float] | None = None) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        shares = [1.0] * len(members) if weights is None else [float(weight) for weight in weights]
        if not members or len(shares) != len(members) or min(shares) < 0 or not 0 < sum(shares) < math.inf:
            raise CondenseError(f"weights {shares} of {len(members)} teachers: give one of at least 0 for each")
        self.weights: Tensor
        normalised = torch.tensor([share / sum(shares) for share in shares], device=device_of(self.members))
        self.register_buffer("weights", normalised)

    def forward(self, images: Tensor) -> Tensor:
        logits = torch.stack([member(images).float() for member in self.members])
        return (self.weights[:, None, None] * logits).sum(0)

    def embed(self, images: Tensor) -> Tensor:
        """Returns the features of the only network, (B, D).

        Raises:
            CondenseError: There are several networks, whose features are not comparable.
        """
        if len(self.members) > 1:
            raise CondenseError(f"features are those of one network, not of {len(self.members)} together")
        features: Tensor = self.members[0].embed(images)  # type: ignore[operator]
        return features


def device_of(module: nn.Module) -> torch.device:
    """Returns the device of a module's weights; the CPU if it has none."""
    return next((value.device for value in module.state_dict().values()), torch.device("cpu"))


def mean_of_flat_networks(net: architectures.Network, layout: Layout, thetas: Tensor) -> nn.Module:
    """The mean logits, float32 (B, classes), of networks of one architecture with flat weights (K, P)."""
    return _Mean(net, layout, thetas)


class _Mean(nn.Module):  # the name is in manifests
    """See :func:`mean_of_flat_networks`."""

    def __init__(self, net: architectures.Network, layout: Layout, thetas: Tensor) -> None:
        super().__init__()
        self.net, self.layout = net.requires_grad_(False), layout
        self.thetas: Tensor
        self.register_buffer("thetas", thetas)

    def forward(self, images: Tensor) -> Tensor:
        logits = [
            torch.func.functional_call(self.net, self.layout.unflatten(theta.float()), (images,)).float()
            for theta in self.thetas
        ]
        return torch.stack(logits).mean(0)
