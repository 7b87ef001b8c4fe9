"""Trains students for all arms, through the score cache and distributed over ranks."""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
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
from condense.training import (
    STUDENT_VERSION,
    Source,
    Student,
    TrainConfig,
    correct_by_class,
    epoch_steps,
    prefers_stacked,
    train,
)

SEARCH_RUN = -1
"""Replaces the number of the run in the keys of the student that tries a learning rate."""


IMBALANCE = 1.5
"""Ratio of the largest to the smallest class of the test split from which balanced accuracies are reported too."""


def is_imbalanced(task: Task) -> bool:
    """Whether the classes of the test split differ so much in size that accuracy hides the small ones."""
    counts = np.bincount(task.test.labels, minlength=task.num_classes)
    return bool(counts.max() >= IMBALANCE * counts[counts > 0].min())


class CurvePoint(NamedTuple):
    """Accuracy of a student during its training."""

    step: float
    """Completed steps."""
    images: float
    """Training images seen until then, with repetitions."""
    accuracy: float


class Score(NamedTuple):
    """Result of one student."""

    accuracy: float
    balanced: float
    """Mean over the classes of the share of their test images that is classified correctly."""
    seconds: float
    """Time of training."""
    curve: tuple[CurvePoint, ...] = ()
    """Accuracies during the training; no decision uses them."""

    def row(self) -> list[float]:
        """All values in one list, of which the curve is the end."""
        return [*self[:3], *(float(value) for point in self.curve for value in point)]

    @classmethod
    def from_row(cls, row: Sequence[float]) -> Score:
        """Inverse of :meth:`row`."""
        accuracy, balanced, seconds = row[:3]
        return cls(accuracy, balanced, seconds, tuple(CurvePoint(*row[at : at + 3]) for at in range(3, len(row), 3)))


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
    shares: tuple[float, ...] = ()
    """Shares of the training after which students are tested for a curve, ascending."""

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
            scores = scored[number * self.runs : (number + 1) * self.runs]
            accuracies, balanced, seconds, curves = zip(*scores)
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
                    **({"curve": _curve_entry(curves, arm.steps, sum(seconds))} if self.shares else {}),
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
        task = self.task
        recipe = self.protocol.recipe(0, mirror=task.mirror, transform=task.transform, steps=arm.steps, lr=rate)
        return recipe if arm.augment else dataclasses.replace(recipe, augment=None)

    def curve_steps(self, job: StudentJob) -> list[int]:
        """Steps after which a student is tested for the curve; none in a search for the learning rate."""
        return [] if job.run == SEARCH_RUN else curve_steps(self.shares, job.arm.steps)

    def scored(self, jobs: Sequence[StudentJob]) -> list[Score]:
        """Score of each job, from the cache or trained by one of the ranks."""
        widths = [3 + len(CurvePoint._fields) * len(self.curve_steps(job)) for job in jobs]
        cached = torch.zeros(len(jobs), max(widths) + 1, dtype=torch.float64)  # 1 if the score exists, and the score
        if self.ranks.is_main_process:  # only one rank reads the cache, so that all ranks train the same jobs
            for row, job in zip(cached, jobs):
                is_cached, balanced, steps = self._cached(job), is_imbalanced(job.task), self.curve_steps(job)
                entry = read_score(self._path(job), balanced, steps) if is_cached else None
                if entry is not None:
                    _fill(row, entry)
        cached = self._all_ranks(cached)
        trained = torch.zeros_like(cached)
        pending = [number for number in range(len(jobs)) if not cached[number, 0]]
        for index, batch in enumerate(self._batches(jobs, pending)):
            if index % self.ranks.world_size != self.ranks.rank:
                continue
            for number, entry in zip(batch, self._train([jobs[number] for number in batch])):
                _fill(trained[number], entry)
                if self._cached(jobs[number]):
                    write_score(self._path(jobs[number]), entry)
        table = (cached + self._all_ranks(trained)).tolist()
        return [Score.from_row(row[1 : width + 1]) for row, width in zip(table, widths)]

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
            source = job.arm.source(job.task, job.run)
            students.append(make_student(job.network, self.task, source, self.seed, job.run))
        title = f"run {first.run + 1} of {self.runs}" if len(jobs) == 1 else f"{len(jobs)} runs"
        title = f"trying lr {first.rate:g}" if first.run == SEARCH_RUN else title
        progress = Progress(
            f"{first.arm.name} on {networks.network_name(first.network)}, {title}",
            len(students) * recipe.steps,
            quiet=self.quiet or not self.ranks.is_main_process,
        )
        steps = self.curve_steps(first)
        # The points of a curve are not part of a checkpoint, so a training with a curve begins again.
        checkpoint = self._path(first).with_suffix(".part") if self._cached(first) and not steps else None
        where: dict[str, Any] = {"device": self.device, "precision": self.precision}
        shape, classes = self.task.shape, self.task.num_classes
        compute = networks.calibrate(self.precision, self.device, first.network, shape, classes)
        with networks.memory_format(compute.format):
            watch = CurveWatch(students, [job.task for job in jobs], steps, recipe, where)
            watching: dict[str, Any] = {"watch": watch, "watch_every": math.gcd(*steps)} if watch.steps else {}
            seconds = train(students, recipe, checkpoint=checkpoint, report=progress.update, **watching, **where)
        seconds -= watch.test_seconds
        progress.close()
        scores = []
        for student, job, points in zip(students, jobs, watch.points):
            correct = np.array(correct_by_class(student.network, job.task, **where))
            counts = np.bincount(job.task.test.labels, minlength=job.task.num_classes)
            recalls = correct[counts > 0] / counts[counts > 0]
            accuracy, each = int(correct.sum()) / len(job.task.test), round(seconds / len(jobs), 3)
            if recipe.steps in steps:
                points.append(watch.point(student, recipe.steps, accuracy))
            scores.append(Score(accuracy, float(recalls.mean()), each, tuple(points)))
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


