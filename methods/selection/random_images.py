"""Random real images, the control of every learned set."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from condense.config import require_one_of
from condense.data import Task
from condense.engine import Run
from condense.methods.selection.settings import STORES
from condense.registry import method
from condense.sets import SyntheticSet


@dataclass(frozen=True)
class Random:
    """Hyper-parameters of random selection."""

    store: str = "images"
    """images, or indices into the real data, which whoever uses the file then needs."""

    def __post_init__(self) -> None:
        require_one_of(self, store=STORES)


@method(
    "random", config=Random, paper="Random real images, the control of every distillation paper", year=2018, order=0
)
def random(task: Task, config: Random, run: Run) -> SyntheticSet:
    """Selects ipc random real images of each class, unchanged (uint8).

    When to use: as the control that a distilled set must beat, or as a first small set. Cost: none. Known failure:
    at a few images per class the accuracy depends on the draw; evaluate several seeds.
    """
    chosen = [task.sample_ids(run.ipc, (run.seed, "random"), [c]) for c in range(task.num_classes)]
    return SyntheticSet.select(task, torch.cat(chosen))
