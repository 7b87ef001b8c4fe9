"""The file of a table of scores: one row for each train image of some data.

HDF5: every column is an array ``/scores/NAME``, float32 (n,); the nearest neighbours of each image in the features of
the first network are ``/graph/neighbours``, int32 (n, k), and ``/graph/distances``, float32 (n, k).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from condense import hdf5
from condense.data import Task
from condense.errors import CondenseError, did_you_mean
from condense.files import atomic_write, tensors_sha256
from condense.hdf5 import RESTORE_HINT
from condense.selection.scores import COLUMNS

_COUNT = {"type": "integer", "minimum": 1, "maximum": 10**9}

SCORES_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["data", "fingerprint", "classes", "images", "columns", "neighbours", "networks", "epochs", "content"],
    "properties": {
        "data": hdf5.NAME_SCHEMA,
        "fingerprint": hdf5.NAME_SCHEMA,
        "classes": hdf5.CLASSES_SCHEMA,
        "images": _COUNT,
        "columns": {"type": "array", "items": {"enum": list(COLUMNS)}, "uniqueItems": True, "minItems": 1},
        "neighbours": {"type": "integer", "minimum": 0, "maximum": 1000},
        "network": hdf5.NAME_SCHEMA,
        "networks": _COUNT,
        "epochs": _COUNT,
        "accuracies": {"type": "array", "items": {"type": "number", "minimum": 0, "maximum": 1}},
        "seconds": {"type": "number", "minimum": 0, "maximum": 1e15},
        "recipe": {"type": "string"},
        "content": hdf5.SHA256_SCHEMA,
    },
}

SCORES_FORMAT = hdf5.Format("condense.scores", 1, SCORES_SCHEMA, "condense scores")


@dataclass(frozen=True, eq=False)
class ScoreTable:
    """Scores of the train images of some data, on the CPU."""

    manifest: dict[str, Any]
    columns: dict[str, Tensor]
    """float32 (n,) by name, see :data:`COLUMNS`."""
    neighbours: Tensor
    """int64 (n, k)."""
    distances: Tensor
    """float32 (n, k)."""

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def difficulty(self, name: str) -> Tensor:
        """Returns a column, float32 (n,), with the sign that makes harder images larger.

        Raises:
            CondenseError: there is no such column.
        """
        if name not in self.columns:
            raise CondenseError(f"score {name}: the table has none{did_you_mean(name, self.columns)}")
        return COLUMNS[name].sign * self.columns[name]

    def check_fits(self, task: Task, file: str) -> None:
        """Checks that the table is of the train images of ``task``.

        Raises:
            CondenseError: it is of other data.
        """
        if self.manifest["fingerprint"] != task.fingerprint or len(self) != len(task.train):
            raise CondenseError(
                f"{file}: scores of other data ({self.manifest['data']}, {len(self)} images), not of {task.name} with "
                f"{len(task.train)}; make them with `condense scores --data {task.name}`"
            )


def make_table(
    about: Mapping[str, Any], columns: Mapping[str, Tensor], neighbours: Tensor, distances: Tensor
) -> ScoreTable:
    """Returns a table from what its manifest says of the data and the networks, and its arrays."""
    arrays = {name: columns[name].float().cpu().contiguous() for name in COLUMNS if name in columns}
    neighbours, distances = neighbours.long().cpu(), distances.float().cpu().contiguous()
    manifest = {
        **about,
        "images": len(next(iter(arrays.values()))),
        "columns": list(arrays),
        "neighbours": neighbours.shape[1],
        "content": _content_key(arrays, neighbours, distances),
    }
    return ScoreTable(manifest, arrays, neighbours, distances)


def _content_key(columns: Mapping[str, Tensor], neighbours: Tensor, distances: Tensor) -> str:
    return tensors_sha256({**columns, "/neighbours": neighbours, "/distances": distances})


def write_score_table(path: Path, table: ScoreTable) -> None:
    """Writes the file, atomically."""
    with atomic_write(path) as temporary, hdf5.create_hdf5(temporary, SCORES_FORMAT) as file:
        for name, values in table.columns.items():
            file.create_dataset(f"scores/{name}", data=values.numpy())
        file.create_dataset("graph/neighbours", data=table.neighbours.numpy().astype(np.int32))
        file.create_dataset("graph/distances", data=table.distances.numpy())
        hdf5.write_manifest(file, SCORES_FORMAT, table.manifest)


def read_score_table(path: Path) -> ScoreTable:
    """Reads and checks a file of scores.

    Raises:
        CondenseError: one line: no such file, another format, truncated or damaged, or arrays that are not what the
            manifest says.
    """
    with hdf5.open_hdf5(path, SCORES_FORMAT) as (file, manifest):
        images, neighbours = manifest["images"], manifest["neighbours"]
        graph = (images, neighbours)

        def read(name: str, shape: tuple[int, ...], dtype: type) -> Tensor:
            hdf5.check_link(path, file, name)
            array, size = file[name], path.stat().st_size
            if getattr(array, "shape", None) != shape or array.dtype != dtype or array.chunks is not None:
                raise CondenseError(f"{path}: '{name}' is not what the manifest says; {RESTORE_HINT}")
            if math.prod(shape) * array.dtype.itemsize > size:
                raise CondenseError(f"{path}: '{name}' claims more bytes than the file holds; {RESTORE_HINT}")
            return torch.from_numpy(array[()])

        columns = {name: read(f"scores/{name}", (images,), np.float32) for name in manifest["columns"]}
        nearest = read("graph/neighbours", graph, np.int32).long()
        distances = read("graph/distances", graph, np.float32)
    if not all(bool(values.isfinite().all()) for values in (*columns.values(), distances)):
        raise CondenseError(f"{path}: a score is not finite; {RESTORE_HINT}")
    if nearest.numel() and not 0 <= int(nearest.min()) <= int(nearest.max()) < images:
        raise CondenseError(f"{path}: a neighbour is no image of the table; {RESTORE_HINT}")
    if _content_key(columns, nearest, distances) != manifest["content"]:
        raise CondenseError(f"{path}: damaged (its arrays do not match the manifest); {RESTORE_HINT}")
    return ScoreTable(manifest, columns, nearest, distances)
