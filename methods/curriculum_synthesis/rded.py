"""RDED: the most confident crops of real images, without optimisation."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from condense.augment import ViewRule
from condense.config import require_one_of, require_range
from condense.data import Task, Transform
from condense.engine import Run
from condense.methods.curriculum_synthesis.initial import set_from_pixels
from condense.methods.curriculum_synthesis.patches import CROPS, GROUPINGS, POOL, confident_patches, get_crop_size
from condense.methods.curriculum_synthesis.relabelling import finish_set, get_teachers
from condense.methods.curriculum_synthesis.settings import RelabelOptions
from condense.registry import method
from condense.sets import SyntheticSet


@dataclass(frozen=True)
class RDED(RelabelOptions):
    """Hyper-parameters of RDED."""

    pool: int = POOL
    """Real images of each class that crops are taken from."""
    crops: int = CROPS
    """Random crops of each of these images, of which the most confident one counts."""
    factor: int = 1
    """Each image is a collage of factor x factor crops; 2 from 128x128 pixels on."""
    grouping: str = "neighbours"
    """Crops that share a collage: neighbours in the order of confidence, or strided (as released: the crops of an image
    are ipc places apart, so that all images have one of the best)."""
    shuffle_tiles: bool = False
    """As released: students see the columns and rows of a collage's crops in a random order."""
    labels: str = "teacher"
    label_scale: float = 1.0
    """{inherited} Published is 1 / factor."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_one_of(self, grouping=GROUPINGS)
        require_range(self, pool=(1, math.inf), crops=(1, math.inf), factor=(1, math.inf))

    def view_rule(self, mirror: bool, transform: Transform | None = None) -> ViewRule:
        tiles = self.factor if self.shuffle_tiles else 0
        return dataclasses.replace(super().view_rule(mirror, transform), tiles=tiles)


@method(
    "rded",
    config=RDED,
    year=2024,
    order=0,
    labels="teacher",
    protocol="rded-v1",
    network="resnet18-bn",
    paper="On the Diversity and Realism of Distilled Dataset: An Efficient Dataset Distillation Paradigm",
    pretrains="teachers",
)
def rded(task: Task, config: RDED, run: Run) -> SyntheticSet:
    """Selects the most confident crops of real images as collages, with a teacher's labels; no optimisation.

    When to use: as the baseline that every recovered set must beat, and as a good set in minutes. Cost: a teacher, and
    one forward pass over some crops. Known failure: confident crops are alike, so gains over random images shrink as
    sets grow.

    Sun, Shi, Yang & Lin, CVPR 2024. Crops are cut out of the images as they are in the data, before resize and crop.
    The paper's labels of regions are not in the released program; grouping=strided and shuffle_tiles=true are. Of
    several teachers the first scores the crops, and all label.
    """
    get_crop_size(task, config.factor, f"factor={config.factor}")
    committee = get_teachers(config, run, batch_norm=False)
    scorer = committee.members[0].network
    pixels = confident_patches(run, scorer, config.pool, config.crops, config.factor, config.grouping)
    synthetic = set_from_pixels(run, pixels)
    return finish_set(config, run, synthetic.images, synthetic.classes, committee)
