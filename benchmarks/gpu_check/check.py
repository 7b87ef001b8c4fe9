"""The record of a GPU check, which grows with every stage, and its table."""

from __future__ import annotations

import functools
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import condense
from condense.benchmarks.speed.measure import Case, random_task, write
from condense.data import Task
from condense.device import device_name
from condense.errors import CondenseError
from condense.formatting import aligned

SCHEMA = "condense.gpu-check/1"


class TimeUp(BaseException):
    """The time given is used up; no guard of a single part catches it."""


class Check:
    """One run of the script: what it was given, how much time is left, and the record that grows with every stage."""

    def __init__(
        self, device: torch.device, minutes: float, out: Path, tiny: bool, data: Mapping[str, str] | None = None
    ) -> None:
        self.device, self.out, self.tiny, self.data = device, out, tiny, dict(data or {})
        self.deadline = time.monotonic() + 60 * minutes
        self.stage = ""
        self.parts: dict[str, Any] = {}
        """Results of the running stage's parts so far."""
        self.record: dict[str, Any] = {
            "schema": SCHEMA,
            "command": " ".join([os.path.basename(sys.argv[0]), *sys.argv[1:]]),
            "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "minutes": minutes,
            "tiny": tiny,
            "machine": machine(device),
            "versions": versions(),
            "stages": {},
            "skipped": [],
            "failures": [],
            "finished": False,
        }

    def continue_record(self) -> None:
        """Takes over the stages that an earlier call with the same folder, machine and versions has passed."""
        try:
            earlier = json.loads((self.out / "gpu_check.json").read_text())
            same = all(earlier[name] == self.record[name] for name in ("schema", "machine", "versions", "tiny"))
            stages = earlier["stages"] if same else {}
        except (OSError, ValueError, KeyError, TypeError):
            return
        self.record["stages"] = {name: entry for name, entry in stages.items() if entry["status"] == "passed"}
        if self.record["stages"]:
            self.record["earlier"] = [*earlier.get("earlier", []), earlier["began"]]
            self.record["skipped"] = [part for part in earlier["skipped"] if part["stage"] in self.record["stages"]]

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def network(self) -> str:
        """The ConvNet that fits the images of :meth:`task`."""
        return "convnet-d2-w8-in" if self.tiny else "convnet-d3-w128-in"

    def task(self) -> Task:
        """Random images for checks whose truth does not depend on their number."""
        return random_task(3, 12, (3, 8, 8), 4) if self.tiny else random_task(10, 64)

    @functools.cached_property
    def big_task(self) -> Task:
        """Random images as many and as large as CIFAR-10's, for timing."""
        return self.task() if self.tiny else random_task()

    def case(self, task: Task, ipc: int, precision: str = "fp32", **settings: Any) -> Case:
        """A case on ``task`` with :attr:`network`."""
        depth, width = (2, 8) if self.tiny else (3, 128)
        return Case(task, ipc, width, self.device, depth, settings, precision)

    def left(self) -> float:
        """Seconds until the script must have ended."""
        return self.deadline - time.monotonic()

    def skip(self, part: str, why: str) -> None:
        self.record["skipped"].append({"stage": self.stage, "part": part, "why": why})

    def fail(self, part: str, message: str, trace: str = "") -> None:
        self.record["failures"].append({"stage": self.stage, "part": part, "message": message, "trace": trace})

    def each(self, parts: Mapping[str, Callable[[], dict[str, Any]]]) -> dict[str, dict[str, Any]]:
        """Results of the parts of a stage, each by itself: one that fails or has no time left does not stop the others.

        A result whose ``passed`` is False is recorded as a failure. A :class:`CondenseError` (a package is missing, a
        network does not take such images) skips the part.

        Raises:
            TimeUp: no time is left for a part; the results so far are in :attr:`parts`.
        """
        results: dict[str, dict[str, Any]] = {}
        self.parts = results
        for name, call in parts.items():
            if self.left() < 1:
                raise TimeUp
            try:
                results[name] = call()
            except CondenseError as fault:
                self.skip(name, str(fault))
                continue
            except Exception as fault:
                self.fail(name, error_summary(fault), traceback.format_exc(limit=-6))
                if self.cuda:
                    torch.cuda.empty_cache()
                continue
            if not results[name].get("passed", True):
                self.fail(name, f"outside its tolerance: {json.dumps(results[name])}")
        return results

    def save(self) -> None:
        """Writes the record and its table."""
        write(self.out / "gpu_check.json", json.dumps(self.record, indent=1) + "\n")
        write(self.out / "gpu_check.txt", table(self.record) + "\n")


def error_summary(fault: BaseException) -> str:
    lines = str(fault).strip().splitlines()
    return f"{type(fault).__name__}: {lines[0] if lines else 'no message'}"


def machine(device: torch.device) -> dict[str, Any]:
    """The machine in facts."""
    facts: dict[str, Any] = {
        "device": device_name(device),
        "platform": platform.platform(),
        "cpu_threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        facts |= {"capability": f"{card.major}.{card.minor}", "memory": card.total_memory}
        facts |= {"multiprocessors": card.multi_processor_count}
    return facts


def versions() -> dict[str, Any]:
    """Versions of what the numbers depend on."""
    import numpy

    return {
        "condense": condense.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "numpy": numpy.__version__,
    }


def table(record: Mapping[str, Any]) -> str:
    """The record as one table, with what failed and what was skipped below it."""
    versions = record["versions"]
    rows = [["stage", "status", "seconds", "result"]]
    for name, entry in record["stages"].items():
        rows.append([name, entry["status"], f"{entry['seconds']:.1f}", entry["summary"]])
    lines = [
        f"{record['machine']['device']}; torch {versions['torch']}, CUDA {versions['cuda']}, "
        f"condense {versions['condense']}; {record['began']}"
        + ("; tiny: no time here means anything" * record["tiny"]),
        aligned(rows),
    ]
    for fault in record["failures"]:
        lines.append(f"failed: {fault['stage']}, {fault['part']}: {fault['message']}")
    for skipped in record["skipped"]:
        if skipped["part"]:
            lines.append(f"skipped: {skipped['stage']}, {skipped['part']}: {skipped['why']}")
    return "\n".join(lines)
