"""Checkpoints of a run, and the exceptions that end one."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

from condense.errors import CondenseError
from condense.files import read_state

_log = logging.getLogger(__name__)

CHECKPOINT_FILE = "checkpoint.pt"

PREVIOUS_CHECKPOINT_FILE = "checkpoint.previous.pt"

VIEW_LABELS_FILE, VIEW_LABELS_STATE_FILE = "labels.npy", "labels.json"
"""Labels of views in making, and how many epochs of them are done."""

RUN_CHECKPOINT_SECONDS = 20.0
"""Least time between two checkpoints, unless the environment sets ``CONDENSE_CHECKPOINT_SECONDS``."""


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop; its state is saved. The message says how to continue."""


class Diverged(CondenseError):
    """The loss or the images stopped being finite; the set holds the last good state."""


class Stateful(Protocol):
    """State that joins the checkpoint: networks, optimisers, queues."""

    def state_dict(self) -> Mapping[str, Any]: ...

    def load_state_dict(self, state: Any) -> Any: ...


def load_checkpoint(directory: Path, config_keys: Collection[str]) -> dict[str, Any] | None:
    """Returns the newest whole checkpoint of a run directory; None if there is none yet.

    Raises:
        CondenseError: the checkpoint belongs to a configuration with another key.
    """
    for name in (CHECKPOINT_FILE, PREVIOUS_CHECKPOINT_FILE):
        path = directory / name
        if not path.exists():
            continue
        state = read_state(path)
        if state is None:
            _log.warning("condense: %s is damaged; going on from what was saved before it", path)
            continue
        if state["config_key"] not in config_keys:
            raise CondenseError(
                f"{directory}: config.json was changed after the checkpoint; undo that, or start again with --force"
            )
        return state
    return None
