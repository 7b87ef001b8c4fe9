"""Tables of molecules as SMILES: graphs by RDKit, split by scaffold."""

from __future__ import annotations

import csv
import hashlib
import logging
import zipfile
from pathlib import Path

import numpy as np

from condense.data import cache_dir
from condense.errors import CondenseError, did_you_mean, missing_package
from condense.files import atomic_write, is_existing_file
from condense.graphs.arrays import ARRAYS, GraphArrays, import_pyg, smallest
from condense.hdf5 import RESTORE_HINT

SMILES_COLUMN = "smiles"

SHARES = (0.8, 0.1)
"""Shares of the train and the validation split; the rest is the test split."""

TABLE_LIMIT = 2**28
"""Maximum size of a table in bytes."""

PARSER_VERSION = 1
"""Raised when the same table gives other graphs or another split, so that cached graphs are not used."""

_log = logging.getLogger(__name__)


def has_smiles(path: Path) -> bool:
    """Returns whether the first row of a ``.csv`` file names a column ``smiles``."""
    if path.suffix.lower() != ".csv" or not is_existing_file(str(path)):
        return False
    try:
        with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
            header = next(csv.reader([file.readline(2**16)]), [])
    except (OSError, csv.Error):  # whoever reads the file as something else reports it
        return False
    return SMILES_COLUMN in [field.strip().lower() for field in header]


def read_molecules(path: Path, label: str) -> tuple[GraphArrays, np.ndarray]:
    """Reads a table with a column ``smiles`` and a column of 0 and 1.

    Atoms have the nine features and bonds the three that ``torch_geometric.utils.from_smiles`` (and OGB) give them.
    Parsed tables are kept in the cache. Molecules that cannot be parsed, or whose label is empty, are left out and
    counted in a warning.

    Args:
        path: the ``.csv`` file.
        label: name of the column with the class; empty if the table has one other column only.

    Returns:
        All graphs, and the split of each: 0 train, 1 validation, 2 test (see :func:`scaffold_split`).

    Raises:
        CondenseError: torch_geometric or rdkit are not installed, or the table is not such a table.
    """
    where = f"data '{path}'"
    pyg = import_pyg(where)
    try:
        import rdkit
    except ImportError as error:
        raise missing_package("rdkit", "graph", where) from error
    if path.stat().st_size > TABLE_LIMIT:
        raise CondenseError(f"{where}: larger than {TABLE_LIMIT >> 20} MiB")
    smiles, labels, unlabelled = _read_table(path, label, where)
    text = f"{PARSER_VERSION} {rdkit.__version__} {pyg.__version__} {list(zip(smiles, labels))}"
    cache = cache_dir() / "graphs" / f"{hashlib.sha256(text.encode()).hexdigest()}.npz"
    arrays = _read_cached(cache)
    if arrays is None:
        arrays = _parse(smiles, labels)
        try:
            with atomic_write(cache) as temporary, temporary.open("wb") as file:
                np.savez(file, **smallest(arrays))  # type: ignore[arg-type]
        except (CondenseError, OSError) as fault:
            _log.warning("%s: parsed again next time, the cache cannot be written (%s)", where, fault)
    graphs, split = GraphArrays(**{name: arrays[name].astype(np.int64) for name in ARRAYS}), arrays["split"]
    if unlabelled or len(graphs) < len(smiles):
        _log.warning(
            "%s: left out %d of %d molecules: %d that cannot be parsed, %d without a label",
            *(where, unlabelled + len(smiles) - len(graphs), unlabelled + len(smiles)),
            *(len(smiles) - len(graphs), unlabelled),
        )
    if not len(graphs):
        raise CondenseError(f"{where}: none of its SMILES can be parsed")
    return graphs, split


