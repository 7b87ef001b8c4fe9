"""Snapshots of networks that a method trains on real data and matches with in every step.

Each network is a file below ``CACHE/banks``. The folder's name is the cache key of everything that decides the weights;
the method and the number of images per class are not part of it. A killed training loses only the networks in progress.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from condense import networks, rng
from condense.augment import make_augmentation
from condense.config import require_range
from condense.data import Task, cache_dir
from condense.device import device_name
from condense.engine import Run
from condense.errors import CondenseError
from condense.files import atomic_write, read_state
from condense.pretraining.budget import TrainingPlan
from condense.pretraining.pipeline import (
    Architecture,
    MemoryStore,
    NetworkKey,
    RecordedTraining,
    load_or_train,
    make_student,
)
from condense.pretraining.store import transform_digests
from condense.training import STUDENT_VERSION, TrainConfig, prefers_stacked


class Snapshots:
    """Recorded states, float16 on the run's device: ``states[k][name]`` is (snapshots, *shape) of network k.

    Float16 rounds weights by one part in 2,000 or 3e-8, whichever is more; counters stay integers.
    """

    def __init__(self, states: list[dict[str, Tensor]]) -> None:
        self.states = states
        self.networks = len(states)
        self.snapshots = len(next(iter(states[0].values())))

    def weights(self, k: int, t: int) -> dict[str, Tensor]:
        """Network ``k`` at snapshot ``t`` (0: before any training; -1: the last), float32."""
        return {
            name: value[t].float() if value.is_floating_point() else value[t] for name, value in self.states[k].items()
        }

    def load(self, net: nn.Module, k: int, t: int) -> None:
        """Loads the weights of :meth:`weights` into ``net``."""
        net.load_state_dict(self.weights(k, t))


@dataclasses.dataclass(frozen=True)
class SnapshotOptions:
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

    def check_snapshot_options(self) -> None:
        """For ``__post_init__``: checks the ranges of the settings."""
        require_range(
            self, networks=(1, math.inf), lr_net=(0, sys.float_info.max), batch_net=(1, math.inf), cutmix=(0, 1)
        )

    def recipe(self, task: Task, lr_milestones: tuple[float, ...] = ()) -> TrainConfig:
        """Returns their training: SGD with momentum 0.9 and weight decay 0.0005, augmentation and CutMix."""
        return TrainConfig(
            steps=0,
            batch=self.batch_net,
            lr=self.lr_net,
            momentum=0.9,
            weight_decay=5e-4,
            lr_milestones=lr_milestones,
            lr_gamma=0.2,
            augment=make_augmentation(self.augment_net, variant="idc", mirror=task.mirror),
            cutmix=self.cutmix,
        )


def load_or_train_snapshots(
    run: Run, recipe: TrainConfig, *, count: int, units: int, unit_steps: int, endpoints_only: bool = False
) -> Snapshots:
    """Returns snapshots of ``count`` networks of the run's architecture that are trained on its real data.

    Networks in the cache are loaded, missing ones are trained. Of a time limit the training takes a third at most: as
    many whole units for every network as fit, or one unit for fewer networks.

    Args:
        run: of the method.
        recipe: of the training; its number of steps is replaced.
        count: number of networks.
        units: parts of the training; a snapshot is taken before the first and after each.
        unit_steps: training steps of one part.
        endpoints_only: keep only the first and the last snapshot.

    Raises:
        Interrupted: SIGINT or SIGTERM; finished networks stay in the cache.
        CondenseError: the cache directory cannot be written.
    """

    def record(
        architecture: Architecture, number: int, net: networks.Network, taken: list[dict[str, Tensor]], seconds: float
    ) -> dict[str, Any]:
        return {"state": {name: torch.stack([state[name] for state in taken]) for name in taken[0]}, "seconds": seconds}

    training = RecordedTraining(
        "network",
        recipe,
        run.precision,
        student=lambda architecture, k: make_student(run, run.task, architecture, "bank", k),
        snapshot=_to_half,
        record=record,
        endpoints_only=endpoints_only,
        counts_epochs=False,
    )

    def open_cache(plan: TrainingPlan, keys: Sequence[NetworkKey]) -> SnapshotFolder:
        return SnapshotFolder(_cache_folder(run, recipe, plan, endpoints_only), keys)

    keys: list[NetworkKey] = [(run.network, k) for k in range(count)]
    store, _ = load_or_train(run, training, keys, open_cache, units=units, unit_steps=unit_steps)
    records = store.records if isinstance(store, MemoryStore) else store.load()
    return Snapshots(
        [{name: value.to(run.device) for name, value in records[key]["state"].items()} for key in store.keys]
    )


class SnapshotFolder:
    """The folder of the cache with a file for each network."""

    def __init__(self, folder: Path, keys: Sequence[NetworkKey]) -> None:
        self.path, self.keys = folder, keys
        self.records: dict[NetworkKey, dict[str, Any]] = {}

    def find(self) -> dict[NetworkKey, float]:
        for key in self.keys:
            path = self._path(key)
            record = read_state(path) if key not in self.records and path.exists() else None
            if record is not None:
                self.records[key] = record
        return {key: record["seconds"] for key, record in self.records.items()}

    def checkpoint(self, architecture: Architecture, number: int) -> Path | None:
        return None

    def write(self, key: NetworkKey, record: dict[str, Any]) -> None:
        self.records[key] = record
        self._path(key).parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(self._path(key)) as temporary, temporary.open("wb") as file:
            torch.save(record, file)

    def merge(self) -> None:
        pass

    def load(self) -> dict[NetworkKey, dict[str, Any]]:
        """Returns the records of all networks, also of those that other ranks have trained."""
        self.find()
        for key in self.keys:
            if key not in self.records:
                raise CondenseError(f"{self._path(key)}: not found on this rank; all ranks need the same cache")
        return self.records

    def _path(self, key: NetworkKey) -> Path:
        return self.path / f"{key[1]}.pt"


def _to_half(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: value.detach().to("cpu", torch.float16 if value.is_floating_point() else value.dtype, copy=True)
        for name, value in state.items()
    }


def _cache_folder(run: Run, recipe: TrainConfig, plan: TrainingPlan, endpoints_only: bool) -> Path:
    network = str(run.network)
    key = [
        run.task.fingerprint,
        transform_digests(run.task),
        network,
        networks.library_version(network),
        dataclasses.replace(recipe, steps=plan.steps).cache_key(),
        plan.unit_steps,
        endpoints_only,
        run.seed,
        run.precision,
        device_name(run.device),
        prefers_stacked(run.device),
        rng.HASH_VERSION,
        STUDENT_VERSION,
        torch.__version__,
    ]
    return cache_dir() / "banks" / hashlib.sha256(json.dumps(key).encode()).hexdigest()
