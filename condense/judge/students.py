"""Trains students for all arms, through the score cache and distributed over ranks."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from condense import networks, rng
from condense.data import Task, cache_dir
from condense.device import device_name
from condense.judge.arms import Arm, NetworkFactory
from condense.judge.protocol import Protocol
from condense.judge.scoring import summary
from condense.ranks import Ranks
from condense.tracking import Progress
from condense.training import STUDENT_VERSION, Student, TrainConfig, correct_by_class, prefers_stacked, train

SEARCH_RUN = -1
"""Replaces the number of the run in the keys of the student that tries a learning rate."""


IMBALANCE = 1.5
"""Ratio of the largest to the smallest class of the test split from which balanced accuracies are reported too."""


def is_imbalanced(task: Task) -> bool:
    """Whether the classes of the test split differ so much in size that accuracy hides the small ones."""
    counts = np.bincount(task.test.labels, minlength=task.num_classes)
    return bool(counts.max() >= IMBALANCE * counts[counts > 0].min())


class Score(NamedTuple):
    """Result of one student."""

    accuracy: float
    balanced: float
    """Mean over the classes of the share of their test images that is classified correctly."""
    seconds: float
    """Time of training."""


@dataclass(frozen=True)
class StudentJob:
    """One student: its arm, network and learning rate, and the task that it is tested on."""

    arm: Arm
    network: str | NetworkFactory
    rate: float
    run: int
    task: Task
    """The real data; in a search, held-out training images replace the test images."""


@dataclass
class Evaluator:
    """Trains and tests students, using the score cache and all ranks."""

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
        """SHA-256 of the map to training space, computed once because a whitening matrix is large."""
        arrays = self.task.transform.arrays()
        return hashlib.sha256(b"".join(arrays[name].tobytes() for name in sorted(arrays))).hexdigest()

    def results(self, cells: Sequence[tuple[Arm, str | NetworkFactory]]) -> list[dict[str, Any]]:
        """Accuracies of all runs of each cell (arm and network), as entries of ``results`` of the record."""
        rates = self.rates(cells)
        jobs = [
            StudentJob(arm, network, rate, run, self.task)
            for (arm, network), rate in zip(cells, rates)
            for run in range(self.runs)
        ]
        scored = self.scored(jobs)
        entries = []
        for number, ((arm, network), rate) in enumerate(zip(cells, rates)):
            accuracies, balanced, seconds = zip(*scored[number * self.runs : (number + 1) * self.runs])
            by_class = {"balanced_accuracies": list(balanced)} if is_imbalanced(self.task) else {}
            entries.append(
                {
                    "arm": arm.name,
                    "labels": arm.labels,
                    "augment": self.recipe(arm, rate).augment is not None,
                    "network": networks.network_name(network),
                    "steps": arm.steps,
                    "lr": rate,
                    "lr_from": "held-out" if len(arm.rates) > 1 else "learned" if arm.uses_learned_lr else "protocol",
                    "accuracies": list(accuracies),
                    **summary(accuracies),
                    **by_class,
                    "seconds": round(sum(seconds), 2),
                }
            )
        return entries

    def rates(self, cells: Sequence[tuple[Arm, str | NetworkFactory]]) -> list[float]:
        """Learning rate of each cell; if there are several, the best one on held-out training images.

        Test images are used neither for the choice nor for the students that are trained for it.
        """
        if all(len(arm.rates) == 1 for arm, _ in cells):
            return [arm.rates[0] for arm, _ in cells]
        inner = self.task.hold_out(self.protocol.held_out, (self.seed, "held-out"))
        jobs = [
            StudentJob(arm, network, rate, SEARCH_RUN, inner)
            for arm, network in cells
            if len(arm.rates) > 1
            for rate in arm.rates
        ]
        scored = iter(self.scored(jobs))
        chosen = []
        for arm, _ in cells:
            accuracies = [next(scored).accuracy for _ in arm.rates] if len(arm.rates) > 1 else [0.0]
            chosen.append(arm.rates[accuracies.index(max(accuracies))])
        return chosen

    def recipe(self, arm: Arm, rate: float) -> TrainConfig:
        """Training of the students of an arm."""
        recipe = self.protocol.recipe(0, mirror=self.task.mirror, steps=arm.steps, lr=rate)
        return recipe if arm.augment else dataclasses.replace(recipe, augment=None)

    def scored(self, jobs: Sequence[StudentJob]) -> list[Score]:
        """Score of each job, from the cache or trained by one of the ranks."""
        cached = torch.zeros(len(jobs), 4, dtype=torch.float64)  # the fields of Score, 1 if the score exists
        if self.ranks.is_main_process:  # only one rank reads the cache, so that all ranks train the same jobs
            for row, job in zip(cached, jobs):
                entry = _read_score(self._path(job), is_imbalanced(job.task)) if self._cached(job) else None
                if entry is not None:
                    row[:] = torch.tensor([*entry, 1.0], dtype=torch.float64)
        cached = self._all_ranks(cached)
        trained = torch.zeros_like(cached)
        pending = [number for number in range(len(jobs)) if not cached[number, 3]]
        for index, batch in enumerate(self._batches(jobs, pending)):
            if index % self.ranks.world_size != self.ranks.rank:
                continue
            for number, entry in zip(batch, self._train([jobs[number] for number in batch])):
                trained[number] = torch.tensor([*entry, 1.0], dtype=torch.float64)
                if self._cached(jobs[number]):
                    _write_score(self._path(jobs[number]), entry)
        return [Score(*row[:3]) for row in (cached + self._all_ranks(trained)).tolist()]

    def _all_ranks(self, table: torch.Tensor) -> torch.Tensor:
        """Sums the tables of all ranks."""
        if self.ranks.world_size == 1:
            return table
        table = table.to(self.device)
        self.ranks.all_reduce_sum(table)
        return table.cpu()

    def _batches(self, jobs: Sequence[StudentJob], pending: Sequence[int]) -> list[list[int]]:
        """Groups jobs that are trained together: single jobs on a CPU, otherwise the runs of a cell, split by ranks."""
        if not prefers_stacked(self.device):
            return [[number] for number in pending]
        cells: dict[Any, list[int]] = {}
        for number in pending:
            job = jobs[number]
            cells.setdefault((job.arm, job.network, job.rate, id(job.task)), []).append(number)
        parts = [
            cell[rank :: self.ranks.world_size] for cell in cells.values() for rank in range(self.ranks.world_size)
        ]
        return [part for part in parts if part]

    def _train(self, jobs: Sequence[StudentJob]) -> list[Score]:
        """Trains and tests jobs of one cell with one learning rate."""
        first = jobs[0]
        recipe = self.recipe(first.arm, first.rate)
        students = []
        for job in jobs:
            with rng.seeded(self.seed, "student", job.run):
                net = networks.build_network(job.network, self.task.shape, self.task.num_classes)
            students.append(Student(net, job.arm.source(job.task, job.run), rng.key(self.seed, "run", job.run)))
        title = f"run {first.run + 1} of {self.runs}" if len(jobs) == 1 else f"{len(jobs)} runs"
        title = f"trying lr {first.rate:g}" if first.run == SEARCH_RUN else title
        progress = Progress(
            f"{first.arm.name} on {networks.network_name(first.network)}, {title}",
            len(students) * recipe.steps,
            quiet=self.quiet or not self.ranks.is_main_process,
        )
        checkpoint = self._path(first).with_suffix(".part") if self._cached(first) else None
        where: dict[str, Any] = {"device": self.device, "precision": self.precision}
        shape, classes = self.task.shape, self.task.num_classes
        compute = networks.calibrate(self.precision, self.device, first.network, shape, classes)
        with networks.memory_format(compute.format):
            seconds = train(students, recipe, checkpoint=checkpoint, report=progress.update, **where)
        progress.close()
        scores = []
        for student, job in zip(students, jobs):
            correct = np.array(correct_by_class(student.network, job.task, **where))
            counts = np.bincount(job.task.test.labels, minlength=job.task.num_classes)
            recalls = correct[counts > 0] / counts[counts > 0]
            scores.append(
                Score(int(correct.sum()) / len(job.task.test), float(recalls.mean()), round(seconds / len(jobs), 3))
            )
        return scores

    def _cached(self, job: StudentJob) -> bool:
        return self.cache and isinstance(job.network, str)  # the name of a factory does not identify its networks

    def _path(self, job: StudentJob) -> Path:
        """File of the score of one student; its name is a digest of everything that affects the score."""
        recipe = self.recipe(job.arm, job.rate)
        parts = [
            job.arm.content_key,
            {**recipe.cache_key_fields(), "augment": str(recipe.augment)},
            networks.network_name(job.network),
            networks.library_version(job.network),
            job.run,
            self.protocol.held_out if job.run == SEARCH_RUN else None,
            self.seed,
            self.task.fingerprint,
            self.transform_digest,
            self.precision,
            device_name(self.device),
            torch.backends.cudnn.allow_tf32,
            prefers_stacked(self.device),
            rng.HASH_VERSION,
            STUDENT_VERSION,
            torch.__version__,
        ]
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
        return cache_dir() / "students" / digest[:2] / f"{digest}.json"


def _read_score(path: Path, needs_balanced: bool) -> Score | None:
    """Reads a score; None if there is none, it is damaged, or it lacks a balanced accuracy that is needed."""
    try:
        entry = json.loads(path.read_text())
        balanced = entry["balanced"] if needs_balanced else entry.get("balanced", 0.0)
        score = Score(float(entry["accuracy"]), float(balanced), float(entry["seconds"]))
        # Earlier versions stored no digest.
        is_intact = entry.get("sha256", _score_digest(path, score)) == _score_digest(path, score)
        return score if is_intact and 0 <= score.accuracy <= 1 and 0 <= score.seconds < math.inf else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _score_digest(path: Path, score: Score) -> str:
    """SHA-256 of a score and of the name of its file."""
    return hashlib.sha256(" ".join([path.name, *map(repr, score)]).encode()).hexdigest()


def _write_score(path: Path, entry: Score) -> None:
    """Writes a score atomically. If the cache cannot be written, the evaluation continues without it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps({**entry._asdict(), "sha256": _score_digest(path, entry)}))
        os.replace(temporary, path)
    except OSError as fault:
        print(f"condense: the score cache cannot be written ({fault}); continuing without it", file=sys.stderr)
