"""TODO-DOC."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from condense.errors import CondenseError
from condense.files import checkpoint_interval, content, read_state, replacing
from condense.training.config import Recipe, batch_ids
from condense.training.student import Student, Update

_log = logging.getLogger(__name__)

CHECKPOINT_SECONDS = 30.0
"""Least time between two checkpoints of a training."""


class TrainingCheckpoint:
    """The checkpoint of one training; does nothing where there is no ``path``.

    It is known by its students' seeds, initial weights and first batches, the recipe, the update, and where and how it
    runs.
    ``keep_end``: the state after the last step is written too.
    """

    def __init__(
        self,
        path: Path | None,
        students: Sequence[Student],
        recipe: Recipe,
        device: torch.device,
        precision: str,
        update: Update | None = None,
        keep_end: bool = False,
    ) -> None:
        self.path, self.steps, self.keep_end = path, recipe.steps, keep_end
        self.began = self.saved = time.monotonic()
        if path is None:
            return
        known = [str(recipe), str(update), str(device.type), precision, torch.__version__]
        for student in students:
            first = batch_ids(student.seed, student.source.size, recipe.batch, 0)
            images, targets = student.source.batch(first, epoch=0)
            state = {**student.network.state_dict(), "first images": images, "first targets": targets}
            known += [str(student.seed), str(student.source.size), content(state)]
            known += [student.source.key] if hasattr(student.source, "key") else []  # what first targets do not show
        self.key = " ".join(known)

    @property
    def seconds(self) -> float:
        """Of training so far, over all resumptions."""
        return time.monotonic() - self.began

    def read(self) -> dict[str, Any] | None:
        """What :meth:`after` wrote for this same training; None where there is nothing of use."""
        if self.path is None or not self.path.exists():
            return None
        state = read_state(self.path)
        if state is None or state.get("key") != self.key:
            return None
        self.began -= state["seconds"]
        return state

    def after(self, step: int, state: Callable[[], dict[str, Any]]) -> None:
        """Writes ``state()`` after ``step`` steps if it is time; a failure costs safety, not the result."""
        end = self.keep_end and step == self.steps
        if self.path is None or (time.monotonic() - self.saved < checkpoint_interval(CHECKPOINT_SECONDS) and not end):
            return
        try:
            with replacing(self.path) as temporary, temporary.open("wb") as file:
                torch.save({"key": self.key, "step": step, "seconds": self.seconds, **state()}, file)
        except (CondenseError, OSError, RuntimeError) as fault:
            _log.warning("condense: the training goes on without a checkpoint: %s", fault)
        self.saved = time.monotonic()

    def remove(self) -> None:
        if self.path is not None:
            with contextlib.suppress(OSError):
                self.path.unlink()


def random_state(device: torch.device) -> list[Tensor]:
    """The global generators that dropout draws from."""
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def set_random_state(state: Sequence[Tensor], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)