def scaffold_split(scaffolds: list[str]) -> np.ndarray:
    """Splits molecules so that those of one scaffold are in one split, as MoleculeNet does.

    Scaffolds are taken from the most to the least frequent one, of equal ones that with the later first molecule
    first. All molecules of a scaffold go to the train split if it then has at most 80 %, else to the validation split
    if both then have at most 90 %, else to the test split.

    Returns:
        int64 (molecules,): 0 train, 1 validation, 2 test.
    """
    groups: dict[str, list[int]] = {}
    for number, scaffold in enumerate(scaffolds):
        groups.setdefault(scaffold, []).append(number)
    split, sizes = np.full(len(scaffolds), 2), [0, 0]
    train, valid = SHARES[0] * len(scaffolds), (SHARES[0] + SHARES[1]) * len(scaffolds)
    for group in sorted(groups.values(), key=lambda members: (len(members), members[0]), reverse=True):
        if sizes[0] + len(group) <= train:
            part = 0
        elif sum(sizes) + len(group) <= valid:
            part = 1
        else:
            continue
        split[group] = part
        sizes[part] += len(group)
    return split


def _read_table(path: Path, label: str, where: str) -> tuple[list[str], list[int], int]:
    """SMILES and labels of the rows that have a label, and the number of the others."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            header = [field.strip() for field in next(reader, [])]
            rows = [(reader.line_num, row) for row in reader if any(field.strip() for field in row)]
    except (csv.Error, UnicodeDecodeError) as error:
        raise CondenseError(f"{where}: cannot be read as a table in UTF-8: {error}; {RESTORE_HINT}") from error
    lowered = [field.lower() for field in header]
    if SMILES_COLUMN not in lowered:
        raise CondenseError(f"{where}: the first row must name a column '{SMILES_COLUMN}'; it has {', '.join(header)}")
    column = lowered.index(SMILES_COLUMN)
    others = [field for number, field in enumerate(header) if number != column]
    if label and label not in others:
        raise CondenseError(f"{where}: label={label}: no such column{did_you_mean(label, others)}")
    if not label and len(others) != 1:
        raise CondenseError(f"{where}: name the column of the class with label=COLUMN; it has {', '.join(others)}")
    target = header.index(label or others[0])
    smiles, labels, unlabelled = [], [], 0
    for line, row in rows:
        texts = [row[number].strip() if number < len(row) else "" for number in (column, target)]
        if not texts[1]:
            unlabelled += 1
            continue
        if texts[1] not in ("0", "1", "0.0", "1.0"):
            raise CondenseError(f"{where}: line {line}: the class '{texts[1][:100]}' must be 0 or 1")
        smiles.append(texts[0])
        labels.append(int(float(texts[1])))
    return smiles, labels, unlabelled


def _parse(smiles: list[str], labels: list[int]) -> dict[str, np.ndarray]:
    """The arrays of the molecules that RDKit can parse, and their split."""
    from rdkit import Chem, rdBase
    from rdkit.Chem.Scaffolds import MurckoScaffold
    from torch_geometric.utils.smiles import from_rdmol

    graphs, scaffolds = [], []
    with rdBase.BlockLogs():  # RDKit would print a few lines for every molecule that it rejects
        for text, label in zip(smiles, labels):
            molecule = Chem.MolFromSmiles(text)
            if molecule is None or not molecule.GetNumAtoms():
                continue
            try:
                graph = from_rdmol(molecule)
            except ValueError:  # an atom or bond that the features do not know
                continue
            graph.y = np.int64(label)
            graphs.append(graph)
            scaffolds.append(MurckoScaffold.MurckoScaffoldSmiles(mol=molecule, includeChirality=False))
    arrays = {
        "nodes": np.concatenate([np.zeros((0, 9), np.int64), *(graph.x.numpy() for graph in graphs)]),
        "edges": np.concatenate([np.zeros((2, 0), np.int64), *(graph.edge_index.numpy() for graph in graphs)], 1),
        "edge_features": np.concatenate([np.zeros((0, 3), np.int64), *(graph.edge_attr.numpy() for graph in graphs)]),
        "node_counts": np.array([graph.num_nodes for graph in graphs], np.int64),
        "edge_counts": np.array([graph.num_edges for graph in graphs], np.int64),
        "labels": np.array([graph.y for graph in graphs], np.int64),
    }
    return {**arrays, "split": scaffold_split(scaffolds)}


def _read_cached(path: Path) -> dict[str, np.ndarray] | None:
    """The arrays of a parsed table; None if the file is missing or damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in (*ARRAYS, "split")}
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
        return None