def make_student(network: str | NetworkFactory, task: Task, source: Source, seed: int, run: int) -> Student:
    """Makes the student of a run with its initial weights, which are the same for all arms."""
    with rng.seeded(seed, "student", run):
        net = networks.build_network(network, task.shape, task.num_classes)
    return Student(net, source, rng.key(seed, "run", run))


def curve_steps(shares: Sequence[float], steps: int) -> list[int]:
    """Different numbers of steps at these shares of ``steps``, at least 1, ascending."""
    return sorted({max(1, round(share * steps)) for share in shares})


class CurveWatch:
    """Tests students during their training; a ``watch`` of :func:`condense.training.train`.

    Args:
        students: Students that are trained.
        tasks: Task that each one is tested on.
        steps: Numbers of completed steps after which to test, except the last one of the training.
        recipe: Training configuration.
        where: Device and precision.
    """

    def __init__(
        self, students: Sequence[Student], tasks: Sequence[Task], steps: Sequence[int], recipe: TrainConfig, where: Any
    ) -> None:
        self.students, self.tasks, self.batch, self.where = students, tasks, recipe.batch, where
        self.steps = {*steps} - {recipe.steps}
        self.points: list[list[CurvePoint]] = [[] for _ in students]
        self.test_seconds = 0.0
        """Time of all tests so far."""

    def __call__(self, k: int, step: int, state: Mapping[str, torch.Tensor]) -> None:
        if step not in self.steps:
            return
        began = time.monotonic()
        network = copy.deepcopy(self.students[k].network)
        network.load_state_dict(state)
        correct = correct_by_class(network, self.tasks[k], **self.where)
        self.points[k].append(self.point(self.students[k], step, sum(correct) / len(self.tasks[k].test)))
        self.test_seconds += time.monotonic() - began

    def point(self, student: Student, step: int, accuracy: float) -> CurvePoint:
        """Returns the point of a student after ``step`` steps."""
        epochs, part = divmod(step, epoch_steps(student.source.size, self.batch))
        return CurvePoint(step, epochs * student.source.size + part * self.batch, accuracy)


def _fill(row: torch.Tensor, entry: Score) -> None:
    """Writes 1 and the values of a score to the beginning of a row."""
    values = [1.0, *entry.row()]
    row[: len(values)] = torch.tensor(values, dtype=torch.float64)


def _curve_entry(curves: Sequence[Sequence[CurvePoint]], steps: int, seconds: float) -> dict[str, Any]:
    """The curves of an arm's students for the record: accuracies by run, and the time of one training by steps."""
    return {
        "steps": [int(point.step) for point in curves[0]],
        "images": [int(point.images) for point in curves[0]],
        "accuracies": [[point.accuracy for point in curve] for curve in curves],
        "seconds": [round(seconds / len(curves) * point.step / steps, 3) for point in curves[0]],
    }


def read_score(path: Path, needs_balanced: bool, steps: Sequence[int] = ()) -> Score | None:
    """Reads a score; None if there is none, it is damaged, or it lacks a balanced accuracy or points of a curve that
    are needed. Of a curve, only the points at ``steps`` are returned."""
    try:
        entry = json.loads(path.read_text())
        balanced = entry["balanced"] if needs_balanced else entry.get("balanced", 0.0)
        curve = tuple(CurvePoint(*map(float, point)) for point in entry.get("curve", ()))
        score = Score(float(entry["accuracy"]), float(balanced), float(entry["seconds"]), curve)
        # Earlier versions stored no digest.
        is_intact = entry.get("sha256", _score_digest(path, score)) == _score_digest(path, score)
        points = tuple(point for point in curve if point.step in steps)
        if len(points) < len(steps):
            return None
        is_valid = 0 <= score.accuracy <= 1 and 0 <= score.seconds < math.inf
        return score._replace(curve=points) if is_intact and is_valid else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _score_digest(path: Path, score: Score) -> str:
    """SHA-256 of a score and of the name of its file."""
    return hashlib.sha256(" ".join([path.name, *map(repr, score.row())]).encode()).hexdigest()


def write_score(path: Path, entry: Score) -> None:
    """Writes a score atomically. If the cache cannot be written, the evaluation continues without it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        temporary.write_text(
            json.dumps({**entry._asdict(), "curve": entry.curve, "sha256": _score_digest(path, entry)})
        )
        os.replace(temporary, path)
    except OSError as fault:
        print(f"condense: the score cache cannot be written ({fault}); continuing without it", file=sys.stderr)
