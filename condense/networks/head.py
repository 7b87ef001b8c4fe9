"""Networks whose last linear layer is fitted or replaced after the other layers were trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from condense.errors import CondenseError
from condense.networks.architectures import Network, Shape, Wrapped, evaluating


class WithHead(Network):
    """A network with another module in place of its last linear layer. It shares the weights of the network.

    Args:
        body: The network; its own last layer is not used.
        head: Maps the embedding (N, D) to (N, outputs).
    """

    def __init__(self, body: Network, head: nn.Module) -> None:
        super().__init__()
        self.body, self.classify = body, head
        self.draws_nothing = body.draws_nothing

    def embed(self, x: Tensor, maps: list[Tensor] | None = None) -> Tensor:
        return self.body.embed(x, maps)


def embedding_size(net: Network, shape: Shape) -> int:
    """Returns the number of features D of ``net.embed``; the network is on the CPU."""
    with torch.no_grad(), evaluating(net):
        return int(net.embed(torch.zeros(2, *shape)).shape[1])


def last_linear(net: Network) -> nn.Linear:
    """Returns the last linear layer of a network.

    Raises:
        CondenseError: It has none.
    """
    if isinstance(net, Wrapped) and net.last is not None:
        layer = net.model.get_submodule(net.last)
    else:
        layer = net.classify  # type: ignore[assignment]
    if not isinstance(layer, nn.Linear):
        raise CondenseError(
            f"{type(net).__name__} does not end in a linear layer over flat features; take another network"
        )
    return layer
