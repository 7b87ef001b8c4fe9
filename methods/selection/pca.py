"""PCA: easy images by their scores, shrunken and put together."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from condense import rng, selection
from condense.config import require_one_of, require_range
from condense.data import ORDERS, Task
from condense.engine import Run
from condense.errors import CondenseError
from condense.pretraining import ScoreOptions, load_or_train_scores
from condense.registry import method
from condense.sets import Formation, SyntheticSet


@dataclass(frozen=True)
class PCA(ScoreOptions):
    """Hyper-parameters of PCA."""

    factor: int = 2
    """Each stored image holds factor x factor shrunken images; 1 only prunes."""
    score: str = "el2n"
    """Column of the table of scores; published alternatives are aum and forgetting."""
    take: str = "easiest"
    """Images to take by their score: easiest (published), hardest or middle."""

    def __post_init__(self) -> None:
        self.check_scores()
        require_one_of(self, score=selection.COLUMNS, take=ORDERS)
        require_range(self, factor=(1, math.inf))


def combine_images(images: Tensor, factor: int) -> Tensor:
    """Shrinks images (N * factor^2, C, H, W) and puts each factor^2 consecutive ones into one of N images of the same
    size. H and W are multiples of ``factor``."""
    count, channels, height, width = images.shape
    size = height // factor, width // factor
    small = F.interpolate(images, size=size, mode="bilinear", antialias=True, align_corners=False)
    grid = small.view(count // factor**2, factor, factor, channels, *size)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(-1, channels, height, width)


@method(
    "pca",
    config=PCA,
    paper="Rethinking Large-scale Dataset Compression: Shifting Focus From Labels to Images",
    year=2025,
    order=0,
    protocol="rethink-hard-v1",
    pretrains="scores",
)
def pca(task: Task, config: PCA, run: Run) -> SyntheticSet:
    """Selects the easiest images of each class by a score and stores factor x factor of them, shrunken, in each image.

    When to use: on the hard-label track, where it is the published state of the art. Cost: the training of one network
    with a pass over the data in each epoch. Known failure: small images lose their details when they are shrunken; for
    32x32 pixels compare with factor=1.

    Prune, Combine, Augment: Xiao, Liu, He and Wang, arXiv 2502.06434, whose program is not released; the factor and the
    epoch of the score are not stated. Images are shrunken whole, not cropped. The set decodes into its tiles, each at
    full size, so that the crops of the protocol's augmentation lie in one tile, as the paper demands.
    """
    if config.factor > 1 and (task.shape[1] % config.factor or task.shape[2] % config.factor):
        raise CondenseError(f"factor={config.factor}: does not divide the {task.shape[1]}x{task.shape[2]} pixels")
    needed = run.ipc * config.factor**2
    if needed > task.counts.min():
        raise CondenseError(
            f"factor={config.factor}: {needed} images of each class are needed, the smallest class of {task.name} has "
            f"{task.counts.min()}; lower --ipc or factor"
        )
    difficulty = load_or_train_scores(run, config).difficulty(config.score)

    def choose(ids: Tensor, count: int, c: int) -> Tensor:
        return selection.take_in_order(difficulty[ids], count, config.take, rng.Draws(run.seed, "ties", c))

    ids = selection.select_by_class(task.train.labels, task.num_classes, needed, "class", choose)
    pixels = combine_images(task.pixels(ids), config.factor) if config.factor > 1 else task.pixels(ids)
    classes = torch.arange(task.num_classes).repeat_interleave(run.ipc)
    stages = [Formation(config.factor, 0.5)] if config.factor > 1 else []
    stored = (pixels.clamp(0, 1) * 255).round().to(torch.uint8)
    return SyntheticSet(task, stored, classes, space="pixel", stages=stages)
