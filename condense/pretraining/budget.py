"""Plans how many networks a run trains for how long within its time limit."""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from condense.engine import Run
from condense.files import atomic_write
from condense.training import GradientRule, Student, TrainConfig, train

PLAN_FILE = "bank.json"

MAX_TIME_SHARE = 1 / 3
"""Maximum share of a run's ``--minutes`` that training on the real data may take."""

PROBE_STEPS = 6
"""Training steps whose median time is measured, after one for warm-up."""


@dataclasses.dataclass(frozen=True)
class TrainingPlan:
    """Number of networks and length of their training. The field names are keys in ``bank.json``."""

    networks: int
    units: int
    """Parts of each network's training: epochs of experts and teachers."""
    unit_steps: int
    """Training steps of one part."""

    @property
    def steps(self) -> int:
        """Training steps of one network."""
        return self.units * self.unit_steps


def plan_training(
    run: Run,
    step_seconds: Callable[[], float],
    *,
    kind: str,
    networks: int,
    units: int,
    unit_steps: int,
    min_units: int = 1,
) -> TrainingPlan:
    """Cuts the requested training to the run's time limit. A resumed run keeps the plans that it began with.

    Args:
        run: its limit counts. A dry run trains one short network and estimates the time of all.
        step_seconds: measures the seconds of one training step of one network.
        kind: what is trained; a run may train networks of several kinds, each with a plan of its own.
        networks: requested number of networks.
        units: parts of each network's training.
        unit_steps: training steps of one part.
        min_units: minimum number of useful parts; where time is too short for these, fewer networks are trained.
    """
    requested = TrainingPlan(networks, units, unit_steps)
    min_units = min(min_units, requested.units)
    if run.dry_run:
        run.estimate("preparation", step_seconds() * requested.networks * requested.steps)
        return TrainingPlan(1, min(requested.units, max(2, min_units)), 1)
    path = run.directory / PLAN_FILE if run.directory else None
    plans: dict[str, dict[str, int]] = {}
    if path is not None and run.resumes and path.exists():
        plans = json.loads(path.read_text())
        if kind in plans:
            return TrainingPlan(**plans[kind])
    plan = requested
    if run.minutes is not None:
        seconds = MAX_TIME_SHARE * 60 * run.minutes
        affordable = int(
            seconds / (step_seconds() * requested.unit_steps) * run.ranks.world_size
        )  # units of all networks
        plan = dataclasses.replace(requested, units=min(requested.units, affordable // requested.networks))
        if plan.units < min_units:
            networks = min(requested.networks, max(1, affordable // min_units))
            plan = TrainingPlan(networks, min_units, requested.unit_steps)
        plan = TrainingPlan(run.ranks.broadcast(plan.networks), run.ranks.broadcast(plan.units), plan.unit_steps)
    if path is not None and run.ranks.is_main_process:
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps({**plans, kind: dataclasses.asdict(plan)}))
    return plan


def measure_step_seconds(
    run: Run, students: Sequence[Student], recipe: TrainConfig, precision: str, update: GradientRule | None = None
) -> float:
    """Trains ``students`` for a few steps and returns the median seconds of one step of one student."""
    ends: list[tuple[float, int]] = []

    def note(steps: int) -> None:
        if run.device.type == "cuda":
            torch.cuda.synchronize(run.device)
        ends.append((time.perf_counter(), steps))

    recipe = dataclasses.replace(recipe, steps=PROBE_STEPS + 1)
    train(students, recipe, device=run.device, precision=precision, report=note, update=update)
    return statistics.median((b[0] - a[0]) / (b[1] - a[1]) for a, b in itertools.pairwise(ends))
