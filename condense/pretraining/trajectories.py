"""Expert trajectories: networks trained on the real data, their weights before training and after each epoch, in one
file.

The file is HDF5: ``parameters`` (experts, epochs + 1, P), float16 or float32, lies in one piece, so that it can be
mapped into memory; ``digests`` (experts, epochs + 1, 32) holds the SHA-256 of each snapshot, so that only what is read
is verified; the manifest says what network, data and training they are of. An expert is known by its number: experts
that are added later are those that would have been trained at once (on a CPU bit for bit; a GPU trains groups together,
whose sizes change the rounding).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from condense import hdf5, networks, rng
from condense.data import Task, cache_dir
from condense.device import device_name
from condense.engine import Run
from condense.errors import CondenseError, did_you_mean
from condense.files import check_writable, replacing
from condense.hdf5 import AGAIN
from condense.networks import Layout, layout_of
from condense.pretraining.budget import groups, taught
from condense.pretraining.store import expected, parts_of, transform_digests
from condense.training import STUDENT_VERSION, Recipe, Student, TaskSource, Update, accuracy, pick_together, train
from condense.version import __version__

_log = logging.getLogger(__name__)

DTYPES = {"float16": torch.float16, "float32": torch.float32}

GROUP = 10
"""Most experts that a GPU trains together."""

FORMAT = hdf5.Format(
    "condense.trajectories", 1, maker="condense experts",
    required={
        "network": str, "layout": list, "classes": list, "image_shape": list, "fingerprint": str, "transform": list,
        "epochs": int, "dtype": str, "experts": list, "content": str,
    },
)  # fmt: skip


@dataclass(frozen=True)
class Training:
    """How a method wants its experts trained."""

    recipe: Recipe
    """Of SGD; its number of steps is replaced."""
    update: Update | None = None
    """What gradients SGD steps along; see ``students.train``."""
    precision: str | None = None
    """fp32 or bf16; None is the run's."""
    held_out: float = 0.0
    """Share of each class's training images that experts do not see and are judged on; 0 for none."""


# -- the file ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Recorded:
    """A file of trajectories, open for reading. Its snapshots are verified by whoever takes them."""

    path: Path
    manifest: dict[str, Any]
    values: np.ndarray
    """(experts, epochs + 1, P), mapped into memory."""
    digests: np.ndarray
    """(experts, epochs + 1, 32) uint8."""

    @property
    def count(self) -> int:
        """Experts."""
        return len(self.values)

    @property
    def epochs(self) -> int:
        """Of each expert's training; there is one snapshot more."""
        return self.values.shape[1] - 1

    @property
    def layout(self) -> Layout:
        """What the P numbers of a snapshot are."""
        return Layout.read(self.manifest["layout"])

    def content(self, count: int, epochs: int) -> str:
        """Key of the snapshots of the first experts up to an epoch, however long the file is."""
        return hashlib.sha256(np.ascontiguousarray(self.digests[:count, : epochs + 1]).tobytes()).hexdigest()

    def seconds(self, numbers: Iterable[int], epochs: int) -> float:
        """Seconds that the training of these experts took up to an epoch."""
        return sum(self.manifest["experts"][k]["seconds"] for k in numbers) * epochs / self.epochs

    def sound(self, k: int, t: int) -> bool:
        """Whether a snapshot is what was written."""
        return _digest(self.values[k, t]) == self.digests[k, t].tobytes()

    def verify(self, numbers: Iterable[int], epochs: Sequence[int]) -> None:
        """Reads and verifies snapshots.

        Raises:
            CondenseError: one is damaged.
        """
        for k in numbers:
            for t in epochs:
                if not self.sound(k, t):
                    raise CondenseError(
                        f"{self.path}: expert {k} after epoch {t} is damaged (its checksum differs); {AGAIN}"
                    )


def _digest(snapshot: np.ndarray) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(snapshot).view(np.uint8).data).digest()


def read(path: Path) -> Recorded:
    """Opens a file of trajectories from anywhere: types, sizes and links are checked, no snapshot is read.

    Raises:
        CondenseError: one line: no such file, not our format, newer version, truncated or damaged.
    """
    with hdf5.opened(path, FORMAT) as (file, manifest):
        if manifest["dtype"] not in DTYPES or manifest["epochs"] < 1 or not manifest["experts"]:
            raise CondenseError(f"{path}: the manifest is not one of trajectories; it was not written by this toolkit")
        shape = (len(manifest["experts"]), manifest["epochs"] + 1, Layout.read(manifest["layout"]).size)
        dtype = np.dtype(manifest["dtype"])
        offset = _offset(path, file, "parameters", shape, dtype)
        _offset(path, file, "digests", (*shape[:2], 32), np.dtype(np.uint8))
        digests = file["digests"][()]
    if hashlib.sha256(digests.tobytes()).hexdigest() != manifest["content"]:
        raise CondenseError(f"{path}: the array 'digests' is damaged (its checksum differs); {AGAIN}")
    return Recorded(path, manifest, np.memmap(path, dtype, "r", offset, shape), digests)


