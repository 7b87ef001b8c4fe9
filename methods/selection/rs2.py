"""Repeated sampling of random subsets: the baseline that every selection and distilled set must beat at equal steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from condense import rng, selection
from condense.config import require_one_of, require_range
from condense.data import Task
from condense.engine import Run
from condense.errors import CondenseError
from condense.methods.selection.settings import STORES, Storage
from condense.registry import method
from condense.sets import Resampling, SyntheticSet


@dataclass(frozen=True)
class RS2(Storage):
    """Hyper-parameters of repeated sampling."""

    fraction: float | None = None
    """Share of the real images that students of an evaluation draw in each epoch; by default that of the images which
    the file holds."""

    def __post_init__(self) -> None:
        require_one_of(self, store=STORES)
        require_range(self, fraction=(1e-9, 1))


@method(
    "rs2",
    config=RS2,
    paper="Repeated Random Sampling for Minimizing the Time-to-Accuracy of Learning",
    year=2024,
    order=0,
)
def rs2(task: Task, config: RS2, run: Run) -> SyntheticSet:
    """Selects random real images, and lets an evaluation draw new ones in every epoch, without replacement.

    When to use: as the baseline for everything that claims to save training time; it needs all real images while it
    trains. Cost: none. Known failure: it saves no storage. With few steps it is a short training on all data.

    Okanovic et al., ICLR 2024. The file holds the ipc images of each class that a first epoch would draw, and the share
    of the data that an epoch draws. Used alone, with `condense.fit` or in a training loop, it is a random selection.
    `condense evaluate` has the real data: its students draw another subset in each epoch, for the steps of a set of as
    many images as the file holds, and with a learning rate that falls over these steps. The bytes of the real data
    count as external. Subsets are consecutive parts of a permutation in which classes alternate; the published program
    repeats images of the same permutation in its last part, which is left out here.
    """
    if task.options.prune is not None:
        raise CondenseError(f"prune={task.options.prune}: students of rs2 draw from all train images; leave it out")
    count = task.num_classes * run.ipc
    share = min(1.0, count / len(task.train)) if config.fraction is None else config.fraction
    resampling = Resampling(share, task.counts.tolist())
    if resampling.size(len(task.train)) < min(count, len(task.train)):
        raise CondenseError(
            f"fraction={config.fraction}: an epoch would draw {resampling.size(len(task.train))} images, fewer than "
            f"the {count} of --ipc {run.ipc}; give a larger fraction or a lower --ipc"
        )
    order = selection.alternating_permutation(task.train.labels, rng.Draws(run.seed, "rs2", 0))
    classes = torch.from_numpy(task.train.labels)[order]
    synthetic = SyntheticSet.select(task, torch.cat([order[classes == c][: run.ipc] for c in range(task.num_classes)]))
    synthetic.resampling = resampling
    return synthetic
