"""Knowledge distillation in data pruning: a subset of the data with mixed labels of a teacher."""

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
from condense.labels import SoftLabels
from condense.methods.selection.settings import STORES, Storage, teacher_logits
from condense.pretraining import ScoreOptions, TeacherOptions, get_committee, load_or_train_scores
from condense.registry import method
from condense.sets import SyntheticSet

LEAST_SHARE = 0.05
"""Share of the data up to which the labels are the teacher's alone."""


@dataclass(frozen=True)
class KDPrune(ScoreOptions, TeacherOptions, Storage):
    """Hyper-parameters of knowledge distillation in data pruning."""

    choose: str = "random"
    """random, or a column of the table of scores."""
    take: str = "hardest"
    """Images to take by their score: hardest, easiest or middle."""
    alpha: float | None = None
    """Weight of the teacher in the loss, 0 to 1; by default 1 up to 5 % of the data, falling to 1/2 for all of it."""

    def __post_init__(self) -> None:
        self.check_scores()
        self.check_teachers()
        require_one_of(self, store=STORES, choose=("random", *selection.COLUMNS), take=ORDERS)
        require_range(self, alpha=(0, 1))


def weight_of_teacher(share: float) -> float:
    """The default of ``alpha`` for a share of the data: 1 up to 5 %, then linear in the logarithm to 1/2. The paper
    finds that small shares need more of the teacher, and states no rule."""
    return min(1.0, max(0.5, 1 - 0.5 * (1 - math.log(share) / math.log(LEAST_SHARE))))


def mixed_logits(logits: Tensor, classes: Tensor, alpha: float) -> Tensor:
    """Logits (N, C) whose softmax is alpha * softmax(logits) + (1 - alpha) * onehot(classes)."""
    target = alpha * logits.softmax(1) + (1 - alpha) * F.one_hot(classes, logits.shape[1])
    return target.clamp(min=1e-12).log()


@method(
    "kdprune",
    config=KDPrune,
    paper="Distilling the Knowledge in Data Pruning",
    year=2025,
    order=0,
    labels="soft",
    protocol="dc-soft-v1",
    pretrains="teachers",
)
def kdprune(task: Task, config: KDPrune, run: Run) -> SyntheticSet:
    """Selects real images at random or by a score, and gives them labels mixed of their class and a teacher's output.

    When to use: as the baseline that soft-label methods must beat: random images with a teacher's labels. Cost: the
    training of a teacher on all data; for choose=SCORE, that of the networks that score. Known failure: a strong
    teacher hurts small subsets; take a small one there.

    Ben-Baruch et al., ICML 2025. The loss is (1 - alpha) CE(class) + alpha KL(teacher), which is the cross-entropy to
    the mixed label at temperature 1. Stored is one label per image; the paper asks the teacher about each augmented
    view, for which labels=teacher of rded serves. The control arm random has the teacher's labels alone (alpha=1).
    """
    committee = get_committee(config, run)
    if config.choose == "random":
        ids = torch.cat([task.sample_ids(run.ipc, (run.seed, "random"), [c]) for c in range(task.num_classes)])
    else:
        difficulty = load_or_train_scores(run, config).difficulty(config.choose)

        def choose(ids: Tensor, count: int, c: int) -> Tensor:
            return selection.take_in_order(difficulty[ids], count, config.take, rng.Draws(run.seed, "ties", c))

        ids = selection.select_by_class(task.train.labels, task.num_classes, run.ipc, "class", choose)
    synthetic = SyntheticSet.select(task, ids)
    share = len(ids) / len(task.train)
    alpha = weight_of_teacher(share) if config.alpha is None else config.alpha
    synthetic.labels = SoftLabels(mixed_logits(teacher_logits(synthetic, committee, run), synthetic.classes, alpha))
    return synthetic
