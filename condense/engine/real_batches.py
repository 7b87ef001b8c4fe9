"""Real images of a step: drawn at random, or representatives of clusters (DREAM)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from condense import networks, rng
from condense.config import require_one_of, require_range
from condense.device import upload_indices
from condense.engine.run import Run, Step
from condense.selection import nearest_to_centroids
from condense.sets import SyntheticOptions

BATCHES = ("random", "cluster")
"""Values of ``batch``."""

BATCH_DEFAULTS = {"batch": "random", "cluster_steps": 10, "cluster_pool": None}
"""Settings that the keys of earlier runs do not have, and their defaults."""


@dataclass(frozen=True)
class RealBatchOptions(SyntheticOptions):
    """Settings of methods that match a batch of real images of each class in every step."""

    batch: str = "random"
    """Real images of a step: random, or cluster (DREAM, ICCV 2023: those nearest to the k-means centroids of each class
    in the features of the current network, one for each centroid; with init=kmeans the whole of DREAM)."""
    cluster_steps: int = 10
    """For batch=cluster, steps between two clusterings; the images stay the same in between."""
    cluster_pool: int | None = None
    """For batch=cluster, random images of each class that are clustered; by default all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_one_of(self, batch=BATCHES)
        require_range(self, cluster_steps=(1, math.inf), cluster_pool=(1, math.inf))


class RealBatches:
    """Draws the real images of each step.

    The representatives join the checkpoint, so that a run that is resumed between two clusterings continues with them.
    All ranks cluster all classes: a checkpoint has the state of one rank.

    Args:
        run: the run.
        net: a network of the run.
        options: the settings of the method.
        count: real images of each class; all of a smaller class.

    Raises:
        CondenseError: ``batch="cluster"``, and the network has no features.
    """

    def __init__(self, run: Run, net: networks.Network, options: RealBatchOptions, count: int) -> None:
        self.run, self.options, self.count = run, options, count
        self._ids: list[Tensor] = []
        self._clustered = -1
        if options.batch == "cluster":
            networks.require_embedding(net, run.network, f"{run.name} with batch=cluster")
            run.register_state("real batches", self)

    def draw(self, step: Step, net: networks.Network, classes: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Returns the real images of some classes, float32 (M,C,H,W) in the training space, and their classes, int64
        (M,), as :meth:`condense.data.Task.per_class` does. ``net`` gives the features."""
        task = self.run.task
        if self.options.batch == "random":
            return task.per_class(self.count, step.key("real"), classes)
        if not self._ids or (step.index % self.options.cluster_steps == 0 and self._clustered != step.index):
            self._ids = [self._representatives(step, net, c) for c in range(task.num_classes)]
            self._clustered = step.index
        ids = torch.cat([self._ids[c] for c in classes])
        labels = upload_indices(torch.from_numpy(task.train.labels[ids.numpy()]), task.device)
        return task.batch(ids), labels

    def _representatives(self, step: Step, net: networks.Network, c: int) -> Tensor:
        """Ids of the images of class ``c`` that are nearest to the centroids of its clusters."""
        task, options = self.run.task, self.options
        pool = int(task.counts[c]) if options.cluster_pool is None else max(options.cluster_pool, self.count)
        ids = task.sample_ids(pool, step.key("clustered"), [c])
        chunks = ids.split(self.run.forward_chunk_size() or len(ids))
        with torch.no_grad(), networks.evaluating(net), self.run.autocast():
            features = torch.cat([net.embed(task.batch(part)).float().cpu() for part in chunks])
        key = rng.key(*step.key("clusters"), c)
        return ids[nearest_to_centroids(features, min(self.count, len(ids)), key)]

    def state_dict(self) -> Mapping[str, Any]:
        return {"ids": self._ids, "clustered": self._clustered}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._ids, self._clustered = list(state["ids"]), int(state["clustered"])
