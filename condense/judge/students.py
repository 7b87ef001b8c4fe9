"""students through the score cache, over ranks."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from condense import networks, rng
from condense.data import Task, cache_dir
from condense.device import device_name
from condense.judge.arms import Architecture, Arm
from condense.judge.protocol import Protocol
from condense.judge.scoring import summary
from condense.ranks import Ranks
from condense.tracking import Progress
from condense.training import STUDENT_VERSION, Recipe, Student, accuracy, pick_together, train

SEARCH = -1
"""Stands for the run's number in the draws of the student that tries a learning rate."""

# -- training and keeping ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """One student: the arm that it learns from, its network and learning rate, and the task that tests it."""

    arm: Arm
    network: str | Architecture
    rate: float
    run: int
    task: Task
    """The real data; for a search, with held-out training images in place of the test images."""


@dataclass
class _Judge:
    """Trains students through the cache, shared out over the ranks."""

    task: Task
    protocol: Protocol
    runs: int
    seed: int
    device: torch.device
    precision: str
    cache: bool
    quiet: bool
    ranks: Ranks

    @functools.cached_property
    def transform_digest(self) -> str:
        """Of the map to training space; a whitening matrix is large, so it is read once."""
        arrays = self.task.transform.arrays()
        return hashlib.sha256(b"".join(arrays[name].tobytes() for name in sorted(arrays))).hexdigest()

    def results(self, cells: Sequence[tuple[Arm, str | Architecture]]) -> list[dict[str, Any]]:
        """Accuracies of all runs of each arm on each network, as entries of the record's ``results``."""
        rates = self.rates(cells)
        jobs = [
            _Job(arm, network, rate, run, self.task)
            for (arm, network), rate in zip(cells, rates)
            for run in range(self.runs)
        ]
        scored = self.scored(jobs)
        found = []
        for number, ((arm, network), rate) in enumerate(zip(cells, rates)):
            accuracies, seconds = zip(*scored[number * self.runs : (number + 1) * self.runs])
            found.append(
                {
                    "arm": arm.name,
                    "labels": arm.labels,
                    "augment": self.recipe(arm, rate).augment is not None,
                    "network": networks.name_of(network),
                    "steps": arm.steps,
                    "lr": rate,
                    "lr_from": "held-out" if len(arm.rates) > 1 else "learned" if arm.learned else "protocol",
                    "accuracies": list(accuracies),
                    **summary(accuracies),
                    "seconds": round(sum(seconds), 2),
                }
            )
        return found

    def rates(self, cells: Sequence[tuple[Arm, str | Architecture]]) -> list[float]:
        """Each cell's learning rate; of several, the one whose student does best on held-out training images.

        Neither the choice nor the student that is trained for it sees a test image.
        """
        if all(len(arm.rates) == 1 for arm, _ in cells):
            return [arm.rates[0] for arm, _ in cells]
        inner = self.task.hold_out(self.protocol.held_out, (self.seed, "held-out"))
        jobs = [
            _Job(arm, network, rate, SEARCH, inner)
            for arm, network in cells
            if len(arm.rates) > 1
            for rate in arm.rates
        ]
        scored = iter(self.scored(jobs))
        chosen = []
        for arm, _ in cells:
            tried = [next(scored)[0] for _ in arm.rates] if len(arm.rates) > 1 else [0.0]
            chosen.append(arm.rates[tried.index(max(tried))])
        return chosen

    def recipe(self, arm: Arm, rate: float) -> Recipe:
        recipe = self.protocol.recipe(0, mirror=self.task.mirror, steps=arm.steps, lr=rate)
        return recipe if arm.augment else dataclasses.replace(recipe, augment=None)

    def scored(self, jobs: Sequence[_Job]) -> list[tuple[float, float]]:
        """Accuracy and training seconds of each job: from the cache, else trained, each by one rank."""
        known = torch.zeros(len(jobs), 3, dtype=torch.float64)
        if self.ranks.leads:  # one rank looks, so that all agree on what is to be done
            for row, job in zip(known, jobs):
                entry = _read_score(self._path(job)) if self._cached(job) else None
                if entry is not None:
                    row[:] = torch.tensor([*entry, 1.0], dtype=torch.float64)
        known = self._shared(known)
        trained = torch.zeros_like(known)
        todo = [number for number in range(len(jobs)) if not known[number, 2]]
        for turn, unit in enumerate(self._units(jobs, todo)):
            if turn % self.ranks.world != self.ranks.rank:
                continue
            for number, entry in zip(unit, self._train([jobs[number] for number in unit])):
                trained[number] = torch.tensor([*entry, 1.0], dtype=torch.float64)
                if self._cached(jobs[number]):
                    _write_score(self._path(jobs[number]), entry)
        return [(row[0], row[1]) for row in (known + self._shared(trained)).tolist()]

    def _shared(self, table: torch.Tensor) -> torch.Tensor:
        """The sum of the ranks' tables."""
        if self.ranks.world == 1:
            return table
        table = table.to(self.device)
        self.ranks.sum(table)
        return table.cpu()

    def _units(self, jobs: Sequence[_Job], todo: Sequence[int]) -> list[list[int]]:
        """Jobs that are trained at once: one by one on a CPU; else the runs of a cell, in as many parts as ranks."""
        if not pick_together(self.device):
            return [[number] for number in todo]
        cells: dict[Any, list[int]] = {}
        for number in todo:
            job = jobs[number]
            cells.setdefault((job.arm, job.network, job.rate, id(job.task)), []).append(number)
        parts = [cell[rank :: self.ranks.world] for cell in cells.values() for rank in range(self.ranks.world)]
        return [part for part in parts if part]

    def _train(self, jobs: Sequence[_Job]) -> list[tuple[float, float]]:
        """Jobs of one arm and network with one learning rate: accuracy and training seconds of each."""
        first = jobs[0]
        recipe = self.recipe(first.arm, first.rate)
        students = []
        for job in jobs:
            with rng.seeded(self.seed, "student", job.run):
                net = networks.build(job.network, self.task.shape, self.task.num_classes)
            students.append(Student(net, job.arm.source(job.task, job.run), rng.key(self.seed, "run", job.run)))
        which = f"run {first.run + 1} of {self.runs}" if len(jobs) == 1 else f"{len(jobs)} runs"
        which = f"trying lr {first.rate:g}" if first.run == SEARCH else which
        progress = Progress(
            f"{first.arm.name} on {networks.name_of(first.network)}, {which}",
            len(students) * recipe.steps,
            quiet=self.quiet or not self.ranks.leads,
        )
        checkpoint = self._path(first).with_suffix(".part") if self._cached(first) else None
        seconds = train(
            students, recipe, device=self.device, precision=self.precision, checkpoint=checkpoint,
            report=progress.update,
        )  # fmt: skip
        progress.close()
        return [
            (accuracy(s.network, job.task, device=self.device, precision=self.precision), round(seconds / len(jobs), 3))
            for s, job in zip(students, jobs)
        ]

    def _cached(self, job: _Job) -> bool:
        return self.cache and isinstance(job.network, str)  # a factory's name does not say what it builds

    def _path(self, job: _Job) -> Path:
        """Where the score of one student is kept; everything that can change it is in the name."""
        recipe = self.recipe(job.arm, job.rate)
        parts = [
            job.arm.identity, {**recipe.known(), "augment": str(recipe.augment)},
            networks.name_of(job.network), networks.library_version(job.network), job.run,
            self.protocol.held_out if job.run == SEARCH else None, self.seed, self.task.fingerprint,
            self.transform_digest, self.precision, device_name(self.device), torch.backends.cudnn.allow_tf32,
            pick_together(self.device), rng.HASH_VERSION, STUDENT_VERSION, torch.__version__,
        ]  # fmt: skip
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
        return cache_dir() / "students" / digest[:2] / f"{digest}.json"


def _read_score(path: Path) -> tuple[float, float] | None:
    try:
        entry = json.loads(path.read_text())
        return float(entry["accuracy"]), float(entry["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_score(path: Path, entry: tuple[float, float]) -> None:
    """Atomic; a cache that cannot be written costs time, not the result."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(dict(zip(("accuracy", "seconds"), entry))))
        os.replace(temporary, path)
    except OSError as fault:
        print(f"condense: the score cache cannot be written ({fault}); going on without it", file=sys.stderr)
