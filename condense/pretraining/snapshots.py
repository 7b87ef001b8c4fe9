"""Networks that a method trains on real data for its own use: recorded once, sampled in every step, kept on disk.

The training of such networks never depends on the synthetic set, so a bank of recorded weights replaces training them
anew in the loop. Each network is a file below the cache directory, known by all that decides it but not by ipc or
method: runs of other sizes find it there, and a killed recording loses the networks in training, on a CPU one.

Experts and teachers, which have files of their own (``trajectories``, ``teachers``), share its plan under a time limit,
the order of training and what is asked of a file that is there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from condense import networks, rng
from condense.augment import dsa
from condense.config import require
from condense.data import Task, cache_dir
from condense.device import device_name
from condense.engine import Run
from condense.errors import CondenseError
from condense.files import read_state, replacing
from condense.pretraining.budget import _Plan, agreed_plan, groups, seconds_per_step
from condense.pretraining.store import transform_digests
from condense.training import STUDENT_VERSION, Recipe, Student, TaskSource, pick_together, train

States = list[dict[str, Tensor]]


class Bank:
    """Recorded states, float16 on the run's device: ``states[k][name]`` is (snapshots, *shape) of network k.

    Float16 rounds weights by one part in 2,000 or 3e-8, whichever is more; counters stay integers.
    """

    def __init__(self, states: States) -> None:
        self.states = states
        self.networks = len(states)
        self.snapshots = len(next(iter(states[0].values())))

    def weights(self, k: int, t: int) -> dict[str, Tensor]:
        """Network ``k`` as it was at snapshot ``t`` (0: before any training; -1: the last), float32."""
        return {
            name: value[t].float() if value.is_floating_point() else value[t] for name, value in self.states[k].items()
        }

    def load(self, net: nn.Module, k: int, t: int) -> None:
        """Gives ``net`` the weights of :meth:`weights`."""
        net.load_state_dict(self.weights(k, t))


@dataclasses.dataclass(frozen=True)
class OwnNetworks:
    """Settings of networks that a method trains on real data and records; mixed into the method's own."""

    networks: int = 10
    """Networks to train on real data; kept below the cache directory and shared by runs with the same seed."""
    lr_net: float = 0.01
    """Learning rate of SGD for these networks."""
    batch_net: int = 64
    """Real images per step of their training."""
    augment_net: str = "color_crop"
    """Operations joined by _ of their training, drawn per image; flip and colour act in every step."""
    cutmix: float = 0.5
    """Probability of CutMix in a step of their training."""

    def check_networks(self) -> None:
        """For ``__post_init__``: refuses settings out of range."""
        require(
            self, networks=(1, math.inf), lr_net=(0, sys.float_info.max),
            batch_net=(1, math.inf), cutmix=(0, 1),
        )  # fmt: skip

    def recipe(self, task: Task, drops: tuple[float, ...] = ()) -> Recipe:
        """How they are trained: SGD with momentum 0.9 and weight decay 0.0005, augmentation and CutMix."""
        return Recipe(
            steps=0, batch=self.batch_net, lr=self.lr_net, momentum=0.9, weight_decay=5e-4, drops=drops,
            drop_factor=0.2, augment=dsa(self.augment_net, variant="idc", mirror=task.mirror), cutmix=self.cutmix,
        )  # fmt: skip


