"""Attributed graphs in a few arrays, and as PyTorch Geometric's ``Data``."""

from __future__ import annotations

import functools
import hashlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from condense.errors import CondenseError, missing_package

MAX_FEATURE = 2**20
"""Limit of the values of features, which are rows of embedding tables."""

MAX_CLASSES = 10_000

ARRAYS = ("nodes", "edges", "edge_features", "node_counts", "edge_counts", "labels")


def import_pyg(purpose: str) -> Any:
    """Returns the package ``torch_geometric``.

    Args:
        purpose: what needs it, for the message.

    Raises:
        CondenseError: it is not installed, with the command that installs it.
    """
    try:
        with warnings.catch_warnings():  # it compiles functions by torch.jit, which newer versions of PyTorch deprecate
            warnings.simplefilter("ignore", FutureWarning)
            import torch_geometric
    except ImportError as error:
        raise missing_package("torch_geometric", "graph", purpose) from error
    return torch_geometric


@dataclass(frozen=True)
class GraphArrays:
    """Graphs with categorical features, one after the other in each array. All arrays are int64."""

    nodes: np.ndarray
    """Features of the nodes (N, columns), each from 0."""
    edges: np.ndarray
    """Source and target of each directed edge (2, E), numbered within the graph."""
    edge_features: np.ndarray
    """Features of the edges (E, columns), each from 0; possibly no columns."""
    node_counts: np.ndarray
    """Number of nodes of each graph (graphs,)."""
    edge_counts: np.ndarray
    """Number of edges of each graph (graphs,)."""
    labels: np.ndarray
    """Class of each graph (graphs,)."""

    def __len__(self) -> int:
        return len(self.labels)

    def to_dict(self) -> dict[str, np.ndarray]:
        """Returns the arrays by name."""
        return {name: getattr(self, name) for name in ARRAYS}

    @functools.cached_property
    def first_nodes(self) -> np.ndarray:
        """Position of the first node of each graph."""
        return np.cumsum(self.node_counts) - self.node_counts

    @functools.cached_property
    def first_edges(self) -> np.ndarray:
        """Position of the first edge of each graph."""
        return np.cumsum(self.edge_counts) - self.edge_counts

    @functools.cached_property
    def joint_edges(self) -> np.ndarray:
        """Edges (2, E) of all graphs as one graph of N nodes."""
        return self.edges + np.repeat(self.first_nodes, self.edge_counts)

    @functools.cached_property
    def degrees(self) -> np.ndarray:
        """Number of incoming edges of each node (N,)."""
        return np.bincount(self.joint_edges[1], minlength=len(self.nodes))

    def node_rows(self, rows: np.ndarray) -> np.ndarray:
        """Returns the positions of the nodes of the graphs at ``rows``, in this order."""
        return _ranges(self.first_nodes[rows], self.node_counts[rows])

    def select(self, rows: np.ndarray) -> GraphArrays:
        """Returns the graphs at ``rows``, in this order."""
        nodes = self.node_rows(rows)
        edges = _ranges(self.first_edges[rows], self.edge_counts[rows])
        return GraphArrays(
            self.nodes[nodes],
            self.edges[:, edges],
            self.edge_features[edges],
            self.node_counts[rows],
            self.edge_counts[rows],
            self.labels[rows],
        )

    def to_graphs(self, **node_values: np.ndarray) -> list[Any]:
        """Returns a list of ``Data`` with ``x``, ``edge_index``, ``edge_attr`` and ``y``.

        Args:
            node_values: further attributes, an array of N values each.
        """
        data_class = import_pyg("graphs").data.Data
        attributes = {
            "x": torch.from_numpy(self.nodes).split(self.node_counts.tolist()),
            "edge_index": torch.from_numpy(self.edges).split(self.edge_counts.tolist(), 1),
            "edge_attr": torch.from_numpy(self.edge_features).split(self.edge_counts.tolist()),
            "y": torch.from_numpy(self.labels).split(1),
        }
        attributes |= {k: torch.from_numpy(v).split(self.node_counts.tolist()) for k, v in node_values.items()}
        return [data_class(**dict(zip(attributes, values))) for values in zip(*attributes.values())]

    @classmethod
    def from_graphs(cls, graphs: Sequence[Any], where: str) -> GraphArrays:
        """Reads a list of ``Data``.

        ``x`` and ``edge_attr`` must be whole numbers from 0, also as floats; each column is a category. Graphs without
        them have one category of nodes and no features of edges. ``y`` is the class.

        Raises:
            CondenseError: a graph lacks something, or its features are not categories.
        """
        columns: dict[str, list[np.ndarray]] = {name: [] for name in ARRAYS}
        for number, graph in enumerate(graphs):
            place = f"{where}: graph {number}"
            if not hasattr(graph, "edge_index") or graph.edge_index is None or getattr(graph, "y", None) is None:
                raise CondenseError(f"{place}: must have edge_index and y, as torch_geometric.data.Data has")
            count, edges = int(graph.num_nodes), graph.edge_index.cpu().numpy()
            if edges.shape[0] != 2 or edges.ndim != 2 or (edges.size and not 0 <= edges.min() <= edges.max() < count):
                raise CondenseError(f"{place}: edge_index must be (2, E) of nodes below {count}")
            if count < 1:
                raise CondenseError(f"{place}: has no nodes")
            label = torch.as_tensor(graph.y).double()  # a tensor or a number; NaN fails the comparison
            if label.numel() != 1 or not 0 <= label.item() < MAX_CLASSES or label.item() != int(label.item()):
                raise CondenseError(f"{place}: y must be one class, a whole number from 0 to {MAX_CLASSES - 1:,}")
            columns["nodes"].append(_categories(getattr(graph, "x", None), count, 1, f"{place}: x"))
            columns["edges"].append(edges.astype(np.int64))
            attributes = getattr(graph, "edge_attr", None)
            columns["edge_features"].append(_categories(attributes, edges.shape[1], 0, f"{place}: edge_attr"))
            for name, value in (("node_counts", count), ("edge_counts", edges.shape[1]), ("labels", int(label.item()))):
                columns[name].append(np.array([value], np.int64))
        if not columns["nodes"]:
            raise CondenseError(f"{where}: has no graphs")
        for name in ("nodes", "edge_features"):
            if len({part.shape[1] for part in columns[name]}) > 1:
                raise CondenseError(f"{where}: the graphs have different numbers of features of {name}")
        return cls(**{name: np.concatenate(parts, -1 if name == "edges" else 0) for name, parts in columns.items()})

    def sha256(self) -> str:
        """Returns a digest of all arrays."""
        digest = hashlib.sha256()
        for name, array in self.to_dict().items():
            digest.update(f"{name} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def smallest(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns arrays of non-negative integers in the smallest unsigned type of 1, 2 or 4 bytes that holds them."""
    types = (np.uint8, np.uint16, np.uint32)
    return {
        name: array.astype(next(kind for kind in types if array.max(initial=0) <= np.iinfo(kind).max))
        for name, array in arrays.items()
    }


def _categories(values: Any, rows: int, default_columns: int, where: str) -> np.ndarray:
    """A tensor of categories as int64 (rows, columns); zeros if there is none."""
    if values is None:
        return np.zeros((rows, default_columns), np.int64)
    array = values.detach().cpu().numpy()
    if array.ndim not in (1, 2) or len(array) != rows:
        raise CondenseError(f"{where}: has the shape {array.shape}, not a row for each of {rows}")
    array = array.reshape(rows, -1 if rows else array.shape[-1])
    whole = array.astype(np.int64)
    if (whole != array).any() or (whole.size and not 0 <= whole.min() <= whole.max() < MAX_FEATURE):
        raise CondenseError(f"{where}: must be categories, whole numbers from 0; divide continuous features into bins")
    return whole


def _ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The concatenation of ``arange(start, start + count)``."""
    return np.repeat(starts - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())
