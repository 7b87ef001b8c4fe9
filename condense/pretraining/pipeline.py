"""Trains the networks that a method needs before it distils: plans, looks in the cache, trains what is missing, counts.

:func:`load_or_train` is the same for snapshots, experts and teachers. They differ in how a network is trained and what
is recorded of it (:class:`RecordedTraining`), and in where finished networks are stored (:class:`Store`). The training
never depends on the synthetic set, so runs of all methods and set sizes share the stored networks.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor, nn

from condense import networks, rng
from condense.data import Task, cache_dir
from condense.engine import Interrupted, Run
from condense.errors import CondenseError
from condense.files import exclusive_lock
from condense.pretraining.budget import TrainingPlan, measure_step_seconds, plan_training
from condense.tracking import Progress
from condense.training import GradientRule, Student, TaskSource, TrainConfig, epoch_steps, prefers_stacked, train

_log = logging.getLogger(__name__)

Architecture = str | Callable[..., nn.Module]

NetworkKey = tuple[Architecture, int]
"""Architecture of a network and its number among those of the same architecture."""

S = TypeVar("S")
R = TypeVar("R")
R_contra = TypeVar("R_contra", contravariant=True)


@dataclass(frozen=True)
class RecordedTraining(Generic[S, R]):
    """How networks of one kind are trained, and what is recorded of each."""

    name: str
    """What messages call one network: network, expert or teacher."""
    recipe: TrainConfig
    """Its number of steps is replaced."""
    precision: str
    """fp32 or bf16."""
    student: Callable[[Architecture, int], Student]
    """Builds the network with this architecture and number, its data and its seed."""
    snapshot: Callable[[Mapping[str, Tensor]], S]
    """Copies what is recorded from the weights and buffers, before the training and after each part of it."""
    record: Callable[[Architecture, int, networks.Network, list[S], float], R]
    """Returns what is stored, from the trained network, its snapshots and its training seconds."""
    is_finite: Callable[[S], bool] | None = None
    """Whether the weights of a snapshot are finite; None skips the check."""
    remedy: str = ""
    """End of the message about a network whose weights are not finite."""
    update: GradientRule | None = None
    """Gradients that SGD follows; None: those of the mean loss."""
    endpoints_only: bool = False
    """Takes snapshots only before and after the training."""
    max_group: int | None = None
    """Maximum number of networks that a GPU trains together; None: all, and the time of a single one is measured."""
    counts_epochs: bool = True
    """Whether a part of the training is an epoch."""

    def title(self, architecture: Architecture, number: int) -> str:
        """``expert 3``, ``teacher 0 of convnet-d3-w128-bn``: for messages."""
        return f"{self.name} {number}" + f" of {networks.network_name(architecture)}" * (self.name == "teacher")


class Store(Protocol[R_contra]):
    """Where finished networks are stored: a folder or file of the cache, a file that the user named, or memory."""

    @property
    def path(self) -> Path | None:
        """File or folder that processes write one after the other; None if no other process uses it."""

    @property
    def keys(self) -> Sequence[tuple[Any, int]]:
        """Networks that the store holds at the end."""

    def find(self) -> dict[Any, float]:
        """Returns the training seconds of the finished networks; checks that there is room for the missing ones."""

    def checkpoint(self, architecture: Architecture, number: int) -> Path | None:
        """Path for the state of a training in progress; None: an interrupted training begins again."""

    def write(self, key: Any, record: R_contra) -> None:
        """Stores a finished network, so that it survives an interruption."""

    def merge(self) -> None:
        """Called on the main process when all ranks have written their networks."""


C = TypeVar("C", bound=Store[Any])


class MemoryStore(Generic[R]):
    """Networks that no file keeps: those of a dry run, and those of an architecture given as a Python function.

    Attributes:
        records: what was recorded of each network.
        untrained: further networks that a dry run did not train.
    """

    path: Path | None = None

    def __init__(self, keys: Sequence[NetworkKey], untrained: Sequence[NetworkKey] = ()) -> None:
        self.keys, self.untrained = keys, untrained
        self.records: dict[NetworkKey, R] = {}

    def find(self) -> dict[NetworkKey, float]:
        return {}

    def checkpoint(self, architecture: Architecture, number: int) -> Path | None:
        return None

    def write(self, key: NetworkKey, record: R) -> None:
        self.records[key] = record

    def merge(self) -> None:
        pass


def load_or_train(
    run: Run,
    training: RecordedTraining[S, R],
    keys: Sequence[NetworkKey],
    open_cache: Callable[[TrainingPlan, Sequence[NetworkKey]], C],
    *,
    units: int,
    unit_steps: int,
    min_units: int = 1,
) -> tuple[C | MemoryStore[R], TrainingPlan]:
    """Returns a store that holds the networks of a method's run, and their plan; missing ones are trained.

    The training seconds count as the run's own, also those of networks found in the cache; the note ``preparation``
    in the manifest states them.

    Args:
        run: of the method.
        training: how the networks are trained, and what is recorded.
        keys: requested networks; a time limit may leave out the last ones.
        open_cache: returns the store of the cache for a plan and the networks that it keeps.
        units: requested parts of each training.
        unit_steps: training steps of one part.
        min_units: minimum number of useful parts.

    Raises:
        Interrupted: SIGINT or SIGTERM; finished networks stay in the cache.
        CondenseError: a network diverged, or the cache cannot be written.
    """
    if run.ranks.is_main_process:
        run.begin()
    plan = plan_training(
        run,
        lambda: _mean_step_seconds(run, training, keys),
        kind=training.name,
        networks=len(keys),
        units=units,
        unit_steps=unit_steps,
        min_units=min_units,
    )
    began, planned = time.monotonic(), keys[: plan.networks]
    store: C | MemoryStore[R]
    if run.dry_run or not all(isinstance(architecture, str) for architecture, _ in keys):  # a name is part of the key
        store = MemoryStore(planned, keys[plan.networks :] if run.dry_run else ())
    else:
        store = open_cache(plan, planned)
    stop_message = f"stopped while training its {training.name}s; continue with: {run.resume_call}"
    stored, trained = train_missing(run, training, store, plan, stop_message)
    cached_seconds = sum(stored[key] for key in planned if key in stored)
    run.add_elapsed(cached_seconds)
    epochs = {"epochs": plan.units, "epochs_wanted": units} if training.counts_epochs else {}
    facts = {
        "networks": plan.networks,
        "networks_wanted": len(keys),
        "steps_each": plan.steps,
        "steps_each_wanted": units * unit_steps,
        **epochs,
        "from_cache": plan.networks - len(trained),
        "seconds": round(cached_seconds + (time.monotonic() - began if trained else 0.0), 2),
    }
    run.note("preparation", facts)
    return store, plan


def train_missing(
    run: Run, training: RecordedTraining[S, R], store: Store[R], plan: TrainingPlan, stop_message: str
) -> tuple[dict[NetworkKey, float], list[NetworkKey]]:
    """Trains the networks that ``store`` lacks, and stores each as soon as it is finished. Ranks share the work.

    Returns:
        Training seconds of the networks that were found, and the keys of those that were missing.

    Raises:
        Interrupted: SIGINT or SIGTERM.
        CondenseError: a network diverged, or the store holds something else or cannot be written.
    """
    with contextlib.ExitStack() as stack:
        if store.path is not None and run.ranks.is_main_process:
            stack.enter_context(
                exclusive_lock(store.path, cache_dir() / "locks", _make_waiter(run, store, stop_message))
            )
        run.ranks.barrier()
        return _train_locked(run, training, store, plan, stop_message)


def _make_waiter(run: Run, store: Store[Any], stop_message: str) -> Callable[[], None]:
    """Returns the function that is called while another process writes the same networks."""
    notices = [f"condense: waiting for another process that writes {store.path}"]

    def wait() -> None:
        if notices:
            _log.warning(notices.pop())
        if run.stop_requested:
            raise Interrupted(stop_message)

    return wait


def _train_locked(
    run: Run, training: RecordedTraining[S, R], store: Store[R], plan: TrainingPlan, stop_message: str
) -> tuple[dict[NetworkKey, float], list[NetworkKey]]:
    ranks, stored = run.ranks, store.find()
    missing = [key for key in store.keys if key not in stored]
    ranks.barrier()  # all ranks look before any of them writes
    shares = 1 if isinstance(store, MemoryStore) else ranks.world_size  # a rank does not see the memory of another one
    own = [key for i, key in enumerate(store.keys) if key in missing and i % shares == ranks.rank % shares]
    for architecture in dict.fromkeys(architecture for architecture, _ in own):
        numbers = [number for other, number in own if other == architecture]
        description = f"{len(numbers)} {training.name}s {networks.network_name(architecture)}"
        groups = iter_training_groups(run, numbers, plan.steps, description, stop_message, training.max_group)
        for group, report in groups:
            checkpoint = store.checkpoint(architecture, group[0])
            for number, record in _train_group(run, training, architecture, group, plan, report, checkpoint):
                store.write((architecture, number), record)
    ranks.barrier()
    if ranks.is_main_process:
        store.merge()
    ranks.barrier()
    return stored, missing


def iter_training_groups(
    run: Run,
    numbers: Sequence[int],
    steps: int,
    description: str,
    stop_message: str,
    max_group: int | None = None,
) -> Iterator[tuple[list[int], Callable[[int], None]]]:
    """Yields the networks to train together where that is faster, else each alone, and a callback for their progress.

    Args:
        run: device, progress line, signals.
        numbers: of the networks.
        steps: training steps of each network.
        description: text of the progress line.
        stop_message: message of :class:`Interrupted` when a signal stops the training.
        max_group: maximum number of networks in a group; None: no limit.
    """
    size = (max_group or sys.maxsize) if prefers_stacked(run.device) else 1
    progress = Progress(
        f"{run.name}: {description}", len(numbers) * steps, 0, run.quiet or not run.ranks.is_main_process
    )

    def report(before: int, done: int) -> None:
        progress.update(before + done)
        if run.stop_requested and run.ranks.world_size == 1:
            raise Interrupted(stop_message)

    for start in range(0, len(numbers), size):
        yield list(numbers[start : start + size]), functools.partial(report, start * steps)
    progress.close()


def _train_group(
    run: Run,
    training: RecordedTraining[S, R],
    architecture: Architecture,
    numbers: Sequence[int],
    plan: TrainingPlan,
    report: Callable[[int], None],
    checkpoint: Path | None,
) -> Iterator[tuple[int, R]]:
    """Trains networks of one architecture and yields the number and record of each.

    Raises:
        CondenseError: networks diverged; the others were yielded before.
    """
    students = [training.student(architecture, number) for number in numbers]
    # By step: where memory does not suffice to train all together, `train` begins again with one after the other.
    snapshots = [{0: training.snapshot(student.network.state_dict())} for student in students]
    diverged: dict[int, int] = {}  # number of a network -> part of the training after which its weights are not finite

    def watch(i: int, step: int, state: Mapping[str, Tensor]) -> None:
        snapshots[i][step] = training.snapshot(state)
        if training.is_finite is not None and not training.is_finite(snapshots[i][step]):
            diverged.setdefault(numbers[i], step // plan.unit_steps)
            if len(diverged) == len(numbers):
                raise _divergence_error(training, architecture, diverged)

    seconds = train(
        students,
        replace(training.recipe, steps=plan.steps),
        device=run.device,
        precision=training.precision,
        report=report,
        checkpoint=checkpoint,
        watch=watch,
        watch_every=plan.steps if training.endpoints_only else plan.unit_steps,
        update=training.update,
    )
    for number, student, taken in zip(numbers, students, snapshots):
        if number not in diverged:
            ordered = [taken[step] for step in sorted(taken)]
            yield number, training.record(architecture, number, student.network, ordered, seconds / len(numbers))
    if diverged:
        raise _divergence_error(training, architecture, diverged)


def _divergence_error(
    training: RecordedTraining[Any, Any], architecture: Architecture, diverged: Mapping[int, int]
) -> CondenseError:
    titles = [f"{training.title(architecture, number)} in epoch {epoch}" for number, epoch in diverged.items()]
    return CondenseError(f"diverged: {', '.join(titles)} {training.remedy}; {training.name}s that are done are kept")


def _mean_step_seconds(run: Run, training: RecordedTraining[Any, Any], keys: Sequence[NetworkKey]) -> float:
    """Measures the seconds of a training step of one network, as the mean over the architectures."""
    size = training.max_group if training.max_group and prefers_stacked(run.device) else 1
    seconds = []
    for architecture in dict.fromkeys(architecture for architecture, _ in keys):
        numbers = [number for other, number in keys if other == architecture][:size]
        students = [training.student(architecture, number) for number in numbers]
        seconds.append(measure_step_seconds(run, students, training.recipe, training.precision, training.update))
    return statistics.mean(seconds)


def make_student(run: Run, source: Task, architecture: Architecture, *purpose: str | int) -> Student:
    """Builds a student whose initial weights and batches follow from the run's seed and ``purpose``."""
    with rng.seeded(run.seed, *purpose):
        net = networks.build_network(architecture, source.shape, source.num_classes)
    return Student(net, TaskSource(source, run.device), rng.key(run.seed, *purpose))


def split_training_data(run: Run, batch: int, held_out: float) -> tuple[Task, int]:
    """Returns the real data without the share of each class that measures accuracy, and the steps of an epoch."""
    source = run.task.hold_out(held_out, (run.seed, "held-out")) if held_out else run.task
    return source, epoch_steps(len(source.train), batch)