def record(run: Run, recipe: Recipe, *, count: int, units: int, unit_steps: int, ends: bool = False) -> Bank:
    """Trains ``count`` networks of the run's architecture on its real data and records them on the way.

    Its seconds count as the run's, also where networks were found in the cache; ``preparation`` in
    the manifest states them. Of a
    time limit it takes a third at most: as many whole units for every network as fit, or one unit for fewer networks.

    Args:
        recipe: of the training; its number of steps is replaced.
        count: networks.
        units: parts of the training; a snapshot is taken before the first and after each.
        unit_steps: training steps of one part.
        ends: only the first and the last snapshot are kept.

    Raises:
        Interrupted: SIGINT or SIGTERM; networks that are done stay in the cache.
        CondenseError: the cache directory cannot be written.
    """
    wanted = _Plan(count, units, unit_steps)
    if run.ranks.leads:
        run.begin()
    plan = _agreed_plan(run, recipe, wanted)
    recipe = dataclasses.replace(recipe, steps=plan.steps)
    folder = _folder(run, recipe, plan, ends)
    found: dict[int, dict[str, Any]] = {}
    missing = []
    for k in range(plan.networks):
        saved = read_state(folder / f"{k}.pt") if folder is not None and (folder / f"{k}.pt").exists() else None
        if saved is None:
            missing.append(k)
        else:
            found[k] = saved
    began, credited = time.monotonic(), sum(entry["seconds"] for entry in found.values())
    run.credit(credited)
    ranks = run.ranks
    # Under ranks each trains its share and reads the others' from the cache, which they have in common.
    mine = [k for k in missing if folder is None or k % ranks.world == ranks.rank]
    again = f"stopped while training its networks; go on with: condense resume {run.directory}"
    for group, report in groups(run, mine, recipe.steps, f"{len(missing)} networks on real data", again):
        for k, entry in zip(group, _train(run, recipe, plan, group, ends, report)):
            found[k] = entry
            if folder is not None:
                _write(folder / f"{k}.pt", entry)
    ranks.close()
    for k in missing:
        if k not in found and folder is not None:
            saved = read_state(folder / f"{k}.pt")
            if saved is None:
                raise CondenseError(f"{folder}: rank {ranks.rank} finds no network {k} there; ranks need one cache")
            found[k] = saved
    run.note("preparation", {
        "networks": plan.networks, "networks_wanted": wanted.networks, "steps_each": plan.steps,
        "steps_each_wanted": wanted.steps, "from_cache": plan.networks - len(missing),
        "seconds": round(credited + (time.monotonic() - began if missing else 0.0), 2),
    })  # fmt: skip
    return Bank(
        [{name: value.to(run.device) for name, value in found[k]["state"].items()} for k in range(plan.networks)]
    )


# -- banks ------------------------------------------------------------------------------------------------------------


def _agreed_plan(run: Run, recipe: Recipe, wanted: _Plan) -> _Plan:
    return agreed_plan(run, lambda: _seconds_per_step(run, recipe), **dataclasses.asdict(wanted))


def _student(run: Run, k: int) -> Student:
    with rng.seeded(run.seed, "bank", k):
        net = networks.build(run.network, run.task.shape, run.task.num_classes)
    return Student(net, TaskSource(run.task, run.device), rng.key(run.seed, "bank", k))


def _seconds_per_step(run: Run, recipe: Recipe) -> float:
    return seconds_per_step(run, [_student(run, 0)], recipe, run.precision)


def _train(
    run: Run, recipe: Recipe, plan: _Plan, group: Sequence[int], ends: bool, report: Callable[[int], None]
) -> list[dict[str, Any]]:
    """The networks of ``group``, trained together where that is faster: state and seconds of each."""
    students = [_student(run, k) for k in group]
    taken = [{0: _half(student.network.state_dict())} for student in students]

    def watch(k: int, step: int, state: Mapping[str, Tensor]) -> None:
        taken[k][step] = _half(state)  # by step: where memory did not suffice for all together, one by one starts anew

    seconds = train(
        students, recipe, device=run.device, precision=run.precision, report=report, watch=watch,
        watch_every=plan.steps if ends else plan.unit_steps,
    )  # fmt: skip
    return [
        {"state": {name: torch.stack([shots[step][name] for step in sorted(shots)]) for name in shots[0]},
         "seconds": seconds / len(group)}
        for shots in taken
    ]  # fmt: skip


def _half(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: value.detach().to("cpu", torch.float16 if value.is_floating_point() else value.dtype, copy=True)
        for name, value in state.items()
    }


def _write(path: Path, entry: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, temporary.open("wb") as file:
        torch.save(entry, file)


def _folder(run: Run, recipe: Recipe, plan: _Plan, ends: bool) -> Path | None:
    """Where the bank's networks are kept; None for one that a name does not describe, or a rehearsal's."""
    if not isinstance(run.network, str) or run.dry_run:
        return None
    parts = [
        run.task.fingerprint, transform_digests(run.task), run.network, networks.library_version(run.network),
        str(recipe), plan.unit_steps, ends, run.seed,
        run.precision, device_name(run.device), pick_together(run.device), rng.HASH_VERSION, STUDENT_VERSION,
        torch.__version__,
    ]  # fmt: skip
    return cache_dir() / "banks" / hashlib.sha256(json.dumps(parts).encode()).hexdigest()
