"""What the files of experts and teachers have in common: their manifests, and how a file is matched to a training."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch

from condense import rng
from condense.data import Task, digests
from condense.device import device_name
from condense.engine import Run
from condense.errors import CondenseError
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


class HasManifest(Protocol):
    """A file of trained networks."""

    @property
    def manifest(self) -> dict[str, Any]:
        """Describes their training."""


F = TypeVar("F", bound=HasManifest)
K = TypeVar("K")


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
    read: Callable[[Path], F],
    manifest: Mapping[str, Any],
    what: str,
    replace_other: bool,
    replace_damaged: bool,
) -> F | None:
    """Opens a file if it belongs to this training; returns None if it does not exist or is to be replaced.

    Args:
        path: of the file.
        read: opens it.
        manifest: that the file must have, without its networks.
        what: the file holds.
        replace_other: return None for a file of another training.
        replace_damaged: return None for a damaged file.

    Raises:
        CondenseError: the file is damaged or belongs to another training, and is not to be replaced.
    """
    if not path.exists():
        return None
    try:
        file = read(path)
    except CondenseError as fault:
        if replace_damaged:
            return None
        raise CondenseError(f"{fault}, or replace it with --force") from fault
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


def parts_folder(path: Path) -> Path:
    """The folder beside an unfinished file with the finished networks and the states of trainings in progress."""
    return path.with_name(path.name + ".parts")


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
