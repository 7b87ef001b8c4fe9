"""GraphSet, a distilled set of graphs: one HDF5 file, which is checked on load and contains no pickle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from condense import hdf5
from condense.errors import CondenseError
from condense.files import check_writable
from condense.graphs.arrays import ARRAYS, MAX_FEATURE, GraphArrays, smallest
from condense.hdf5 import CLASSES_SCHEMA, NAME_SCHEMA, SHA256_SCHEMA
from condense.sets import checksums, read_arrays, write_arrays

POOLS = ("mean", "sum")
"""How students pool the embeddings of the nodes of a graph."""

MAX_DEPTH = 100

ARRAY_TYPES = (np.uint8, np.uint16, np.uint32, np.float32)

_FEATURE_SIZES = {"type": "array", "items": {"type": "integer", "minimum": 1, "maximum": MAX_FEATURE}}

_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["kind", "name", "dataset", "method", "classes", "ipc", "pool", "depth", "feature_sizes", "checksums"],
    "properties": {
        "kind": {"const": "graphs"},
        **dict.fromkeys(("name", "dataset", "method", "protocol"), NAME_SCHEMA),
        "classes": CLASSES_SCHEMA,
        "ipc": {"type": "integer", "minimum": 1, "maximum": 10**9},
        "pool": {"enum": list(POOLS)},
        "depth": {"type": "integer", "minimum": 0, "maximum": MAX_DEPTH},
        "feature_sizes": {
            "type": "object",
            "required": ["nodes", "edges"],
            "properties": {"nodes": {**_FEATURE_SIZES, "minItems": 1}, "edges": _FEATURE_SIZES},
        },
        "checksums": {"type": "object", "additionalProperties": SHA256_SCHEMA},
        "data": {"type": "object", "properties": {"fingerprint": NAME_SCHEMA, "options": {"type": "object"}}},
        "cost": {"type": "object", "properties": {"seconds": {"type": "number", "minimum": 0, "maximum": 1e15}}},
        "bytes": {"type": "object", "additionalProperties": {"type": "integer", "minimum": 0}},
        "seed": {"type": "integer"},
        "settings": {"type": "object"},
        "command": {"type": ["string", "null"]},
    },
}

GRAPHS_FORMAT = hdf5.Format("condense.graphs", 1, _SCHEMA, "condense distill mirage")


@dataclass(frozen=True)
class SyntheticGraphs:
    """The graphs that a method makes, and what a student needs to train on them."""

    graphs: GraphArrays
    multiplicities: np.ndarray
    """Weight of each node in the pool, float32 (N,): 0 for a node that is not pooled."""
    degrees: np.ndarray
    """Number of neighbours that each node has in the real graphs (N,); nodes may have fewer here."""
    weights: np.ndarray
    """Relative frequency with which students sample each graph among those of its class, integers (graphs,)."""
    pool: str
    """One of ``POOLS``."""
    depth: int
    """Number of message-passing layers for which the graphs are made."""

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns the arrays of the file by path."""
        counts = {"degrees": self.degrees, "weights": self.weights}
        arrays = smallest({**self.graphs.to_dict(), **counts})
        return {**arrays, "multiplicities": self.multiplicities.astype(np.float32)}


