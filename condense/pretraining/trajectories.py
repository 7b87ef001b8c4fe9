"""Expert trajectories: networks trained on the real data, their weights before training and after each epoch, in one
file.

The file is HDF5. ``parameters`` (experts, epochs + 1, P), float16 or float32, is contiguous, so that it can be mapped
into memory. ``digests`` (experts, epochs + 1, 32) holds the SHA-256 of each snapshot, so that only the snapshots in use
are verified; the digest of the file covers everything else. The manifest describes the network, the data and the
training. An expert is identified by its number: experts that are added later equal those of a single call (on a CPU bit
for bit; a GPU trains groups together, whose sizes change the rounding).
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from condense import hdf5, networks
from condense.data import Task, cache_dir
from condense.engine import Run
from condense.errors import CondenseError, did_you_mean
from condense.files import atomic_write
from condense.hdf5 import RESTORE_HINT
from condense.networks import Layout, MemberKey, layout_of
from condense.pretraining.budget import TrainingPlan
from condense.pretraining.pipeline import (
    Architecture,
    RecordedTraining,
    make_student,
    split_training_data,
    train_missing,
)
from condense.pretraining.store import FileKind, FileStore, TrainedFile, data_fields, training_key_fields
from condense.training import GradientRule, TrainConfig, accuracy

TRAJECTORY_DTYPES = {"float16": torch.float16, "float32": torch.float32}

MAX_EXPERT_GROUP = 10
"""Maximum number of experts that a GPU trains together."""

TRAJECTORY_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": [
        "network",
        "layout",
        "classes",
        "image_shape",
        "fingerprint",
        "transform",
        "epochs",
        "dtype",
        "experts",
        "content",
    ],
    "properties": {
        "network": hdf5.NAME_SCHEMA,
        "layout": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "array",
                "minItems": 2,
                "maxItems": 2,
                "prefixItems": [
                    hdf5.NAME_SCHEMA,
                    {"type": "array", "items": {"type": "integer", "minimum": 1}},
                ],
            },
        },
        "classes": hdf5.CLASSES_SCHEMA,
        "image_shape": hdf5.IMAGE_SHAPE_SCHEMA,
        "fingerprint": hdf5.NAME_SCHEMA,
        "transform": {"type": "array", "items": hdf5.SHA256_SCHEMA},
        "epochs": {"type": "integer", "minimum": 1, "maximum": 10**9},
        "dtype": {"enum": list(TRAJECTORY_DTYPES)},
        "experts": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["seconds"],
                "properties": {
                    "number": {"type": "integer", "minimum": 0},
                    "seconds": {"type": "number", "minimum": 0, "maximum": 1e15},
                    "accuracy": {"type": "number", "minimum": 0, "maximum": 1},
                },
            },
        },
        "content": hdf5.SHA256_SCHEMA,
        "data": hdf5.NAME_SCHEMA,
        "held_out": {"type": "number", "minimum": 0, "maximum": 1},
    },
}

TRAJECTORY_FORMAT = hdf5.Format(
    "condense.trajectories", 1, TRAJECTORY_SCHEMA, maker="condense experts", separate="parameters"
)

ExpertRecord = tuple[dict[str, Any], Tensor]
"""Entry of the manifest, and snapshots (epochs + 1, P) on the CPU."""


@dataclass(frozen=True)
class ExpertTraining:
    """How a method trains its experts."""

    recipe: TrainConfig
    """Training by SGD; its number of steps is replaced."""
    update: GradientRule | None = None
    """Gradients that SGD follows; see :func:`condense.training.train`."""
    precision: str | None = None
    """fp32 or bf16; None: the run's."""
    held_out: float = 0.0
    """Share of each class's training images that measures the experts' accuracy instead of training them; 0: none."""


# -- the file ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class TrajectoryFile:
    """A file of trajectories, open for reading. Its snapshots are not verified until :meth:`verify`."""

    path: Path
    manifest: dict[str, Any]
    values: np.ndarray
    """(experts, epochs + 1, P), mapped into memory."""
    digests: np.ndarray
    """(experts, epochs + 1, 32) uint8."""
    is_damaged: bool = False
    """Whether it was opened for repair: only experts that are intact may be used, and the file must be rewritten."""

    @property
    def count(self) -> int:
        """Number of experts."""
        return len(self.values)

    @property
    def epochs(self) -> int:
        """Epochs of each expert's training; there is one snapshot more."""
        return self.values.shape[1] - 1

    @property
    def layout(self) -> Layout:
        """Layout of the P numbers of a snapshot."""
        return Layout.read(self.manifest["layout"])

    @property
    def entries(self) -> list[dict[str, Any]]:
        """What the manifest says of each expert."""
        return self.manifest["experts"]

    @property
    def keys(self) -> list[MemberKey]:
        """Network and number of each expert."""
        return [(self.manifest["network"], entry.get("number", k)) for k, entry in enumerate(self.entries)]

    def content_key(self, count: int, epochs: int) -> str:
        """SHA-256 of the snapshots of the first experts up to an epoch; further ones in the file do not matter."""
        return hashlib.sha256(np.ascontiguousarray(self.digests[:count, : epochs + 1]).tobytes()).hexdigest()

    def seconds(self, numbers: Iterable[int], epochs: int) -> float:
        """Training seconds of these experts up to an epoch."""
        return sum(self.entries[k]["seconds"] for k in numbers) * epochs / self.epochs

    def is_intact(self, k: int, t: int) -> bool:
        """Whether the checksum of a snapshot is right."""
        return _snapshot_digest(self.values[k, t]) == self.digests[k, t].tobytes()

    def verify(self, numbers: Iterable[int], epochs: Sequence[int]) -> None:
        """Reads and verifies snapshots.

        Raises:
            CondenseError: one is damaged.
        """
        for k in numbers:
            for t in epochs:
                if not self.is_intact(k, t):
                    raise CondenseError(
                        f"{self.path}: expert {k} after epoch {t} is damaged (its checksum differs); {RESTORE_HINT}"
                    )