def _offset(path: Path, file: Any, name: str, shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Where an array begins in the file, in one piece and of this shape and type."""
    import h5py

    hdf5.check_link(path, file, name)
    array = file[name]
    if not isinstance(array, h5py.Dataset) or array.is_virtual or array.external or array.chunks is not None:
        raise CondenseError(f"{path}: '{name}' is not an array stored in one piece in this file")
    offset = array.id.get_offset()
    if array.shape != shape or array.dtype != dtype or offset is None or offset % dtype.itemsize:
        raise CondenseError(f"{path}: the array '{name}' is not what the manifest says; {AGAIN}")
    if offset + math.prod(shape) * dtype.itemsize > path.stat().st_size:
        raise CondenseError(f"{path}: truncated or damaged; {AGAIN}")
    return int(offset)


def _write(path: Path, manifest: dict[str, Any], shape: tuple[int, int, int], experts: Iterable[np.ndarray]) -> None:
    """The file, atomically, from the snapshots (epochs + 1, P) of one expert after the other."""
    digests = np.empty((*shape[:2], 32), np.uint8)
    with replacing(path) as temporary, hdf5.create(temporary) as file:
        parameters = file.create_dataset("parameters", shape, manifest["dtype"])
        for k, snapshots in enumerate(experts):
            parameters[k] = snapshots
            digests[k] = [np.frombuffer(_digest(snapshot), np.uint8) for snapshot in snapshots]
        file.create_dataset("digests", data=digests)
        hdf5.sign(file, FORMAT, {**manifest, "content": hashlib.sha256(digests.tobytes()).hexdigest()})


def nbytes(count: int, epochs: int, layout: Layout, dtype: str = "float16") -> int:
    """Bytes of the snapshots of ``count`` experts."""
    return count * (epochs + 1) * layout.size * DTYPES[dtype].itemsize


# -- making it --------------------------------------------------------------------------------------------------------


def facts(run: Run, training: Training, epochs: int, dtype: str) -> dict[str, Any]:
    """All that decides the weights of an expert besides its number, as the manifest states it."""
    found = {
        "fingerprint": run.task.fingerprint, "transform": transform_digests(run.task),
        "network": networks.name_of(run.network), "library_version": networks.library_version(run.network),
        "recipe": str(dataclasses.replace(training.recipe, steps=0)), "update": str(training.update),
        "held_out": training.held_out, "seed": run.seed, "precision": training.precision or run.precision,
        "dtype": dtype, "device": device_name(run.device), "stacked": pick_together(run.device),
        "random_hash_version": rng.HASH_VERSION, "student_version": STUDENT_VERSION, "torch": torch.__version__,
    }  # fmt: skip
    # Without drops of the learning rate a shorter training is the beginning of a longer one.
    return {**found, "schedule_epochs": epochs} if training.recipe.drops else found


def cache_file(run: Run, training: Training, epochs: int, dtype: str = "float16") -> Path:
    """Where the cache keeps such experts, for every method that wants them."""
    text = json.dumps(facts(run, training, epochs, dtype), sort_keys=True)
    return cache_dir() / "trajectories" / f"{hashlib.sha256(text.encode()).hexdigest()}-e{epochs}.h5"


@dataclass(frozen=True, eq=False)
class Made:
    """What :func:`record` did."""

    file: Recorded
    trained: list[int]
    """Numbers of the experts that were not there."""
    seconds: float
    """That it took."""


def record(
    run: Run,
    training: Training,
    path: Path,
    *,
    count: int,
    epochs: int,
    dtype: str = "float16",
    again: str = "stopped while training experts; those that are done are kept: the same command goes on with the rest",
    force: bool = False,
) -> Made:
    """Trains experts of the run's architecture on its real data, and writes their trajectories to ``path``.

    Experts that the file holds stay, and finished ones of a call that was killed (below ``path`` + ``.parts``) count
    too: the same call goes on with what is missing, and a larger ``count`` adds to the file. Ranks train shares.

    Args:
        run: device, seed, data, network; stops it on a signal.
        training: how.
        path: file to write.
        count: experts that it shall hold, at least.
        epochs: passes over the training images; a snapshot is taken before the first and after each.
        dtype: float16 or float32, of the stored weights.
        again: what is said where a signal stops the training.
        force: replace what other data, networks or trainings left there, and what is damaged.

    Raises:
        Interrupted: SIGINT or SIGTERM.
        CondenseError: the place holds something else or cannot be written, or an expert diverged.
    """
    if dtype not in DTYPES:
        raise CondenseError(f"--dtype {dtype}: unknown{did_you_mean(dtype, DTYPES)}")
    began, ranks = time.monotonic(), run.ranks
    known, layout = facts(run, training, epochs, dtype), layout_of(run.network, run.task)
    source, unit = taught(run, training.recipe.batch, training.held_out)
    about = {
        **known, "data": run.task.name, "options": dataclasses.asdict(run.task.options), "layout": layout.describe(),
        "classes": list(run.task.classes), "image_shape": list(run.task.shape), "epochs": epochs,
        "steps_per_epoch": unit, "code_version": __version__,
    }  # fmt: skip
    if ranks.leads:
        check_writable(path, force=True)
    there, parts = expected(path, read, about, "experts", force, force), parts_of(path)
    have = {} if there is None else {k: (there, k) for k in range(there.count) if _whole(there, k, force)}
    for place in parts.glob("[0-9]*.h5"):
        part = expected(place, read, about, "experts", force, True)
        if part is not None and _whole(part, 0, True):
            have.setdefault(int(place.stem), (part, 0))
    numbers = range(max(count, 0 if there is None else there.count))
    missing = [k for k in numbers if k not in have]
    if missing and ranks.leads:
        check_writable(path, force=True, size=nbytes(len(numbers) + len(missing), epochs, layout, dtype))
    mine = [k for k in missing if k % ranks.world == ranks.rank]
    shape = (1, epochs + 1, layout.size)
    for group, report in groups(run, mine, epochs * unit, f"{len(missing)} experts of {epochs} epochs", again, GROUP):
        for snapshots, entry in _train(run, training, source, layout, group, epochs, unit, dtype, report):
            _write(parts / f"{entry['number']:04d}.h5", {**about, "experts": [entry]}, shape, [snapshots.numpy()])
    ranks.close()
    if ranks.leads:
        for k in missing:
            have[k] = read(parts / f"{k:04d}.h5"), 0
        used = [have[k] for k in numbers]
        if any(file is not there for file, _ in used):
            about["experts"] = [file.manifest["experts"][k] for file, k in used]
            _write(path, about, (len(numbers), *shape[1:]), (file.values[k] for file, k in used))
            shutil.rmtree(parts, ignore_errors=True)
    ranks.close()
    return Made(read(path), missing, time.monotonic() - began)


def _whole(file: Recorded, k: int, damaged: bool) -> bool:
    """Whether all of an expert's snapshots are sound; where they need be (not ``damaged``), an error if they are
    not."""
    sound = all(file.sound(k, t) for t in range(file.epochs + 1))
    if not sound and not damaged:
        raise CondenseError(f"{file.path}: expert {k} is damaged (its checksum differs); {AGAIN} with --force")
    return sound


def _train(
    run: Run,
    training: Training,
    source: Task,
    layout: Layout,
    group: Sequence[int],
    epochs: int,
    unit: int,
    dtype: str,
    report: Callable[[int], None],
) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Trains the experts of ``group``, together where that is faster.

    Yields:
        Of each its snapshots (epochs + 1, P) on the CPU, one every ``unit`` steps, and its entry of the manifest.

    Raises:
        CondenseError: experts diverged; the others were yielded before.
    """
    students = [_student(run, source, k) for k in group]
    precision = training.precision or run.precision
    taken = [{0: _shot(layout, student.network, dtype)} for student in students]
    lost: dict[int, int] = {}

    def watch(i: int, step: int, state: Mapping[str, Tensor]) -> None:
        shot = taken[i][step] = _shot(layout, state, dtype)
        if not bool(shot.isfinite().all()):
            lost.setdefault(group[i], step // unit)
            if len(lost) == len(group):
                raise _diverged(lost, training, dtype)

    recipe = dataclasses.replace(training.recipe, steps=epochs * unit)
    seconds = train(
        students, recipe, device=run.device, precision=precision, report=report, watch=watch, watch_every=unit,
        update=training.update,
    )  # fmt: skip
    for k, student, shots in zip(group, students, taken):
        entry: dict[str, Any] = {"number": k, "seconds": round(seconds / len(group), 3)}
        if training.held_out:
            entry["accuracy"] = accuracy(student.network, source, device=run.device, precision=precision)
        if k not in lost:
            yield torch.stack([shots[step] for step in sorted(shots)]), entry
    if lost:
        raise _diverged(lost, training, dtype)


def _student(run: Run, source: Task, k: int) -> Student:
    with rng.seeded(run.seed, "expert", k):
        net = networks.build(run.network, source.shape, source.num_classes)
    return Student(net, TaskSource(source, run.device), rng.key(run.seed, "expert", k))


def _shot(layout: Layout, state: Mapping[str, Tensor] | nn.Module, dtype: str) -> Tensor:
    return layout.flatten(state).to("cpu", DTYPES[dtype])


def _diverged(lost: Mapping[int, int], training: Training, dtype: str) -> CondenseError:
    """``lost``: numbers of experts, with the epoch after which their weights were no numbers that can be stored."""
    which = ", ".join(f"expert {k} in epoch {epoch}" for k, epoch in lost.items())
    return CondenseError(
        f"diverged: {which} (its weights are not finite in {dtype}); lower the experts' learning rate, now "
        f"{training.recipe.lr:g}; experts that are done are kept"
    )
