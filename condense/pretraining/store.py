"""Files of experts and teachers: their manifests, their match with a training, the networks that are added to them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch

from condense import networks, rng
from condense.data import Task, digests
from condense.device import device_name
from condense.engine import Run
from condense.errors import CondenseError
from condense.files import check_writable
from condense.formatting import by
from condense.hdf5 import RESTORE_HINT
from condense.networks import MemberKey
from condense.pretraining.pipeline import Architecture
from condense.training import STUDENT_VERSION, TrainConfig, prefers_stacked
from condense.version import __version__

MANIFEST_KEY_NAMES = {
    "fingerprint": "data",
    "transform": "normalisation",
    "library_version": "library",
    "held_out": "held-out share",
    "random_hash_version": "version of the draws",
    "student_version": "version of the training",
    "epochs": "number of epochs",
    "image_shape": "image size",
    "schedule_epochs": "schedule",
}
"""What messages call an entry of a manifest, where not by its key."""

IGNORED_MANIFEST_KEYS = ("data", "options", "steps_per_epoch", "judged_on", "code_version", "normalisation")
"""Entries in which files of the same training may differ."""


class NetworkFile(Protocol):
    """A file of trained networks."""

    @property
    def path(self) -> Path: ...

    @property
    def manifest(self) -> dict[str, Any]:
        """Describes their training."""

    @property
    def is_damaged(self) -> bool:
        """Whether it was opened for repair."""

    @property
    def keys(self) -> list[MemberKey]:
        """Name and number of each network."""

    @property
    def entries(self) -> list[dict[str, Any]]:
        """What the manifest says of each network, at least its training seconds."""


F = TypeVar("F", bound=NetworkFile)
K = TypeVar("K")
D = TypeVar("D")


@dataclass(frozen=True, eq=False)
class TrainedFile(Generic[F, K]):
    """A file of networks, after the missing ones were trained."""

    file: F
    trained: list[K]
    """Networks that were missing: numbers of experts, or architectures and numbers of teachers."""
    seconds: float
    """Duration of the call."""


def transform_digests(task: Task) -> list[str]:
    """SHA-256 of each array of the map to training space, in the order of their names."""
    return digests(task.transform)


def training_key_fields(run: Run, recipe: TrainConfig, precision: str | None, held_out: float) -> dict[str, Any]:
    """Returns all that decides the weights of a network besides its architecture and number: part of cache keys."""
    return {
        "fingerprint": run.task.fingerprint,
        "transform": transform_digests(run.task),
        "recipe": dataclasses.replace(recipe, steps=0).cache_key(),
        "held_out": held_out,
        "seed": run.seed,
        "precision": precision or run.precision,
        "device": device_name(run.device),
        "stacked": prefers_stacked(run.device),
        "random_hash_version": rng.HASH_VERSION,
        "student_version": STUDENT_VERSION,
        "torch": torch.__version__,
    }


def data_fields(task: Task, steps_per_epoch: int) -> dict[str, Any]:
    """Returns the entries of a manifest that describe the real data."""
    return {
        "data": task.name,
        "options": task.options.to_dict(),
        "classes": list(task.classes),
        "image_shape": list(task.shape),
        "steps_per_epoch": steps_per_epoch,
        "code_version": __version__,
    }


def open_matching_file(
    path: Path,
    read: Callable[..., F],
    manifest: Mapping[str, Any],
    what: str,
    replace_other: bool,
    replace_damaged: bool,
) -> F | None:
    """Opens a file if it belongs to this training; returns None if it does not exist or is to be replaced.

    Args:
        path: of the file.
        read: opens it; with ``repair=True`` also if it is damaged.
        manifest: that the file must have, without its networks.
        what: the file holds.
        replace_other: return None for a file of another training.
        replace_damaged: return a damaged file for its intact networks, or None if it cannot be opened.

    Raises:
        CondenseError: the file is damaged or belongs to another training, and is not to be replaced.
    """
    if not path.exists():
        return None
    try:
        file = read(path)
    except CondenseError as fault:
        if not replace_damaged:
            raise CondenseError(f"{fault}, or replace it with --force") from fault
        try:
            file = read(path, repair=True)
        except CondenseError:
            return None
    differences = {}
    for key, value in json.loads(json.dumps(manifest)).items():
        stored = file.manifest.get(key)
        if key not in IGNORED_MANIFEST_KEYS and stored != value:
            is_short = all(isinstance(side, int | float) or len(str(side)) < 40 for side in (stored, value))
            differences[key] = MANIFEST_KEY_NAMES.get(key, key) + f" ({stored}, not {value})" * is_short
    if len(differences) > 1:
        differences.pop("layout", None)  # it follows from the others
    if differences and not replace_other:
        names = ", ".join(differences.values())
        raise CondenseError(f"{path}: holds {what} of another {names}; take another --out, or replace it with --force")
    return None if differences else file


def check_same(path: Path, what: str, properties: Mapping[str, tuple[Any, Any]], hints: Mapping[str, str] = {}) -> None:
    """Checks that the networks of a file fit the data.

    Args:
        path: of the file.
        what: the file holds.
        properties: pairs of stored and expected values, by name; an expected None allows any value.
        hints: ends of messages, by name.

    Raises:
        CondenseError: a pair differs.
    """
    for name, (stored, expected) in properties.items():
        if expected is not None and stored != expected:
            sides = [_describe(side) for side in (stored, expected)]
            difference = f" ({sides[0]}, not {sides[1]})" if sides[0] != sides[1] else ""  # or another order of classes
            raise CondenseError(f"{path}: its {what} are of another {name}{difference}{hints.get(name, '')}")


def _describe(value: Any) -> str:
    """An image size as 3x32x32, a list of classes by its length and first names."""
    if not isinstance(value, list | tuple):
        return str(value)
    if all(isinstance(item, int) for item in value):
        return by(value)
    return f"{len(value)} of {', '.join(map(str, value[:3]))}" + ", ..." * (len(value) > 3)


def parts_folder(path: Path) -> Path:
    """The folder beside an unfinished file with the finished networks and the states of trainings in progress."""
    return path.with_name(path.name + ".parts")


@dataclass(frozen=True)
class FileKind(Generic[F, D]):
    """How the files of one kind of network are read and written."""

    name: str
    """What messages call one network: expert or teacher."""
    read: Callable[..., F]
    """Opens a file; with ``repair=True`` also a damaged one."""
    load: Callable[[F, int], D]
    """Reads the network at an index of the file."""
    is_intact: Callable[[F, int], bool]
    """Whether its checksums are right."""
    write: Callable[[Path, dict[str, Any], Sequence[tuple[dict[str, Any], Callable[[], D]]]], None]
    """Writes a file from a manifest and, for each network, its entry and a function that returns it."""
    part_name: Callable[[MemberKey], str]
    """Name of the file of one finished network."""
    is_resumable: bool
    """Whether the state of a training in progress is stored."""
    is_numbered: bool
    """Whether the index of a network in the file is its number, so that all up to the last one must be there."""


class FileStore(Generic[F, D]):
    """A file of networks and, while it is not complete, the folder of its finished ones (a store of the pipeline)."""

    def __init__(
        self,
        run: Run,
        kind: FileKind[F, D],
        path: Path,
        manifest: dict[str, Any],
        keys: Sequence[tuple[Architecture, int]],
        nbytes: Callable[[Architecture], int],
        force: bool,
    ) -> None:
        """``nbytes`` returns the size of a network in the file; ``force`` replaces what does not belong there."""
        self.run, self.kind, self.path, self.manifest = run, kind, path, manifest
        self.architectures = {networks.network_name(architecture): architecture for architecture, _ in keys}
        self.members = [(networks.network_name(architecture), number) for architecture, number in keys]
        self.nbytes, self.force = nbytes, force

    @property
    def keys(self) -> list[tuple[Architecture, int]]:
        """Networks that the file holds at the end."""
        return [self._key(member) for member in self.members]

    def _key(self, member: MemberKey) -> tuple[Architecture, int]:
        return self.architectures.get(member[0], member[0]), member[1]

    def find(self) -> dict[tuple[Architecture, int], float]:
        if self.run.ranks.is_main_process:
            check_writable(self.path, force=True)
        places = self._open_places()
        missing = [self._key(member) for member in self.members if member not in places]
        if missing and self.run.ranks.is_main_process:
            # A whole new file beside the old one, and the parts.
            old = self.path.stat().st_size if self.path.exists() else 0
            check_writable(self.path, force=True, size=old + 2 * sum(self.nbytes(name) for name, _ in missing))
        return {self._key(member): float(file.entries[k]["seconds"]) for member, (file, k) in places.items()}

    def checkpoint(self, architecture: Architecture, number: int) -> Path | None:
        key = networks.network_name(architecture), number
        return self._part(key).with_suffix(".train") if self.kind.is_resumable else None

    def write(self, key: tuple[Architecture, int], record: tuple[dict[str, Any], D]) -> None:
        entry, data = record
        self.kind.write(self._part((networks.network_name(key[0]), key[1])), self.manifest, [(entry, lambda: data)])

    def merge(self) -> None:
        places = self._open_places()  # another process may have added to the file in the meantime
        for name, number in self.members:
            if (name, number) not in places:
                raise CondenseError(
                    f"{self.path}: {self.kind.name} {number} of {name} is not found there; ranks need one disk"
                )
        merged = [member for member, (file, _) in places.items() if file.path == self.path and not file.is_damaged]
        if len(merged) < len(places):
            order = self.members if self.kind.is_numbered else dict.fromkeys([*merged, *self.members, *places])
            self.kind.write(self.path, self.manifest, [self._entry(*places[member]) for member in order])
            self.kind.read(self.path)  # the parts stay if it cannot be read back
        shutil.rmtree(parts_folder(self.path), ignore_errors=True)

    def _entry(self, file: F, k: int) -> tuple[dict[str, Any], Callable[[], D]]:
        return file.entries[k], lambda: self.kind.load(file, k)

    def _part(self, key: MemberKey) -> Path:
        return parts_folder(self.path) / self.kind.part_name(key)

    def _open_places(self) -> dict[MemberKey, tuple[F, int]]:
        """Returns the intact networks of the file and of its parts by key: a file and the index in it."""
        places: dict[MemberKey, tuple[F, int]] = {}
        for path in (self.path, *sorted(parts_folder(self.path).glob("*.h5"))):
            replace_damaged = self.force or path != self.path
            what = f"{self.kind.name}s"
            file = open_matching_file(path, self.kind.read, self.manifest, what, self.force, replace_damaged)
            if file is None:
                continue
            if self.kind.is_numbered and path == self.path:
                self.members = list(dict.fromkeys([*self.members, *file.keys]))
            for k, member in enumerate(file.keys):
                if member not in places and self._is_usable(file, k, replace_damaged):
                    places[member] = file, k
        return places

    def _is_usable(self, file: F, k: int, replace_damaged: bool) -> bool:
        """Whether a network is intact and of this version of its library; if it is not to be replaced, it must be."""
        (name, number), entry = file.keys[k], file.entries[k]
        title = f"{file.path}: {self.kind.name} {number} of {name}"
        # Experts have the version in the manifest, since all are of one network.
        is_stale = "library_version" in entry and entry["library_version"] != networks.library_version(name)
        if is_stale and not self.force:
            raise CondenseError(
                f"{title} is of another version of its library; take another --out, or replace it with --force"
            )
        is_intact = self.kind.is_intact(file, k)
        if not is_intact and not replace_damaged:
            raise CondenseError(f"{title} is damaged (its checksum differs); {RESTORE_HINT} with --force")
        return is_intact and not is_stale


class ContentGuard:
    """Part of a run's checkpoint: refuses to resume with other networks than the run began with."""

    def __init__(self, content: str, file: str | Path, what: str) -> None:
        self.content, self.file, self.what = content, file, what

    def state_dict(self) -> dict[str, str]:
        return {"content": self.content}

    def load_state_dict(self, state: Mapping[str, str]) -> None:
        if state["content"] != self.content:
            raise CondenseError(
                f"{self.file}: holds other {self.what} than when the run began; restore them, or start again with "
                "--force"
            )