def _snapshot_digest(snapshot: np.ndarray) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(snapshot).view(np.uint8).data).digest()


def read_trajectory_file(path: Path, *, repair: bool = False) -> TrajectoryFile:
    """Opens an untrusted file of trajectories: types, sizes and links are checked, no snapshot is read.

    Args:
        path: The file.
        repair: Whether to open a damaged file, in order to find its intact experts.

    Raises:
        CondenseError: one line: no such file, not our format, newer version, truncated or damaged.
    """
    with hdf5.open_hdf5(path, TRAJECTORY_FORMAT, repair=repair) as (file, manifest):
        shape = (len(manifest["experts"]), manifest["epochs"] + 1, Layout.read(manifest["layout"]).size)
        dtype = np.dtype(manifest["dtype"])
        offset = _offset(path, file, "parameters", shape, dtype)
        _offset(path, file, "digests", (*shape[:2], 32), np.dtype(np.uint8))
        digests = file["digests"][()]
    if hashlib.sha256(digests.tobytes()).hexdigest() != manifest["content"]:
        raise CondenseError(f"{path}: the array 'digests' is damaged (its checksum differs); {RESTORE_HINT}")
    return TrajectoryFile(path, manifest, np.memmap(path, dtype, "r", offset, shape), digests, repair)


