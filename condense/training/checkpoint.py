"""Checkpoints in the middle of a training."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from condense.environment import read_seconds
from condense.errors import CondenseError
from condense.files import atomic_write, read_state, tensors_sha256
from condense.training.config import TrainConfig, batch_ids
from condense.training.student import GradientRule, Student

_log = logging.getLogger(__name__)

TRAINING_CHECKPOINT_SECONDS = 30.0
"""Minimum seconds between two checkpoints of a training."""


class TrainingCheckpoint:
    """The checkpoint file of one training; without ``path`` nothing is written.

    The key consists of the students' seeds, initial weights and first batches, the recipe, the update rule, device
    type, precision and torch version.

    Args:
        path: The file, or None.
        students: Students that are trained, with their initial weights.
        recipe: Training configuration.
        device: Device of the training.
        precision: Precision of the training.
        update: Gradient rule; None: the gradient of the mean loss.
        keep_end: Whether the state after the last step is written as well.
    """

    def __init__(
        self,
        path: Path | None,
        students: Sequence[Student],
        recipe: TrainConfig,
        device: torch.device,
        precision: str,
        update: GradientRule | None = None,
        keep_end: bool = False,
    ) -> None:
        self.path, self.steps, self.keep_end = path, recipe.steps, keep_end
        self.began = self.saved = time.monotonic()
        if path is None:
            return
        parts = [recipe.cache_key(), str(update), str(device.type), precision, torch.__version__]
        for student in students:
            first = batch_ids(student.seed, student.source.size, recipe.batch, 0)
            images, targets = student.source.batch(first, epoch=0)
            state = {**student.network.state_dict(), "first images": images, "first targets": targets}
            parts += [str(student.seed), str(student.source.size), tensors_sha256(state)]
            parts += [student.source.key] if hasattr(student.source, "key") else []  # settings that later targets need
        self.key = " ".join(parts)

    @property
    def seconds(self) -> float:
        """Seconds of training so far, including those before resumptions."""
        return time.monotonic() - self.began

    def read(self) -> dict[str, Any] | None:
        """Reads the state that :meth:`after` wrote for this training; None if there is no valid one."""
        if self.path is None or not self.path.exists():
            return None
        state = read_state(self.path)
        if state is None or state.get("key") != self.key:
            return None
        self.began -= state["seconds"]
        return state

    def after(self, step: int, state: Callable[[], dict[str, Any]]) -> None:
        """Writes ``state()`` if enough time has passed; a failure is only logged, because the training can continue."""
        end = self.keep_end and step == self.steps
        if self.path is None or (
            time.monotonic() - self.saved < read_seconds("CHECKPOINT", TRAINING_CHECKPOINT_SECONDS) and not end
        ):
            return
        try:
            with atomic_write(self.path) as temporary, temporary.open("wb") as file:
                torch.save({"key": self.key, "step": step, "seconds": self.seconds, **state()}, file)
        except (CondenseError, OSError, RuntimeError) as fault:
            _log.warning("condense: the training continues without a checkpoint: %s", fault)
        self.saved = time.monotonic()

    def remove(self) -> None:
        """Deletes the file."""
        if self.path is not None:
            with contextlib.suppress(OSError):
                self.path.unlink()


def random_state(device: torch.device) -> list[Tensor]:
    """Returns the states of the global generators that dropout uses."""
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def set_random_state(state: Sequence[Tensor], device: torch.device) -> None:
    """Restores the result of :func:`random_state`."""
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)