class GraphSet:
    """A distilled set of graphs.

    Attributes:
        synthetic: The graphs as arrays.
        manifest: Name, origin, settings and cost of the set.
    """

    def __init__(self, synthetic: SyntheticGraphs, manifest: Mapping[str, Any]) -> None:
        self.synthetic = synthetic
        self.manifest: dict[str, Any] = {
            **manifest,
            "kind": "graphs",
            "pool": synthetic.pool,
            "depth": synthetic.depth,
        }

    def __repr__(self) -> str:
        return f"GraphSet({self.name}: {len(self)} graphs)"

    def __len__(self) -> int:
        return len(self.synthetic.graphs)

    @property
    def name(self) -> str:
        """``dataset/method-ipcN.tag``."""
        return self.manifest["name"]

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; label c is ``classes[c]``."""
        return tuple(self.manifest["classes"])

    @property
    def graphs(self) -> list[Any]:
        """The graphs as a list of PyTorch Geometric's ``Data``.

        Each has ``x`` int64 (nodes, columns), ``edge_index`` (2, edges), ``edge_attr`` int64 (edges, columns), ``y``
        (1,), ``multiplicity`` float32 (nodes,), the weight of each node in the pool, ``degree`` (nodes,), the number
        of neighbours in the real graphs, and ``weight`` float32 (1,), the relative frequency of the graph in its class.

        Raises:
            CondenseError: torch_geometric is not installed.
        """
        made = self.synthetic
        degrees = made.degrees.astype(np.int64)
        graphs = made.graphs.to_graphs(multiplicity=made.multiplicities.astype(np.float32), degree=degrees)
        for graph, weight in zip(graphs, made.weights.tolist()):
            graph.weight = torch.tensor([float(weight)])
        return graphs

    def nbytes(self) -> dict[str, int]:
        """Returns the bytes of ``graphs`` (features, edges, multiplicities and frequencies), ``labels`` and their
        ``total``."""
        sizes = {name: array.nbytes for name, array in self.synthetic.arrays().items()}
        labels = sizes.pop("labels")
        return {"graphs": sum(sizes.values()), "labels": labels, "total": sum(sizes.values()) + labels}

    def sha256(self) -> str:
        """Returns a digest of all arrays and of the fields that define their meaning."""
        meaning = {key: self.manifest[key] for key in ("kind", "classes", "pool", "depth", "feature_sizes")}
        text = json.dumps([sorted(checksums(self.synthetic.arrays()).items()), meaning], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def save(self, path: str | Path, *, force: bool = False) -> Path:
        """Writes the file atomically: a kill leaves either the old file or the complete new one.

        Raises:
            CondenseError: The file exists and ``force`` is False, or it cannot be written.
        """
        path, arrays = Path(path), self.synthetic.arrays()
        check_writable(path, force=force, size=self.nbytes()["total"])
        self.manifest |= {"bytes": self.nbytes(), "checksums": checksums(arrays)}
        write_arrays(path, GRAPHS_FORMAT, self.manifest, arrays, GraphSet.load)
        return path

    @classmethod
    def load(cls, path: str | Path) -> GraphSet:
        """Reads and verifies a file.

        Raises:
            CondenseError: One line: another format, a newer version, a truncated file, or arrays that do not fit.
        """
        path = Path(path)
        arrays, manifest = read_arrays(path, GRAPHS_FORMAT, ARRAY_TYPES)
        mistake = _array_mistake(arrays, manifest)
        if mistake:
            raise CondenseError(f"{path}: {mistake}; it was not written by this toolkit")
        graphs = GraphArrays(**{name: arrays[name].astype(np.int64) for name in ARRAYS})
        names = ("multiplicities", "degrees", "weights")
        synthetic = SyntheticGraphs(
            graphs, **{name: arrays[name] for name in names}, pool=manifest["pool"], depth=manifest["depth"]
        )
        return cls(synthetic, manifest)


def _array_mistake(arrays: Mapping[str, np.ndarray], manifest: Mapping[str, Any]) -> str:
    """What is wrong with the arrays of a file; an empty text if nothing is."""
    names = {*ARRAYS, "multiplicities", "degrees", "weights"}
    if set(arrays) != names:
        return f"it must have the arrays {', '.join(sorted(names))}"
    floats = [name for name, array in arrays.items() if array.dtype.kind == "f"]
    if floats != ["multiplicities"]:
        return "only the multiplicities may be fractions"
    sizes, edges = manifest["feature_sizes"], arrays["edges"]
    if sum(sizes["nodes"]) + sum(sizes["edges"]) > MAX_FEATURE:
        return "its 'feature_sizes' are too large"
    counts = arrays["node_counts"], arrays["edge_counts"]
    graphs = counts[0].size
    shapes = {
        "nodes": (int(counts[0].sum(dtype=np.int64)), len(sizes["nodes"])),
        "edges": (2, int(counts[1].sum(dtype=np.int64))),
        "edge_features": (int(counts[1].sum(dtype=np.int64)), len(sizes["edges"])),
        **dict.fromkeys(("node_counts", "edge_counts", "labels", "weights"), (graphs,)),
        **dict.fromkeys(("multiplicities", "degrees"), (int(counts[0].sum(dtype=np.int64)),)),
    }
    for name, shape in shapes.items():
        if arrays[name].shape != shape:
            return f"the array '{name}' has the shape {arrays[name].shape}, not {shape}"
    for name, limits in (("nodes", sizes["nodes"]), ("edge_features", sizes["edges"])):
        if (arrays[name] >= np.array(limits, np.int64)).any():
            return f"the array '{name}' has features beyond the manifest's 'feature_sizes'"
    if not graphs or not counts[0].all() or not arrays["weights"].all():
        return "a graph has no nodes or no weight"
    if (edges >= np.repeat(counts[0], counts[1])).any():
        return "an edge leads to a node that its graph does not have"
    if set(arrays["labels"].tolist()) != set(range(len(manifest["classes"]))):
        return "the labels are not the classes of the manifest"
    pooled = arrays["multiplicities"]
    first = np.cumsum(counts[0], dtype=np.int64) - counts[0]
    if not np.isfinite(pooled).all() or (pooled < 0).any() or not np.add.reduceat(pooled, first).all():
        return "the multiplicities of a graph are not finite, or negative, or all zero"
    return ""
