"""a third of --minutes."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from condense.data import Task
from condense.engine import Interrupted, Run
from condense.files import replacing
from condense.tracking import Progress
from condense.training import Recipe, Student, Update, pick_together, steps_per_pass, train

PLAN = "bank.json"

SHARE = 1 / 3
"""Most of a run's ``--minutes`` that its own networks may take."""

PROBE_STEPS = 6
"""Training steps that tell how long one takes, after one that does not count."""


@dataclasses.dataclass(frozen=True)
class _Plan:
    """How many networks are trained for how long."""

    networks: int
    units: int
    unit_steps: int

    @property
    def steps(self) -> int:
        """Of one network."""
        return self.units * self.unit_steps


def groups(
    run: Run, mine: Sequence[int], steps: int, words: str, again: str, largest: int = sys.maxsize
) -> Iterator[tuple[list[int], Callable[[int], None]]]:
    """Networks to be trained together where that is faster, else each alone, with what their training reports to.

    Args:
        run: whose networks they are.
        mine: their numbers.
        steps: of each one's training.
        words: what progress calls them.
        again: what is said where a signal stops them.
        largest: most networks of a group.
    """
    size = largest if pick_together(run.device) else 1
    progress = Progress(f"{run.name}: {words}", len(mine) * steps, 0, run.quiet or not run.ranks.leads)

    def report(before: int, done: int) -> None:
        progress.update(before + done)
        if run.asked_to_stop and run.ranks.world == 1:
            raise Interrupted(again)

    for start in range(0, len(mine), size):
        yield list(mine[start : start + size]), functools.partial(report, start * steps)
    progress.close()


def agreed_plan(
    run: Run, seconds: Callable[[], float], *, networks: int, units: int, unit_steps: int, least: int = 1
) -> _Plan:
    """What is asked for, cut to the run's time limit; what a resumed run did before it does again.

    Args:
        run: whose limit it is; a rehearsal makes one short network and is told what all would take.
        seconds: measures the seconds of one training step of one network.
        networks: asked for.
        units: parts of each one's training.
        unit_steps: training steps of one part.
        least: fewest units of use; where not even these fit for all networks, fewer networks get them.
    """
    wanted = _Plan(networks, units, unit_steps)
    least = min(least, wanted.units)
    if run.dry_run:
        run.estimate("preparation", seconds() * wanted.networks * wanted.steps)
        return _Plan(1, min(wanted.units, max(2, least)), 1)
    path = run.directory / PLAN if run.directory else None
    if path is not None and run.resumes and path.exists():
        return _Plan(**json.loads(path.read_text()))
    plan = wanted
    if run.minutes is not None:
        fit = int(SHARE * 60 * run.minutes / (seconds() * wanted.unit_steps) * run.ranks.world)
        plan = dataclasses.replace(wanted, units=min(wanted.units, fit // wanted.networks))
        if plan.units < least:
            plan = _Plan(min(wanted.networks, max(1, fit // least)), least, wanted.unit_steps)
        plan = _Plan(run.ranks.agree(plan.networks), run.ranks.agree(plan.units), plan.unit_steps)
    if path is not None and run.ranks.leads:
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(dataclasses.asdict(plan)))
    return plan


def seconds_per_step(
    run: Run, students: Sequence[Student], recipe: Recipe, precision: str, update: Update | None = None
) -> float:
    """Seconds of one training step of one of ``students``, from a few steps of all of them."""
    ends: list[tuple[float, int]] = []

    def note(steps: int) -> None:
        if run.device.type == "cuda":
            torch.cuda.synchronize(run.device)
        ends.append((time.perf_counter(), steps))

    recipe = dataclasses.replace(recipe, steps=PROBE_STEPS + 1)
    train(students, recipe, device=run.device, precision=precision, report=note, update=update)
    return statistics.median((b[0] - a[0]) / (b[1] - a[1]) for a, b in itertools.pairwise(ends))


def taught(run: Run, batch: int, held_out: float) -> tuple[Task, int]:
    """The real data that experts or teachers learn from, without the share of each class that judges them, and the
    steps of an epoch."""
    source = run.task.hold_out(held_out, (run.seed, "held-out")) if held_out else run.task
    return source, steps_per_pass(len(source.train), batch)
