"""TODO-DOC."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from condense import rng
from condense.config import require
from condense.data import Task
from condense.engine import Group, Run, Target
from condense.methods.trajectory_matching.ftd import FTD
from condense.methods.trajectory_matching.matching import (
    ANSWER_CHUNK,
    Learner,
    about_the_set,
    answers,
    their_experts,
    walk,
    with_step_size,
)
from condense.pretraining import Experts
from condense.registry import method
from condense.sets import INITS, SyntheticSet

# -- DATM -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DATM(FTD):
    """Hyper-parameters of DATM; those of CIFAR-10 at 10 images per class."""

    init: str = "correct"
    """How images start: correct (real images that an expert recognises), or as DM's."""
    steps: int = 10_000
    """See MTT's."""
    syn_steps: int = 80
    """See MTT's."""
    lr_start: float = 0.01
    """See MTT's."""
    lr_label: float = 2.0
    """Learning rate of the label logits; 0 keeps them."""
    label_momentum: float = 0.9
    """Momentum of the label logits."""
    first_max_start_epoch: int | None = None
    """Students start below this epoch at first; by default half of ``max_start_epoch``."""
    expand_steps: int = 1000
    """Outer steps over which later starts join, evenly, up to ``max_start_epoch``; 0: all from the first step."""
    gate: float = 1.0
    """Outer steps with a matching loss above this change nothing; 1.1 for CIFAR-10 at 1 image per class."""
    ema: float | None = 0.0
    """See FTD's; the released program has the setting but no average."""

    inits: ClassVar[tuple[str, ...]] = (*INITS, "correct")

    def __post_init__(self) -> None:
        super().__post_init__()
        largest = sys.float_info.max
        require(
            self, lr_label=(0, largest), label_momentum=(0, 1), gate=(0, largest), expand_steps=(0, math.inf),
            first_max_start_epoch=(self.min_start_epoch + 1, self.max_start_epoch),
        )  # fmt: skip

    def window(self, index: int) -> int:
        """One more than the latest epoch at which the student of outer step ``index`` may start."""
        if not self.expand_steps:
            return self.max_start_epoch
        first = self.first_max_start_epoch or max(self.min_start_epoch + 1, self.max_start_epoch // 2)
        return min(self.max_start_epoch, first + (self.max_start_epoch - first) * index // self.expand_steps)

    def groups(self) -> dict[str, Any]:
        """As MTT's, with the labels."""
        return {**super().groups(), "labels": Group(lr=self.lr_label, momentum=self.label_momentum)}


def recognised(task: Task, run: Run, experts: Experts) -> Tensor:
    """Ids of ``ipc`` random real images of each class that the first expert recognises; where it recognises too few,
    also of those that the next ones do, and at last of any."""
    chosen = []
    for c in range(task.num_classes):
        members = torch.from_numpy(task.class_ids(c))
        left = members[rng.Draws(run.seed, "init", "correct", c).permutation(len(members))]
        found: list[Tensor] = []
        for k in range(experts.count):
            wrong: list[Tensor] = []
            for ids in left.split(ANSWER_CHUNK):
                missing = run.ipc - sum(map(len, found))
                if not missing:
                    break
                right = (answers(run, experts, experts.at(k, -1), run.task.batch(ids)).argmax(1) == c).cpu()
                found.append(ids[right][:missing])
                wrong.append(ids[~right])
            left = torch.cat(wrong) if wrong else left[:0]
        chosen.append(torch.cat([*found, left])[: run.ipc])
    return torch.cat(chosen)


def agreed_logits(run: Run, experts: Experts, synthetic: SyntheticSet) -> Tensor:
    """Mean logits (N, classes) over the experts that recognise an image; over all of them where none does."""
    classes = synthetic.classes
    total = torch.zeros(len(classes), run.task.num_classes, device=classes.device)
    every, votes = torch.zeros_like(total), torch.zeros(len(classes), 1, device=classes.device)
    for k in range(experts.count):
        logits = about_the_set(run, experts, experts.at(k, -1), synthetic)
        right = (logits.argmax(1) == classes).float()[:, None]
        total, every, votes = total + right * logits, every + logits, votes + right
    return torch.where(votes > 0, total / votes.clamp(min=1), every / experts.count)


@method(
    "datm", config=DATM, year=2024, labels="soft", order=2, protocol="mtt-soft-v1",
    paper="Towards Lossless Dataset Distillation via Difficulty-Aligned Trajectory Matching",
)  # fmt: skip
def datm(task: Task, config: DATM, run: Run) -> SyntheticSet:
    """Matches FTD's experts from easy epochs to hard ones, with learned soft labels; late epochs suit large sets.

    When to use: for 10 images per class and more, where soft labels are allowed. Cost: FTD's experts, then steps of
    80 training steps each. Known failure: with few experts the labels know little; a comparison with hard labels alone
    is unfair, so judge it beside random images with labels of the same experts (``--teachers``).

    Guo, Wang, Cazenavette, Li, Zhang & You, ICLR 2024. Labels start as the mean logits of the experts that recognise an
    image, and are stepped with pixels and step size; a step whose matching loss exceeds ``gate`` is left out, and its
    gradients are not even computed. The published experts have 100 epochs, the last of which choose images and labels
    (buffer_epochs=100; by default experts end with the last epoch that is matched). Where no expert recognises an
    image, the released program divides by 0; here all are averaged.
    """
    experts = their_experts(config, run, "method datm")
    ids = recognised(task, run, experts) if config.init == "correct" else None
    synthetic = with_step_size(
        config, SyntheticSet.create(task, run.ipc, config, seed=run.seed, device=run.device, ids=ids)
    )
    synthetic.learn_labels(agreed_logits(run, experts, synthetic))
    synthetic.label_source = {
        "experts": experts.describe(),
        "epoch": experts.epochs,
        "rule": "learned from mean logits",
    }
    learner = Learner(config, run, synthetic, experts)
    gate = None if run.dry_run else config.gate  # a step that is left out would tell nothing of what steps cost
    for step, expert, epoch in walk(config, run, synthetic, experts, config.window):
        start, goal = experts.at(expert, epoch), experts.at(expert, epoch + config.expert_epochs)
        outcome = learner.unroll(learner.loss(step), start, [Target(config.syn_steps, goal)], gate)
        learner.descend(step, outcome)
    return synthetic
