"""Checks the toolkit on a CUDA machine: correctness, determinism, speed, and faster variants.

``python -m condense.benchmarks.gpu_check --minutes 25 --out DIR`` works through stages in order of value and stops in
time. ``DIR/gpu_check.json`` is rewritten after every stage, so a kill loses at most the stage that was running;
``DIR/gpu_check.txt`` is one table of it. The same command again runs the stages that have not passed. With
``--data cifar10=FOLDER`` the last stage makes published cells (suite ``gpu``) in the time that is left, whose records
are in ``DIR/cells``. A failed stage or part is recorded with its message and the
others follow. Exit codes: 0 nothing failed, 1 something did, 2 wrong arguments, 130 interrupted.

Needs torch, torchvision and numpy, and with ``--data`` what reads those data; timm only for timm's networks.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from condense.benchmarks.gpu_check.cells import make_cells, read_data
from condense.benchmarks.gpu_check.check import Check, TimeUp, error_summary, table
from condense.benchmarks.gpu_check.correctness import (
    check_augmentation,
    check_determinism,
    check_draws,
    check_labels,
    check_methods,
    check_networks,
    check_resume,
)
from condense.benchmarks.gpu_check.timing import (
    COMPILE,
    GRAPH,
    PRECISIONS,
    time_benchmarks,
    time_experts,
    time_students,
    time_variants,
)
from condense.benchmarks.speed.measure import Parser, guarded
from condense.device import peak_memory, pick_device
from condense.errors import CondenseError

# -- the script -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CheckStage:
    """A part of the script."""

    name: str
    seconds: float
    """About what it takes; it is not begun with less than that left."""
    body: Callable[[Check], tuple[str, Any]]
    """Gives one line for the table and what is recorded."""


STAGES = [
    CheckStage("networks: device = CPU", 20, check_networks),
    CheckStage("methods: device = CPU", 15, check_methods),
    CheckStage("labels: device = CPU", 30, check_labels),
    CheckStage("augmentation: device = CPU", 5, check_augmentation),
    CheckStage("draws: device = CPU", 5, check_draws),
    CheckStage("same seed, same bits", 15, check_determinism),
    CheckStage("killed and resumed", 10, check_resume),
    CheckStage("step at ipc 10", 30, functools.partial(time_benchmarks, ipc=10)),
    CheckStage("step at ipc 1", 25, functools.partial(time_benchmarks, ipc=1)),
    CheckStage("step at ipc 50", 40, functools.partial(time_benchmarks, ipc=50)),
    CheckStage("students", 20, time_students),
    CheckStage("experts", 60, time_experts),
    CheckStage("variants: precision", 15, functools.partial(time_variants, variants=PRECISIONS)),
    CheckStage("variants: CUDA graph", 15, functools.partial(time_variants, variants=GRAPH)),
    CheckStage("variants: torch.compile", 60, functools.partial(time_variants, variants=COMPILE)),
    CheckStage("published cells", 60, make_cells),
]


def run_stage(check: Check, stage: CheckStage) -> None:
    """Runs one stage, or notes why not, and saves the record."""
    check.stage, check.parts = stage.name, {}
    entry: dict[str, Any] = {"status": "running", "seconds": 0.0, "summary": ""}
    check.record["stages"][stage.name] = entry
    check.save()  # so that a kill shows what was running
    failures, began = len(check.record["failures"]), time.monotonic()
    try:
        if not check.tiny and check.left() < stage.seconds:
            raise CondenseError(f"needs about {stage.seconds:.0f} s and {max(check.left(), 0):.0f} s are left")
        with _until(check.left()):
            entry["summary"], entry["results"] = stage.body(check)
        entry["status"] = "passed" if len(check.record["failures"]) == failures else "failed"
    except CondenseError as fault:
        check.skip("", str(fault))
        entry |= {"status": "skipped", "summary": str(fault)}
    except TimeUp:
        check.skip("", "stopped: the time is up")
        entry |= {"status": "stopped", "summary": "the time was up", "results": check.parts}
    except Exception as fault:
        check.fail("", error_summary(fault), traceback.format_exc(limit=-6))
        entry |= {"status": "failed", "summary": error_summary(fault), "results": check.parts}
    entry["seconds"] = round(time.monotonic() - began, 2)
    check.save()
    print(f"{entry['status']:<8} {entry['seconds']:7.1f} s  {stage.name}: {entry['summary']}", flush=True)


@contextlib.contextmanager
def _until(seconds: float) -> Iterator[None]:
    """Raises :class:`TimeUp` inside its body after so many seconds, where the system can (the main thread, Unix)."""

    def stop(number: int, frame: Any) -> None:
        raise TimeUp

    try:
        before = signal.signal(signal.SIGALRM, stop)
    except (AttributeError, ValueError):
        yield
        return
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs the script and exits with the documented code."""
    guarded(_main, arguments)


def _main(arguments: Sequence[str]) -> int:
    parser = Parser(prog="python -m condense.benchmarks.gpu_check", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, default=25.0, help="the script ends within so many minutes")
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu_check.json and gpu_check.txt")
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="cifar10 or cifar100 as a folder, .npz, ..., for published cells; may be repeated",
    )
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to try the script itself")
    options = parser.parse_args(arguments)
    data = read_data(options.data)
    if not 0 < options.minutes <= 24 * 60:
        raise CondenseError(f"--minutes {options.minutes}: must be above 0 and at most a day")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise CondenseError(
            f"--device {options.device}: there is no CUDA device here; --device cpu --tiny tries the script without one"
        )
    device = pick_device(options.device)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats its results only with this
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise CondenseError(f"--out {options.out}: cannot be made ({fault.strerror})") from fault
    check = Check(device, options.minutes, options.out, options.tiny, data)
    check.continue_record()
    for stage in STAGES:
        if stage.name not in check.record["stages"]:
            run_stage(check, stage)
    check.record["finished"] = True
    check.record["peak_memory"] = peak_memory(device)
    check.save()
    print(f"\n{table(check.record)}")
    return 1 if check.record["failures"] else 0


if __name__ == "__main__":
    main()