def _offset(path: Path, file: Any, name: str, shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Returns the offset of an array in the file; checks that it is contiguous and has this shape and type."""
    import h5py

    hdf5.check_link(path, file, name)
    array = file[name]
    if not isinstance(array, h5py.Dataset) or array.is_virtual or array.external or array.chunks is not None:
        raise CondenseError(f"{path}: '{name}' is not an array stored in one piece in this file")
    offset = array.id.get_offset()
    if array.shape != shape or array.dtype != dtype or offset is None or offset % dtype.itemsize:
        raise CondenseError(f"{path}: the array '{name}' is not what the manifest says; {RESTORE_HINT}")
    if offset + math.prod(shape) * dtype.itemsize > path.stat().st_size:
        raise CondenseError(f"{path}: truncated or damaged; {RESTORE_HINT}")
    return int(offset)


def write_trajectory_file(
    path: Path, manifest: dict[str, Any], shape: tuple[int, int, int], experts: Iterable[np.ndarray]
) -> None:
    """Writes the file atomically from the snapshots (epochs + 1, P) of one expert after the other."""
    digests = np.empty((*shape[:2], 32), np.uint8)
    with atomic_write(path) as temporary, hdf5.create_hdf5(temporary, TRAJECTORY_FORMAT) as file:
        parameters = file.create_dataset("parameters", shape, manifest["dtype"])
        for k, snapshots in enumerate(experts):
            parameters[k] = snapshots
            digests[k] = [np.frombuffer(_snapshot_digest(snapshot), np.uint8) for snapshot in snapshots]
        file.create_dataset("digests", data=digests)
        hdf5.write_manifest(
            file, TRAJECTORY_FORMAT, {**manifest, "content": hashlib.sha256(digests.tobytes()).hexdigest()}
        )


def trajectory_nbytes(count: int, epochs: int, layout: Layout, dtype: str = "float16") -> int:
    """Bytes of the snapshots of ``count`` experts in a file."""
    return count * (epochs + 1) * layout.size * TRAJECTORY_DTYPES[dtype].itemsize


# -- the training -----------------------------------------------------------------------------------------------------


def expert_cache_key_fields(run: Run, training: ExpertTraining, epochs: int, dtype: str) -> dict[str, Any]:
    """Returns all that decides the weights of an expert besides its number, as entries of the manifest."""
    fields = {
        **training_key_fields(run, training.recipe, training.precision, training.held_out),
        "network": networks.network_name(run.network),
        "library_version": networks.library_version(run.network),
        "update": str(training.update),
        "dtype": dtype,
    }
    # Without drops of the learning rate a shorter training is the beginning of a longer one.
    return {**fields, "schedule_epochs": epochs} if training.recipe.lr_milestones else fields


def expert_cache_file(run: Run, training: ExpertTraining, epochs: int, dtype: str = "float16") -> Path:
    """Returns the path of such experts in the cache; it is the same for all methods."""
    text = json.dumps(expert_cache_key_fields(run, training, epochs, dtype), sort_keys=True)
    return cache_dir() / "trajectories" / f"{hashlib.sha256(text.encode()).hexdigest()}-e{epochs}.h5"


def train_trajectory_file(
    run: Run,
    training: ExpertTraining,
    path: Path,
    *,
    count: int,
    epochs: int,
    dtype: str = "float16",
    force: bool = False,
) -> TrainedFile[TrajectoryFile, int]:
    """Trains experts of the run's architecture on its real data and writes their trajectories to ``path``.

    Experts in the file stay, and so do finished ones of an interrupted call (in ``path`` + ``.parts``): the same call
    trains what is missing, and a larger ``count`` adds to the file. Ranks share the training.

    Args:
        run: device, seed, data, network; stops the training on a signal.
        training: of the experts.
        path: file to write.
        count: minimum number of experts in the file.
        epochs: passes over the training images; a snapshot is taken before the first and after each.
        dtype: float16 or float32, of the stored weights.
        force: replace experts of other data, networks or trainings, and damaged ones.

    Raises:
        Interrupted: SIGINT or SIGTERM.
        CondenseError: ``path`` holds something else or cannot be written, or an expert diverged.
    """
    if dtype not in TRAJECTORY_DTYPES:
        raise CondenseError(f"--dtype {dtype}: unknown{did_you_mean(dtype, TRAJECTORY_DTYPES)}")
    began = time.monotonic()
    source, steps_per_epoch = split_training_data(run, training.recipe.batch, training.held_out)
    plan = TrainingPlan(count, epochs, steps_per_epoch)
    store = trajectory_store(run, training, path, plan, dtype, force)
    message = "stopped while training experts; those that are done are kept: the same command continues with the rest"
    _, trained = train_missing(run, recorded_expert_training(run, training, source, dtype), store, plan, message)
    return TrainedFile(read_trajectory_file(path), [number for _, number in trained], time.monotonic() - began)


def recorded_expert_training(
    run: Run, training: ExpertTraining, source: Task, dtype: str
) -> RecordedTraining[Tensor, ExpertRecord]:
    """Returns the training whose snapshots are flat weights (P,) on the CPU."""
    layout, precision = layout_of(run.network, run.task), training.precision or run.precision

    def record(
        architecture: Architecture, number: int, net: networks.Network, snapshots: list[Tensor], seconds: float
    ) -> ExpertRecord:
        entry: dict[str, Any] = {"number": number, "seconds": round(seconds, 3)}
        if training.held_out:
            entry["accuracy"] = accuracy(net, source, device=run.device, precision=precision)
        return entry, torch.stack(snapshots)

    return RecordedTraining(
        "expert",
        training.recipe,
        precision,
        student=lambda architecture, number: make_student(run, source, architecture, "expert", number),
        snapshot=lambda state: layout.flatten(state).to("cpu", TRAJECTORY_DTYPES[dtype]),
        record=record,
        is_finite=lambda snapshot: bool(snapshot.isfinite().all()),
        remedy=f"(its weights are not finite in {dtype}); lower the experts' learning rate, now {training.recipe.lr:g}",
        update=training.update,
        max_group=MAX_EXPERT_GROUP,
    )


def _write_experts(
    path: Path, manifest: dict[str, Any], experts: Sequence[tuple[dict[str, Any], Callable[[], Any]]]
) -> None:
    shape = (len(experts), manifest["epochs"] + 1, Layout.read(manifest["layout"]).size)
    manifest = {**manifest, "experts": [entry for entry, _ in experts]}
    write_trajectory_file(path, manifest, shape, (np.asarray(load()) for _, load in experts))


TRAJECTORY_KIND: FileKind[TrajectoryFile, Any] = FileKind(
    "expert",
    read_trajectory_file,
    load=lambda file, k: file.values[k],
    is_intact=lambda file, k: all(file.is_intact(k, t) for t in range(file.epochs + 1)),
    write=_write_experts,
    part_name=lambda member: f"{member[1]:04d}.h5",
    is_resumable=False,
    is_numbered=True,
)


def trajectory_store(
    run: Run, training: ExpertTraining, path: Path, plan: TrainingPlan, dtype: str, force: bool
) -> FileStore[TrajectoryFile, Any]:
    """Returns the store of a file of trajectories."""
    layout = layout_of(run.network, run.task)
    manifest = {
        **expert_cache_key_fields(run, training, plan.units, dtype),
        **data_fields(run.task, plan.unit_steps),
        "layout": layout.describe(),
        "epochs": plan.units,
    }
    keys = [(run.network, number) for number in range(plan.networks)]
    nbytes = trajectory_nbytes(1, plan.units, layout, dtype)
    return FileStore(run, TRAJECTORY_KIND, path, manifest, keys, lambda architecture: nbytes, force)
