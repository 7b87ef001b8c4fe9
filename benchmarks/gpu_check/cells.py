"""Published cells made on the device: a suite in its own process, stopped in time and continued by the next call."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from condense.benchmarks.gpu_check.check import Check, TimeUp
from condense.benchmarks.speed.measure import child_environment
from condense.benchmarks.suite import RECORDS, cells, datasets_of, get_suite
from condense.errors import CondenseError
from condense.judge import means_by_arm, read_record

SUITE = "gpu"
"""The packaged suite of published cells, in the order in which they are made."""

TINY_SUITE = """\
name: gpu
summary: one small cell, to try the script
runs: 1
seeds: [0]
networks: [own]
controls: [random]
cells:
  dm-digits-ipc1: {recipe: dm/digits-ipc1, steps: 2, network: convnet-d2-w8-in, protocol: quick-v1}
"""

STOP_SECONDS = 20.0
"""What a run may take to write its state when it is told to stop."""


def read_data(words: Sequence[str]) -> dict[str, str]:
    """Returns the paths of the suite's data by name, from words ``NAME=PATH``.

    Raises:
        CondenseError: a word has another form, or the suite has no data of that name.
    """
    known, found = datasets_of(get_suite(SUITE)), {}
    for word in words:
        name, _, path = word.partition("=")
        if not path:
            raise CondenseError(f"--data {word}: must be NAME=PATH, e.g. cifar10=FOLDER")
        if name not in known:
            raise CondenseError(f"--data {word}: no data of the suite '{SUITE}'; it has {', '.join(known)}")
        found[name] = path
    return found


def make_cells(check: Check) -> tuple[str, Any]:
    """Makes and judges the cells of the suite whose data are given, as far as the time goes.

    Each record is in ``cells/records`` as soon as it exists, beside the set and the run that the next call continues.

    Raises:
        CondenseError: no data are given.
        TimeUp: some cells are left; those that are there are in ``check.parts``.
    """
    out, name = check.out / "cells", SUITE
    out.mkdir(exist_ok=True)
    if check.tiny:
        path = out / "tiny.yaml"
        path.write_text(TINY_SUITE)
        name = str(path)
    suite = get_suite(name)
    names = datasets_of(suite) if check.tiny else list(check.data)
    if not names:
        raise CondenseError("no --data given")
    words = [sys.executable, "-m", "condense", "suite", name, "--out", str(out), "--device", str(check.device)]
    for data, place in check.data.items():
        words += ["--data", f"{data}={place}"]
    with (out / "log.txt").open("ab") as log:
        ended_by_itself = _run([*words, "--datasets", ",".join(names)], check.left() - STOP_SECONDS, log)
    expected = [cell.stem for cell in cells(suite, datasets=names)]
    results = {stem: _result(out / RECORDS / f"{stem}.json") for stem in expected}
    check.parts = {stem: result for stem, result in results.items() if result is not None}
    if len(check.parts) < len(expected):
        if ended_by_itself:
            missing = [stem for stem, result in results.items() if result is None]
            raise RuntimeError(f"{', '.join(missing)}: not made; {out / 'log.txt'} says why")
        raise TimeUp
    return describe_cells(check.parts), check.parts


def describe_cells(parts: Mapping[str, Mapping[str, Any]]) -> str:
    """One line with the accuracies of the cells that are there."""
    return "; ".join(
        f"{stem} {100 * part['distilled']:.1f} %" + (f" (random {100 * part['random']:.1f})" * ("random" in part))
        for stem, part in parts.items()
    )


def _run(words: list[str], seconds: float, log: Any) -> bool:
    """Runs a command for at most so many seconds and returns whether it ended by itself. SIGTERM saves its state."""
    process = subprocess.Popen(words, stdout=log, stderr=log, env=child_environment())
    try:
        process.wait(timeout=max(seconds, 1))
        return True
    except subprocess.TimeoutExpired:
        return False
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _result(path: Path) -> dict[str, Any] | None:
    """The accuracies in a record; None if there is no valid one."""
    try:
        return {**means_by_arm(read_record(path)), "record": path.name}
    except CondenseError:
        return None
