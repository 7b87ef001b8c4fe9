"""TODO-DOC."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

from condense.data import Task, digests
from condense.errors import CondenseError


def transform_digests(task: Task) -> list[str]:
    """SHA-256 of each array of the map to training space, by name."""
    return digests(task.transform)


# -- files of networks ------------------------------------------------------------------------------------------------

WORDS = {
    "fingerprint": "data", "transform": "normalisation", "library_version": "library", "held_out": "held-out share",
    "random_hash_version": "version of the draws", "student_version": "version of the training",
    "epochs": "number of epochs", "image_shape": "image size", "schedule_epochs": "schedule",
}  # fmt: skip
"""What messages call an entry of a manifest, where not by its name."""

FREE = ("data", "options", "steps_per_epoch", "judged_on", "code_version", "normalisation")
"""Entries in which files of the same training may differ."""


class Manifested(Protocol):
    """A file of trained networks."""

    @property
    def manifest(self) -> dict[str, Any]:
        """What it says of their training."""


F = TypeVar("F", bound=Manifested)


def expected(
    path: Path, read: Callable[[Path], F], about: Mapping[str, Any], what: str, other: bool, damaged: bool
) -> F | None:
    """The file there, where it is of this training; None where there is none.

    Args:
        path: of the file.
        read: opens it.
        about: the manifest that it should have, but for the networks themselves.
        what: the file holds.
        other: give up what is of another training.
        damaged: give up what cannot be read.

    Raises:
        CondenseError: it cannot be read or is of another training, and is not given up.
    """
    if not path.exists():
        return None
    try:
        found = read(path)
    except CondenseError as fault:
        if damaged:
            return None
        raise CondenseError(f"{fault}, or replace it with --force") from fault
    faults = {}
    for key, value in json.loads(json.dumps(about)).items():
        known = found.manifest.get(key)
        if key not in FREE and known != value:
            short = all(isinstance(one, int | float) or len(str(one)) < 40 for one in (known, value))
            faults[key] = WORDS.get(key, key) + f" ({known}, not {value})" * short
    if len(faults) > 1:
        faults.pop("layout", None)  # it follows from the others
    if faults and not other:
        words = ", ".join(faults.values())
        raise CondenseError(f"{path}: holds {what} of another {words}; take another --out, or replace it with --force")
    return None if faults else found


def parts_of(path: Path) -> Path:
    """The folder beside a file in making that holds what is finished, and what is in training."""
    return path.with_name(path.name + ".parts")


class Same:
    """In the checkpoint of a run, which networks of a named file it began with; refuses to go on with others."""

    def __init__(self, content: str, file: str | Path, what: str) -> None:
        self.content, self.file, self.what = content, file, what

    def state_dict(self) -> dict[str, str]:
        return {"content": self.content}

    def load_state_dict(self, state: Mapping[str, str]) -> None:
        if state["content"] != self.content:
            raise CondenseError(
                f"{self.file}: holds other {self.what} than when the run began; restore them, or start anew with "
                "--force"
            )
