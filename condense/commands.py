"""Parts of the command lines in records and manifests. Paths of the user's files are replaced by PATH."""

from __future__ import annotations

import json
from typing import Any

from condense.data import Task
from condense.files import is_existing_file


def format_value(value: Any) -> str:
    """Formats a setting as the command line reads it."""
    return json.dumps(value) if isinstance(value, (bool, list)) else str(value)


def data_argument(task: Task) -> str:
    """The value of ``--data`` for a task: a registered name, or NAME=PATH."""
    return task.name if task.source == task.name else f"{task.name}=PATH"


def redact_backbone(backbone: str) -> str:
    """The name of a backbone, with PATH instead of a file of the user."""
    if backbone.endswith(".h5"):
        return "PATH"
    name, at, weights = backbone.partition("@")
    return f"{name}@PATH" if at and is_existing_file(weights) else backbone
