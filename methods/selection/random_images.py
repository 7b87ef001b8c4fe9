"""Random real images, the control of every learned set."""

from __future__ import annotations

import torch

from condense.data import Task
from condense.engine import Run
from condense.methods.selection.settings import Labelling, add_labels
from condense.registry import method
from condense.sets import SyntheticSet


@method(
    "random", config=Labelling, paper="Random real images, the control of every distillation paper", year=2018, order=0
)
def random(task: Task, config: Labelling, run: Run) -> SyntheticSet:
    """Selects ipc random real images of each class, unchanged (uint8).

    When to use: as the control that a distilled set must beat, or as a first small set. Cost: none. Known failure:
    at a few images per class the accuracy depends on the draw; evaluate several seeds.
    """
    chosen = [task.sample_ids(run.ipc, (run.seed, "random"), [c]) for c in range(task.num_classes)]
    return add_labels(SyntheticSet.select(task, torch.cat(chosen)), config, run)
