"""the command lines that records and manifests state."""

from __future__ import annotations

import json
from typing import Any

from condense.data import Task
from condense.networks.pretrained import _is_file


def _word(value: Any) -> str:
    return json.dumps(value) if isinstance(value, (bool, list)) else str(value)


def data_word(task: Task) -> str:
    """What ``--data`` is given for this data: a registered name, or its name and a place to fill in."""
    return task.name if task.source == task.name else f"{task.name}=PATH"


def shown(word: str) -> str:
    """A backbone's name as commands in records show it: where somebody's file lies is a place to fill in."""
    if word.endswith(".h5"):
        return "PATH"
    name, at, weights = word.partition("@")
    return f"{name}@PATH" if at and _is_file(weights) else word
