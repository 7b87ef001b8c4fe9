"""TODO-DOC."""

from __future__ import annotations

import math
from dataclasses import dataclass

from condense.config import require
from condense.data import Task
from condense.engine import Run
from condense.methods.curriculum_synthesis.initial import from_pixels
from condense.methods.curriculum_synthesis.patches import confident_patches, side
from condense.methods.curriculum_synthesis.relabelling import finished, squeezed
from condense.methods.curriculum_synthesis.settings import Relabelling
from condense.registry import method
from condense.sets import SyntheticSet

# -- RDED -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RDED(Relabelling):
    """Hyper-parameters of RDED."""

    pool: int = 300
    """Real images of each class that crops are taken from."""
    crops: int = 5
    """Crops of each of these, of which the surest counts."""
    factor: int = 1
    """Each image is a collage of factor x factor crops; 2 from 128x128 pixels on."""
    labels: str = "teacher"
    """See SRe2L's."""
    label_scale: float = 1.0
    """See SRe2L's; published is 1 / factor."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, pool=(1, math.inf), crops=(1, math.inf), factor=(1, math.inf))


@method(
    "rded", config=RDED, year=2024, order=0, labels="teacher", protocol="rded-v1", network="resnet18-bn",
    paper="On the Diversity and Realism of Distilled Dataset: An Efficient Dataset Distillation Paradigm",
)  # fmt: skip
def rded(task: Task, config: RDED, run: Run) -> SyntheticSet:
    """Keeps the crops of real images that a teacher is surest of, as collages, with the teacher's labels; no descent.

    When to use: as the control that every recovered set must beat, and as a good set in minutes. Cost: a teacher, and
    one pass over some crops. Known failure: sure crops are alike, so gains over random images shrink as sets grow.

    Sun, Shi, Yang & Lin, CVPR 2024. The released students also permute the tiles of collages, which is not done here;
    with factor=1 there is nothing to permute. The paper's labels of regions are not in the released program either. Of
    several teachers the first scores, all label.
    """
    side(task, config.factor, f"factor={config.factor}")
    committee = squeezed(config, run)
    synthetic = from_pixels(run, confident_patches(run, committee.members[0].network, config))
    return finished(config, run, synthetic.images, synthetic.classes, committee)
