"""Scores of the real train images from networks that are trained on them.

After every epoch all train images pass through the network without augmentation, so one training gives the history
that all scores need. Each network's history is a file below ``CACHE/histories``, whose folder is named by the cache key
of the training; methods, budgets and score settings share it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from condense import networks
from condense.augment import make_augmentation
from condense.config import require_range
from condense.data import Task, cache_dir
from condense.engine import Run
from condense.errors import CondenseError
from condense.pretraining.budget import TrainingPlan
from condense.pretraining.pipeline import (
    Architecture,
    MemoryStore,
    NetworkKey,
    RecordedTraining,
    load_or_train,
    make_student,
)
from condense.pretraining.snapshots import SnapshotFolder
from condense.pretraining.store import ContentGuard, training_key_fields
from condense.selection import (
    ScoreTable,
    graph_of_neighbours,
    image_scores,
    make_table,
    read_score_table,
    summarise,
)
from condense.training import TrainConfig, epoch_steps

History = dict[str, Tensor]
"""The values of :func:`condense.selection.image_scores` after each epoch, float32 (E, n)."""


@dataclass(frozen=True)
class ScoreOptions:
    """Settings of the networks whose training gives scores; mixed into the settings of methods that use them."""

    scores: str = ""
    """A file of `condense scores`; by default the networks below are trained, or taken from the cache."""
    score_networks: int = 1
    """Networks of which the scores are means; papers take 1 to 10."""
    score_epochs: int = 30
    """Passes over the real training images."""
    score_lr: float = 0.02
    """Learning rate of SGD at the start; it falls to 0 along a cosine."""
    score_batch: int = 128
    """Real images per step."""
    score_augment: str = "crop_flip"
    """Operations joined by _ that augment the training; scores are of the images as they are."""
    score_early: int = 10
    """Epoch after which el2n and grand are taken."""
    score_window: int = 10
    """Epochs in a window of dual."""
    score_neighbours: int = 10
    """Nearest images of each image that are kept, for d2."""

    def check_scores(self) -> None:
        """For ``__post_init__``: checks the ranges of the settings."""
        counts = dict.fromkeys(("score_networks", "score_batch", "score_early"), (1, math.inf))
        require_range(
            self,
            **counts,
            score_epochs=(2, math.inf),
            score_window=(2, math.inf),
            score_neighbours=(1, 1000),
            score_lr=(0, sys.float_info.max),
        )
        try:
            make_augmentation(self.score_augment, variant="flip-always")
        except CondenseError as fault:
            raise CondenseError(f"score_augment={self.score_augment}: {fault}") from fault

    def score_recipe(self, task: Task) -> TrainConfig:
        """Returns the training: SGD with momentum 0.9 and weight decay 0.0005 along a cosine, with augmentation."""
        return TrainConfig(
            steps=0,
            batch=self.score_batch,
            lr=self.score_lr,
            momentum=0.9,
            weight_decay=5e-4,
            lr_milestones=(),
            augment=make_augmentation(self.score_augment, variant="flip-always", mirror=task.mirror),
            schedule="cosine",
        )


def load_or_train_scores(run: Run, options: ScoreOptions) -> ScoreTable:
    """Returns the table of scores of the run's data: of the file that the user named, or from trained networks.

    Networks in the cache are loaded, missing ones are trained. Of a time limit the training takes a third at most. The
    note ``scores`` in the manifest describes the table.

    Raises:
        Interrupted: SIGINT or SIGTERM; finished networks stay in the cache.
        CondenseError: the file is of other data, a network diverged, or the cache cannot be written.
    """
    if options.scores:
        table = read_score_table(Path(options.scores))
        if run.task.train.rows is not None:
            raise CondenseError(
                f"scores={options.scores}: is of all train images, but prune= or repeat_small= gives this run others; "
                "leave out scores=, and they are computed for those"
            )
        table.check_fits(run.task, options.scores)
        run.register_state("scores", ContentGuard(table.manifest["content"], options.scores, "scores"))
    else:
        table = _train_scores(run, options)
    told = ("network", "networks", "epochs", "accuracies", "seconds", "content")
    facts = {name: table.manifest[name] for name in told if name in table.manifest}
    run.note("scores", {"path": options.scores or None, **facts})
    return table


def _train_scores(run: Run, options: ScoreOptions) -> ScoreTable:
    task, recipe = run.task, options.score_recipe(run.task)
    training = _recorded_training(run, recipe, options.score_neighbours)
    steps_per_epoch = epoch_steps(len(task.train), recipe.batch)

    def open_cache(plan: TrainingPlan, keys: Sequence[NetworkKey]) -> SnapshotFolder:
        return SnapshotFolder(_cache_folder(run, recipe, plan, options.score_neighbours), keys)

    keys: list[NetworkKey] = [(run.network, k) for k in range(options.score_networks)]
    store, plan = load_or_train(
        run, training, keys, open_cache, units=options.score_epochs, unit_steps=steps_per_epoch, min_units=2
    )
    loaded = store.records if isinstance(store, MemoryStore) else store.load()
    records = [loaded[key] for key in store.keys]
    _check_records(records, len(task.train), plan.units)
    columns = [
        summarise(record["history"], options.score_early, options.score_window, options.score_epochs)
        for record in records
    ]
    about = {
        "data": task.name,
        "fingerprint": task.fingerprint,
        "classes": list(task.classes),
        "network": networks.network_name(run.network),
        "networks": len(records),
        "epochs": plan.units,
        "accuracies": [round(float(record["history"]["correct"][-1].mean()), 6) for record in records],
        "seconds": round(sum(float(record["seconds"]) for record in records), 2),
        "recipe": dataclasses.replace(recipe, steps=plan.steps).cache_key(),
    }
    means = {name: torch.stack([column[name] for column in columns]).mean(0) for name in columns[0]}
    return make_table(about, means, records[0]["neighbours"], records[0]["distances"])


def _recorded_training(run: Run, recipe: TrainConfig, neighbours: int) -> RecordedTraining[History, dict[str, Any]]:
    """Returns the training whose snapshots are the scores of all train images, and whose record has their history."""
    task = run.task
    probes: dict[Architecture, networks.Network] = {}

    def snapshot_of(architecture: Architecture) -> networks.Network:
        if architecture not in probes:
            with run.seeded("layout"):
                net = networks.build_network(architecture, task.shape, task.num_classes)
            networks.require_embedding(net, architecture, run.name)
            probes[architecture] = networks.freeze(net, run.device)
        return probes[architecture]

    def snapshot(state: Mapping[str, Tensor]) -> History:
        net = snapshot_of(run.network)
        net.load_state_dict(state)
        parts: list[History] = []
        for ids in run.train_id_chunks():
            labels = torch.from_numpy(task.train.labels[ids.numpy()]).to(run.device)
            parts.append(image_scores(*_forward(run, net, ids), labels))
        return {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}

    def record(
        architecture: Architecture, number: int, net: networks.Network, taken: list[History], seconds: float
    ) -> dict[str, Any]:
        after = taken[1:]  # the first one is of the untrained network
        history = {name: torch.stack([scores[name] for scores in after]) for name in after[0]}
        nearest, distances = torch.zeros(0, 0, dtype=torch.int32), torch.zeros(0, 0)
        if number == 0:
            net.eval()
            features = torch.cat([_forward(run, net, ids)[1] for ids in run.train_id_chunks()])
            nearest, distances = graph_of_neighbours(F.normalize(features), neighbours)
        return {
            "history": history,
            "neighbours": nearest.to("cpu", torch.int32),
            "distances": distances.cpu(),
            "seconds": seconds,
        }

    return RecordedTraining(
        "network",
        recipe,
        run.precision,
        student=lambda architecture, k: make_student(run, task, architecture, "scores", k),
        snapshot=snapshot,
        record=record,
        is_finite=lambda scores: bool(scores["loss"].isfinite().all()),
        remedy=f"(its predictions are not finite); lower score_lr, now {recipe.lr:g}",
    )


@torch.no_grad()
def _forward(run: Run, net: networks.Network, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Returns logits and features of train images, in float32."""
    with run.autocast():
        features = net.embed(run.task.batch(ids))
        logits = net.classify(features)
    return logits.float(), features.float()


def _check_records(records: Sequence[Mapping[str, Any]], images: int, epochs: int) -> None:
    for record in records:
        history = record.get("history")
        if not isinstance(history, dict) or any(value.shape != (epochs, images) for value in history.values()):
            raise CondenseError(f"{cache_dir() / 'histories'}: a history is not of this data; delete the folder")


def _cache_folder(run: Run, recipe: TrainConfig, plan: TrainingPlan, neighbours: int) -> Path:
    key = {
        **training_key_fields(run, recipe, None, 0.0),
        "network": str(run.network),
        "library_version": networks.library_version(run.network),
        "steps": plan.steps,
        "unit_steps": plan.unit_steps,
        "neighbours": neighbours,
    }
    text = json.dumps(key, sort_keys=True)
    return cache_dir() / "histories" / hashlib.sha256(text.encode()).hexdigest()
