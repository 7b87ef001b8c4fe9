"""Reports of a run: a JSONL log, TensorBoard or trackio if installed, and a progress bar or plain lines."""

from __future__ import annotations

import contextlib
import datetime
import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Protocol

from condense.environment import read_seconds
from condense.errors import CondenseError, did_you_mean, missing_package
from condense.formatting import printable

TRACKERS = ("auto", "tensorboard", "trackio", "none")
LINE_SECONDS = 30.0
"""Seconds between two lines of progress if stderr is not a terminal."""


def is_main_process() -> bool:
    """Whether this is the main process, which prints and writes files: rank 0 of ``torchrun``, or the only process."""
    return os.environ.get("RANK", "0") == "0"


class Tracker(Protocol):
    """Receives the numbers of a run in addition to the log."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Logs values of one step."""

    def image(self, step: int, path: Path) -> None:
        """Logs a preview of the step, a PNG file."""

    def close(self) -> None:
        """Flushes and closes."""


class TensorBoard:
    """Event files in ``directory/tensorboard``. On resume, events after ``step`` are hidden."""

    def __init__(self, directory: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1)

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def image(self, step: int, path: Path) -> None:
        import numpy as np
        from PIL import Image

        self.writer.add_image("preview", np.asarray(Image.open(path).convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class Trackio:
    """A local trackio project named after the run directory."""

    def __init__(self, directory: Path) -> None:
        import trackio

        self.trackio = trackio
        trackio.init(project="condense", name=directory.name)

    def log(self, step: int, values: dict[str, float]) -> None:
        self.trackio.log(values, step=step)

    def image(self, step: int, path: Path) -> None:
        self.trackio.log({"preview": self.trackio.Image(str(path))}, step=step)

    def close(self) -> None:
        self.trackio.finish()


def check_tracker(kind: str) -> None:
    """Checks before any work that a tracker is available.

    Raises:
        CondenseError: unknown tracker, or it is not installed.
    """
    if kind not in TRACKERS:
        raise CondenseError(f"--track {kind}: unknown{did_you_mean(kind, TRACKERS)}")
    if kind in ("tensorboard", "trackio") and importlib.util.find_spec(kind) is None:
        raise missing_package(kind, "track", f"--track {kind}")


def open_tracker(kind: str, directory: Path | None, step: int) -> Tracker | None:
    """Opens a tracker.

    Args:
        kind: auto (TensorBoard if installed), tensorboard, trackio or none.
        directory: directory of the run; None disables tracking.
        step: the run resumes after this step.

    Raises:
        CondenseError: unknown tracker, or it is not installed.
    """
    check_tracker(kind)
    if directory is None or kind == "none":
        return None
    if kind == "trackio":
        return Trackio(directory)
    return TensorBoard(directory, step) if importlib.util.find_spec("tensorboard") else None


class Log:
    """``log.jsonl``: one JSON object per line.

    Args:
        path: the file.
        after: (loop, step) after which the run resumes; later lines are deleted. None starts a new log.
    """

    def __init__(self, path: Path, after: tuple[int, int] | None) -> None:
        if after is not None and path.exists():
            lines = [line for line in path.read_text().splitlines() if _position(line) <= after]
            temporary = path.with_suffix(".tmp")
            temporary.write_text("".join(line + "\n" for line in lines))
            os.replace(temporary, path)
        self.file = path.open("w" if after is None else "a")

    def write(self, **values: Any) -> None:
        self.file.write(json.dumps(values) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def _position(line: str) -> tuple[float, float]:
    try:
        entry = json.loads(line)
        return entry["loop"], entry["step"]
    except (ValueError, KeyError):  # a line truncated by a kill
        return float("inf"), 0


class Progress:
    """Shows step, loss and time left: a tqdm bar on a terminal, otherwise a plain line every ``LINE_SECONDS``."""

    def __init__(self, name: str, total: int, start: int = 0, quiet: bool = False, unit: str = "step") -> None:
        self.name, self.total, self.start, self.quiet, self.unit = name, total, start, quiet, unit
        self.bar: Any = None
        self.began = self.last = time.monotonic()
        if not quiet and sys.stderr.isatty():
            from tqdm import tqdm

            # The bar moves the cursor; the command line's own stream would escape these characters.
            stream, name = getattr(sys.stderr, "unescaped", sys.stderr), printable(name)
            self.bar = tqdm(total=total, initial=start, desc=name, unit=unit, file=stream, dynamic_ncols=True)

    def update(self, done: int, text: str = "") -> None:
        """Shows that ``done`` steps of the total are finished, followed by ``text``."""
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(done - self.bar.n)
            return
        now = time.monotonic()
        if self.quiet or now - self.last < read_seconds("PROGRESS", LINE_SECONDS) or done <= self.start:
            return
        self.last = now
        left = datetime.timedelta(seconds=round((now - self.began) / (done - self.start) * (self.total - done)))
        line = ", ".join(filter(None, [f"{self.name}: {self.unit} {done} of {self.total}", text, f"about {left} left"]))
        with contextlib.suppress(OSError):  # the reader of stderr has closed it; the work continues
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
