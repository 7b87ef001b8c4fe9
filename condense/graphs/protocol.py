"""Protocols of graph classification: versioned rules for training and evaluating students."""

from __future__ import annotations

from dataclasses import dataclass

from condense.errors import CondenseError, did_you_mean
from condense.graphs.networks import NETWORKS


@dataclass(frozen=True)
class GraphProtocol:
    """Training and evaluation of students of graphs."""

    name: str
    """Name with its version."""
    version: int
    """Raised by every change that alters scores; tables do not mix versions."""
    summary: str
    """One-line description."""
    networks: tuple[str, ...] = NETWORKS
    """Default architectures. They have as many layers, and the pool, for which the set was made."""
    width: int = 64
    """Channels of the networks."""
    dropout: float = 0.3
    """Probability of dropping a channel after each layer."""
    steps: int = 300
    """Optimizer steps of all arms but ``full``."""
    full_epochs: int = 10
    """Epochs of the ``full`` arm, which makes at least ``steps`` steps."""
    batch: int = 32
    """Graphs per step. Each is of a random class, all being equally likely, and then sampled by its weight."""
    lr: float = 1e-3
    """Learning rate of Adam."""
    weight_decay: float = 1e-4
    """L2 penalty of Adam."""
    checks: int = 15
    """How often the AUC on the real validation graphs is measured, at equal intervals. The weights with the best one
    are tested, in all arms."""
    runs: int = 10
    """Default number of students per arm."""


GRAPH_PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        GraphProtocol(
            "graphs-v1",
            1,
            "graph classification: 300 steps of Adam on balanced batches, best of 15 checks on validation graphs",
        ),
    )
}
"""Protocols by name."""


def get_graph_protocol(name: str) -> GraphProtocol:
    """Returns a protocol.

    Raises:
        CondenseError: unknown name.
    """
    if name not in GRAPH_PROTOCOLS:
        raise CondenseError(f"unknown protocol '{name}' of graphs{did_you_mean(name, GRAPH_PROTOCOLS)}")
    return GRAPH_PROTOCOLS[name]
