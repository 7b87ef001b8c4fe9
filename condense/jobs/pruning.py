"""The share of the train images that methods distil from, chosen by a table of scores: prune first, distil after."""

from __future__ import annotations

from pathlib import Path

import torch

from condense import rng
from condense.data import Task
from condense.selection import read_score_table, select_by_class, take_in_order


def prune_task(real: Task) -> Task:
    """Returns the task with the train images that the data option ``prune`` keeps; this task if there is none.

    Each class keeps the same share, at least one image.

    Raises:
        CondenseError: the file is no table of scores, or of other data, or it lacks the score.
    """
    options = real.options
    if options.prune is None or options.prune_keep is None:
        return real
    table = read_score_table(Path(options.prune))
    table.check_fits(real, f"prune={options.prune}")
    difficulty, keep = table.difficulty(options.prune_score), options.prune_keep

    def choose(ids: torch.Tensor, count: int, c: int) -> torch.Tensor:
        share = max(1, round(keep * len(ids)))
        return take_in_order(difficulty[ids], share, options.prune_order, rng.Draws("prune", c))

    ids = select_by_class(real.train.labels, real.num_classes, len(table), "class", choose)
    return real.keep(ids.sort().values.numpy(), "pruned")
