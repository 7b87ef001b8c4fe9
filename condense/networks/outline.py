"""Networks without memory: what a name that comes from an untrusted file asks for, before anything is allocated."""

from __future__ import annotations

import contextlib

import torch

from condense import rng
from condense.device import free_host_memory
from condense.errors import CondenseError
from condense.formatting import by, size
from condense.networks import architectures


def build_outline(network: str, shape: architectures.Shape, classes: int) -> architectures.Network | None:
    """Builds a network on the meta device, where tensors have shapes but no values.

    Returns:
        The network; None for a network of a library that computes with values while it is built.

    Raises:
        CondenseError: An unknown network, or it does not take such images.
    """
    with contextlib.suppress(RuntimeError, NotImplementedError), rng.seeded("layout"), torch.device("meta"):
        return architectures.build_network(network, shape, classes)
    return None


def check_network_memory(network: str, shape: architectures.Shape, classes: int) -> None:
    """Checks that the weights of a network fit into half of the free memory.

    Raises:
        CondenseError: They do not, or the network is unknown or does not take such images.
    """
    outline, free = build_outline(network, shape, classes), free_host_memory()
    if outline is None:
        return
    nbytes = sum(value.numel() * value.element_size() for value in outline.state_dict().values())
    if free and nbytes > free // 2:
        raise CondenseError(
            f"network {network}: its weights for {by(shape)} images take {size(nbytes)}, and {size(free)} of memory "
            "are free; give a smaller one"
        )
