"""One script for any CUDA machine: is the toolkit right there, does it repeat, how fast is it, what would make it faster.

``python -m condense.benchmarks.gpu_check --minutes 8 --out DIR`` works through stages in order of value and stops in
time. ``DIR/gpu_check.json`` is rewritten after every stage, so a kill loses at most the stage that was running;
``DIR/gpu_check.txt`` is one table of it. A stage or a part of one that fails is recorded with its message and the rest
goes on. Exit codes: 0 nothing failed, 1 something did, 2 a mistake in what was given, 130 interrupted.

Needs torch, torchvision and numpy, and with ``--data`` what reads those data; timm only for timm's networks.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import os
import platform
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

import condense
from condense import networks, rng, tasks
from condense import run as run_module
from condense.augment import OPERATIONS, VARIANTS, Parameters, dsa
from condense.benchmarks.speed import dm, students
from condense.benchmarks.speed.measure import (
    PRODUCT,
    PUBLISHED,
    Case,
    Parser,
    StepBenchmark,
    aligned,
    difference,
    distance,
    drive,
    guarded,
    random_images,
    random_task,
    run_alone,
    synchronise,
    tf32,
    time_steps,
    write,
)
from condense.errors import CondenseError
from condense.labels import HardLabels
from condense.registry import METHODS
from condense.run import device_name, peak_memory, pick_device, pick_precision
from condense.students import FixedSource, Recipe, Student, accuracy, train
from condense.synthetic import SyntheticSet
from condense.tasks import Task

SCHEMA = "condense.gpu-check/1"
BENCHMARKS: list[StepBenchmark] = [dm.BENCHMARK]
"""Steps timed against their published form; a method adds itself here."""

SETTINGS: dict[str, dict[str, Any]] = {"dm": {"batch_real": 16}}
"""What makes one step of a method small enough for a CPU; a method without an entry keeps its defaults."""

FORWARD_TOLERANCE = 1e-4
"""Largest relative difference of CPU and CUDA outputs, fp32 without TF32."""
GRADIENT_TOLERANCE = 2e-2
"""The same for gradients, which a ReLU turned by a rounding moves by about the root of the share of such ReLUs."""
CAPTURED = "CUDA graph of the real branch"


class TimeUp(BaseException):
    """The time given is used up; no guard of a single part catches it."""


class Check:
    """One run of the script: what it was given, how much time is left, and the record that grows with every stage."""

    def __init__(self, device: torch.device, minutes: float, out: Path, tiny: bool, data: str | None) -> None:
        self.device, self.out, self.tiny, self.data = device, out, tiny, data
        self.deadline = time.monotonic() + 60 * minutes
        self.stage = ""
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
        """
        results = {}
        for name, call in parts.items():
            if self.left() < 1:
                self.skip(name, "no time left")
                continue
            try:
                results[name] = call()
            except CondenseError as fault:
                self.skip(name, str(fault))
                continue
            except Exception as fault:
                self.fail(name, _message(fault), traceback.format_exc(limit=-6))
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


def _message(fault: BaseException) -> str:
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


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Only deterministic kernels; one that has none raises an error."""
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


def _worst(results: Mapping[str, dict[str, Any]], key: str) -> str:
    """The largest value of ``key`` and whose it is."""
    found = [(result[key], name) for name, result in results.items() if key in result]
    return "{:.1e} ({})".format(*max(found)) if found else "none"


# -- (a) correctness --------------------------------------------------------------------------------------------------


def check_networks(check: Check) -> tuple[str, Any]:
    """Every named network: outputs, embedding and gradients on the device against the CPU, fp32 without TF32."""
    shape, size, classes = ((3, 8, 8), 4, 3) if check.tiny else ((3, 32, 32), 16, 10)
    images = random_images(size, shape, "gpu-check", "images")

    def outputs(net: nn.Module, device: torch.device) -> list[Tensor]:
        net = net.to(device)
        x = images.to(device).requires_grad_()
        embedding = net.embed(x)
        logits = net.classify(embedding)
        gradients = torch.autograd.grad(logits.square().mean(), [x, *net.parameters()], allow_unused=True)
        return [logits, embedding, torch.cat([g.flatten().cpu() for g in gradients if g is not None])]

    def compare(name: str) -> dict[str, Any]:
        with rng.seeded("gpu-check", "network"):
            net = networks.build(name, shape, classes)
        reference, found = outputs(copy.deepcopy(net), torch.device("cpu")), outputs(net, check.device)
        errors = [distance(b, a) for a, b in zip(reference, found)]
        passed = max(errors[:2]) <= FORWARD_TOLERANCE and errors[2] <= GRADIENT_TOLERANCE
        return {**dict(zip(("forward", "embed", "gradient"), errors)), "passed": passed}

    with tf32(False):
        results = check.each({name: (lambda name=name: compare(name)) for name in networks.names()})
    worst = f"worst forward {_worst(results, 'forward')}, gradient {_worst(results, 'gradient')}"
    return f"{len(results)} networks; {worst}", results


def _with_steps(check: Check) -> list[str]:
    """The registered methods that make outer steps; the others are noted as skipped."""
    names = []
    for name in METHODS.names():
        if any(field.name == "steps" for field in dataclasses.fields(METHODS.get(name).config)):
            names.append(name)
        else:
            check.skip(name, "makes no steps")
    return names


def _distil(
    check: Check, name: str, steps: int, device: torch.device | None = None, **options: Any
) -> tuple[Tensor, SyntheticSet]:
    """The update of the images (on the CPU) by ``steps`` steps of a method, and the set after them."""
    changes = SETTINGS.get(name, {})
    config = METHODS.get(name).config(**{**changes, "steps": steps})
    case = check.case(check.task(), 2)
    case = dataclasses.replace(case, device=device or check.device)
    start: list[Tensor] = []

    made = drive(name, config, case, network=check.network, keep_start=start, **options)
    return made.images.detach().cpu() - start[0], made
