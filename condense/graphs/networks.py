"""The students of graph classification: GCN, GAT and GIN from the layers of PyTorch Geometric."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from condense.errors import CondenseError, did_you_mean
from condense.graphs.arrays import import_pyg

NETWORKS = ("gcn", "gat", "gin")

HEADS = 4
"""Attention heads of a GAT layer."""


class GraphNetwork(nn.Module):
    """A message-passing network without normalisation layers, a pool over the nodes, and a linear classifier.

    ``forward`` takes a PyTorch Geometric ``Batch`` with ``x`` and ``edge_attr`` of categories from 0. A batch may also
    have ``multiplicity``, the weight of each node in the pool (1 without it), and ``degree``, the number of neighbours
    for GCN's normalisation (the number of incoming edges without it). With both, the embedding of a root of a
    computation tree equals that of its node in the real graph.

    Args:
        name: one of ``NETWORKS``.
        node_sizes: number of values of each feature of the nodes.
        edge_sizes: number of values of each feature of the edges; GCN does not use them.
        classes: number of classes.
        depth: number of message-passing layers.
        width: number of channels.
        pool: mean or sum.
        dropout: probability of dropping a channel after each layer.

    Raises:
        CondenseError: unknown name, or torch_geometric is not installed.
    """

    def __init__(
        self,
        name: str,
        node_sizes: Sequence[int],
        edge_sizes: Sequence[int],
        classes: int,
        *,
        depth: int,
        width: int = 128,
        pool: str = "mean",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if name not in NETWORKS:
            raise CondenseError(f"network '{name}': no such network of graphs{did_you_mean(name, NETWORKS)}")
        import_pyg(f"network '{name}'")
        self.name, self.pool, self.width = name, pool, width
        self.node_embedding, self.edge_embedding = _Categories(node_sizes, width), _Categories(edge_sizes, width)
        self.layers = nn.ModuleList(_layer(name, width) for _ in range(depth))
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(width, classes)

    def node_features(self, batch: Any) -> Tensor:
        """Returns the embeddings of all nodes after the last layer, (nodes, width)."""
        hidden, edges = self.node_embedding(batch.x), self.edge_embedding(batch.edge_attr)
        degree = batch.degree if "degree" in batch else torch.bincount(batch.edge_index[1], minlength=len(batch.x))
        for layer in self.layers:
            if self.name == "gcn":
                hidden = _normalised_convolution(layer, hidden, batch.edge_index, degree)
            else:
                hidden = layer(hidden, batch.edge_index, edges)
            hidden = self.dropout(torch.relu(hidden))
        return hidden

    def embed(self, batch: Any) -> Tensor:
        """Returns the pooled embedding of each graph, (graphs, width)."""
        hidden = self.node_features(batch)
        weight = batch.multiplicity if "multiplicity" in batch else torch.ones_like(hidden[:, 0])
        shape = (batch.num_graphs, self.width)
        pooled = hidden.new_zeros(shape).index_add(0, batch.batch, hidden * weight[:, None])
        if self.pool == "sum":
            return pooled
        return pooled / hidden.new_zeros(shape[0]).index_add(0, batch.batch, weight)[:, None]

    def forward(self, batch: Any) -> Tensor:
        """Returns the logits (graphs, classes)."""
        return self.classifier(self.embed(batch))


class _Categories(nn.Module):
    """The sum of an embedding of each column of categories: int64 (rows, columns) to (rows, width)."""

    first: Tensor

    def __init__(self, sizes: Sequence[int], width: int) -> None:
        super().__init__()
        self.embedding = nn.EmbeddingBag(max(1, sum(sizes)), width, mode="sum")
        self.register_buffer("first", torch.tensor([0, *sizes], dtype=torch.int64).cumsum(0)[: len(sizes)])

    def forward(self, columns: Tensor) -> Tensor:
        if not columns.shape[1]:
            return self.embedding.weight.new_zeros(len(columns), self.embedding.embedding_dim)
        return self.embedding(columns + self.first)


def _layer(name: str, width: int) -> nn.Module:
    from torch_geometric.nn import GATConv, GCNConv, GINEConv

    if name == "gcn":
        return GCNConv(width, width, normalize=False)
    if name == "gat":
        return GATConv(width, width // HEADS, heads=HEADS, edge_dim=width)
    return GINEConv(nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)))


def _normalised_convolution(layer: nn.Module, hidden: Tensor, edges: Tensor, degree: Tensor) -> Tensor:
    """A GCN layer with self-loops and the symmetric normalisation by ``degree``, which edges alone may not show."""
    loops = torch.arange(len(hidden), device=hidden.device)
    edges = torch.cat([edges, loops.repeat(2, 1)], 1)
    scale = (degree.to(hidden.dtype) + 1).rsqrt()
    return layer(hidden, edges, scale[edges[0]] * scale[edges[1]])
