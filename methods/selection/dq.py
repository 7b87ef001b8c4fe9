"""Dataset Quantization: bins by graph cut, sampled evenly."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from condense import rng, selection
from condense.config import require_range
from condense.data import Task
from condense.engine import Run
from condense.methods.selection.settings import GradientOptions, select_images, similarities
from condense.registry import method
from condense.selection import Kernel
from condense.sets import SyntheticSet


@dataclass(frozen=True)
class DQ(GradientOptions):
    """Hyper-parameters of Dataset Quantization."""

    kernel: str = "features"
    """{inherited}"""
    bins: int = 10
    """Bins of each class; 1 selects at random."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self, bins=(1, math.inf))


def split_into_bins(kernel: Callable[[Tensor], Kernel], ids: Tensor, bins: int) -> list[Tensor]:
    """Splits images into bins of equal size, each the graph cut of those that are left; the last one takes the rest.

    Args:
        kernel: returns the similarities among images.
        ids: of the images.
        bins: number of bins; at most one for each image is made.

    Returns:
        Rows of ``ids`` of each bin.
    """
    bins = min(bins, len(ids))
    rows, found = torch.arange(len(ids)), []
    for _ in range(bins - 1):
        chosen = selection.graph_cut(kernel(ids[rows]), len(ids) // bins)
        found.append(rows[chosen])
        is_left = torch.ones(len(rows), dtype=torch.bool)
        is_left[chosen] = False
        rows = rows[is_left]
    return [*found, rows]


@method(
    "dq",
    config=DQ,
    paper="Dataset Quantization",
    year=2023,
    order=0,
    pretrains="teachers",
)
def dq(task: Task, config: DQ, run: Run) -> SyntheticSet:
    """Splits each class into bins by graph cut and samples every bin evenly.

    When to use: for 10 to 60 percent of the data, where a single coreset holds too many typical images. Cost: a short
    training of one network, and time that grows with the square of the class size. Known failure: with one image for
    each bin or less it is a random selection of the first bins.

    Zhou et al., ICCV 2023. Only the selection is here: the paper also drops patches of the images and rebuilds them
    with a pretrained masked autoencoder of 330 million weights, which its sizes do not count. Its program takes
    gradients of a classifier that is not trained, which are features weighted at random; features are the default here.
    """
    kernel = similarities(config, run)

    def choose(ids: Tensor, count: int, c: int) -> Tensor:
        bins, draws = split_into_bins(kernel, ids, config.bins), rng.Draws(run.seed, "bins", c)
        shares = selection.even_shares(count, [len(rows) for rows in bins])
        return torch.cat([rows[draws.sample(len(rows), share)] for rows, share in zip(bins, shares)])

    return select_images(config, run, choose)
