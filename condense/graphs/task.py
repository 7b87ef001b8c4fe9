"""GraphTask: the real graphs that a method distils and that students are tested on."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from condense import rng
from condense.data import data_root
from condense.errors import CondenseError
from condense.files import check_name, is_existing_file
from condense.formatting import shorten
from condense.graphs.arrays import MAX_FEATURE, GraphArrays, import_pyg
from condense.graphs.molecules import SHARES, has_smiles, read_molecules

TU_PREFIX = "tu:"
"""Beginning of DATA that names a TU data set, e.g. ``tu:MUTAG``."""


@dataclass(frozen=True)
class GraphOptions:
    """How graphs are read."""

    label: str = ""
    """Column with the class, 0 or 1, of a table of SMILES that has several other columns."""


class GraphTask:
    """Real train, validation and test graphs.

    Attributes:
        name: Name in records and set names.
        classes: Class names.
        train, valid, test: The graphs of each split.
        split: How they were divided: scaffold, random or given.
        source: DATA argument that loads the task again; None for graphs from memory.
        options: Options that it was loaded with.
    """

    def __init__(
        self,
        name: str,
        splits: Sequence[GraphArrays],
        split: str,
        *,
        source: str | None = None,
        options: GraphOptions | None = None,
    ) -> None:
        self.name, self.split, self.source, self.options = check_name(name), split, source, options or GraphOptions()
        self.train, self.valid, self.test = splits
        for what in ("nodes", "edge_features"):
            if len({getattr(part, what).shape[1] for part in splits}) > 1:
                raise CondenseError(f"data '{name}': the splits have different numbers of features of {what}")
        if sum(map(sum, self.feature_sizes())) > MAX_FEATURE:
            raise CondenseError(f"data '{name}': its features have more than {MAX_FEATURE:,} values in total")
        count = 1 + max(int(part.labels.max(initial=0)) for part in splits)
        self.classes = tuple(map(str, range(max(count, 2))))
        for what, part in zip(("train", "validation", "test"), splits):
            absent = sorted(set(range(len(self.classes))) - set(part.labels.tolist()))
            if absent:
                raise CondenseError(f"data '{name}': the {what} split has no graph of class {self.classes[absent[0]]}")

    def __repr__(self) -> str:
        sizes = " + ".join(str(len(part)) for part in (self.train, self.valid, self.test))
        return f"GraphTask({self.name}: {len(self.classes)} classes, {sizes} train, validation and test graphs)"

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def counts(self) -> np.ndarray:
        """Number of train graphs of each class, int64 (num_classes,)."""
        return np.bincount(self.train.labels, minlength=self.num_classes).astype(np.int64)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all graphs of the three splits, in order."""
        parts = (self.train, self.valid, self.test)
        return hashlib.sha256(" ".join(part.sha256() for part in parts).encode()).hexdigest()

    def feature_sizes(self) -> tuple[list[int], list[int]]:
        """Returns the number of values of each column of the features of nodes, and of edges."""
        parts = (self.train, self.valid, self.test)
        nodes, edges = (
            np.max([getattr(part, name).max(0, initial=0) for part in parts], 0) + 1
            for name in ("nodes", "edge_features")
        )
        return nodes.tolist(), edges.tolist()


def is_graph_data(data: Any) -> bool:
    """Returns whether DATA means graphs: ``tu:NAME``, a table of SMILES, or lists of PyTorch Geometric's ``Data``."""
    if isinstance(data, (str, Path)):
        path = _path_of(str(data))
        return path.startswith(TU_PREFIX) or has_smiles(Path(os.path.expanduser(path)))
    while isinstance(data, (list, tuple)) and data:
        data = data[0]
    return hasattr(data, "edge_index")


def load_graph_task(data: Any, options: GraphOptions, *, name: str | None = None) -> GraphTask:
    """Loads graphs.

    Args:
        data: a ``.csv`` file with the columns ``smiles`` and one of 0 and 1; ``tu:NAME``, a TU data set below
            ``CONDENSE_DATA``/tu; each may be preceded by ``NAME=``. Or a list of ``Data``, or three: train, validation
            and test. One list and TU data are divided at random, the same way each time.
        options: how they are read.
        name: name in records.

    Raises:
        CondenseError: the data do not exist or are invalid, or a package is missing.
    """
    if not isinstance(data, (str, Path)):
        return _from_lists(data, name or "graphs")
    given, path = str(data).removesuffix(_path_of(str(data))).removesuffix("="), _path_of(str(data))
    if path.startswith(TU_PREFIX):
        own_name = check_name(path.removeprefix(TU_PREFIX), "--data tu:")
        graphs = GraphArrays.from_graphs(_read_tu(own_name), f"data '{data}'")
        return GraphTask(name or given or own_name, _divide(graphs), "random", source=str(data), options=options)
    file = Path(os.path.expanduser(path)).absolute()
    if not is_existing_file(str(file)):
        raise CondenseError(f"data '{shorten(path, 200)}': no such file; give a .csv with a column smiles, or tu:NAME")
    graphs, split = read_molecules(file, options.label)
    splits = [graphs.select(np.flatnonzero(split == part)) for part in range(3)]
    source = f"{given}={file}" if given else str(file)
    return GraphTask(name or given or file.stem, splits, "scaffold", source=source, options=options)


def _path_of(data: str) -> str:
    """DATA without ``NAME=``."""
    _, equals, rest = data.partition("=")
    return rest if equals and not is_existing_file(data) else data


def _from_lists(data: Any, name: str) -> GraphTask:
    try:
        lists = [data] if len(data) and hasattr(data[0], "edge_index") else list(data)
    except (TypeError, KeyError, IndexError) as fault:
        raise CondenseError(f"data: give a list of graphs, or three lists, not {type(data).__name__}") from fault
    if len(lists) not in (1, 3):
        raise CondenseError(f"data: {len(lists)} lists of graphs; give one, or train, validation and test")
    parts = [GraphArrays.from_graphs(part, f"data '{name}'") for part in lists]
    return GraphTask(name, parts, "given") if len(parts) == 3 else GraphTask(name, _divide(parts[0]), "random")


def _divide(graphs: GraphArrays) -> list[GraphArrays]:
    """Train, validation and test graphs at random, 8 to 1 to 1 of each class."""
    rows: list[list[np.ndarray]] = [[], [], []]
    for label in np.unique(graphs.labels).tolist():
        members = np.flatnonzero(graphs.labels == label)
        members = members[rng.Draws("graph-split", label).permutation(len(members)).numpy()]
        held_out = max(1, round(SHARES[1] * len(members)))
        cut = len(members) - 2 * held_out
        for part, chosen in zip(rows, np.split(members, [max(cut, 0), max(cut, 0) + held_out])):
            part.append(chosen)
    return [graphs.select(np.sort(np.concatenate(part))) for part in rows]


def _read_tu(name: str) -> Any:
    """A TU data set that is on disk; nothing is downloaded."""
    import_pyg(f"data '{TU_PREFIX}{name}'")
    root = data_root() / "tu"
    # With one of these missing, PyTorch Geometric would download the archive.
    if not all((root / name / "raw" / f"{name}_{part}.txt").is_file() for part in ("A", "graph_indicator")):
        raise CondenseError(
            f"data '{TU_PREFIX}{name}' is not in {root / name / 'raw'} (CONDENSE_DATA sets the place); put the files "
            f"of https://www.chrsmrrs.com/graphkerneldatasets/{name}.zip there"
        )
    from torch_geometric.datasets import TUDataset

    return TUDataset(str(root), name)
