"""TODO-DOC."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from condense import rng
from condense.config import one_of, require
from condense.data import Task
from condense.engine import Run, Target
from condense.methods.trajectory_matching.expert_updates import Smooth
from condense.methods.trajectory_matching.matching import (
    ANSWER_CHUNK,
    Learner,
    answers,
    their_experts,
    walk,
    with_step_size,
)
from condense.methods.trajectory_matching.mtt import MTT
from condense.pretraining import Experts, Training
from condense.registry import method
from condense.sets import INITS, SyntheticSet, central_rows

# -- AST --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AST(MTT):
    """Hyper-parameters of AST: its options as the authors' readme has them, MTT's rates."""

    init: str = "representative"
    """How images start: representative (nearest to the centroids of the class in an expert's logits), or as DM's."""
    lr_start: float = 0.01
    """See MTT's."""
    inner_momentum: float = 0.9
    """Momentum of the student's SGD, as the experts have it."""
    balance: bool = True
    """Weigh the student's loss by its start: more for late starts, less for early ones."""
    intermediate: str = "agg"
    """Epochs on the way that the student is compared with too: none, agg (each counts 1) or adaptive (later ones count
    more)."""
    perturb: float = 1.0
    """Length of the random direction by which the convolutions' weights are multiplied at the start; 0 for none."""
    buffer_epochs: int | None = 50
    """See MTT's; the experts' learning rate drops after half of them."""
    expert_lr: float = 0.003
    """See MTT's."""
    expert_momentum: float = 0.9
    """See MTT's."""
    expert_decay: float = 1e-3
    """See MTT's."""
    penalty: float = 2.0
    """Weight of the experts' input-gradient penalty; 0 for none."""
    warm_loss: bool = True
    """Whether the experts' loss counts half in the first epoch and grows to its full weight over ten."""

    inits: ClassVar[tuple[str, ...]] = (*INITS, "representative")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, perturb=(0, sys.float_info.max), penalty=(0, sys.float_info.max))
        one_of(self, intermediate=BETAS)

    def training(self, task: Task) -> Training:
        """SGD with momentum and one drop, on a loss that is kept smooth; in float32 for its second derivative."""
        recipe, epochs = super().training(task).recipe, self.epochs_needed()
        recipe = dataclasses.replace(recipe, drops=((epochs // 2 + 1) / epochs,), drop_factor=0.6)
        return Training(recipe, Smooth(self.penalty, self.warm_loss), "fp32")


BETAS: dict[str, Callable[[int, int], float]] = {
    "none": lambda k, count: 0.0,
    "agg": lambda k, count: 1.0,
    "adaptive": lambda k, count: k / (1 + count),
}
"""Weight of match k (from 1) of ``count`` intermediate ones."""


def start_weight(epoch: int, max_start_epoch: int) -> float:
    """AST's weight of the student's loss: log5(8 + epochs past the middle start), or one over it before the middle."""
    past = epoch - max_start_epoch // 2
    weight = math.log(abs(past) + 8, 5)
    return weight if past >= 0 else 1 / weight


def on_the_way(config: AST, experts: Experts, expert: int, epoch: int) -> list[Target]:
    """The weights that the student is compared with: those of the last epoch, and of the epochs before it."""
    last, between = config.expert_epochs, config.expert_epochs - 1
    stride = config.syn_steps // last
    found = [Target(config.syn_steps, experts.at(expert, epoch + last))]
    for k in range(1, last):
        weight = BETAS[config.intermediate](k, between)
        if weight and stride:
            found.append(Target(k * stride, experts.at(expert, epoch + k), weight))
    return found


def perturbed(start: Tensor, experts: Experts, length: float, key: Sequence[int | str]) -> Tensor:
    """Flat weights (P,) with each convolution's W become W + length * D / |D| * W, D normal."""
    if not length:
        return start
    moved, generator = start.clone(), rng.generator(*key)
    for weight in experts.layout.unflatten(moved).values():
        if weight.dim() == 4:
            direction = torch.randn(weight.shape, generator=generator).to(weight.device)
            weight.mul_(1 + length * direction / direction.norm())
    return moved


def representative(task: Task, run: Run, experts: Experts) -> Tensor:
    """Ids of the real images nearest to ``ipc`` k-means centroids of each class, in the logits of a random expert."""
    expert = int(rng.Draws(run.seed, "init", "expert").integers(experts.count, 1))
    chosen = []
    for c in range(task.num_classes):
        members = torch.from_numpy(task.class_ids(c))
        logits = torch.cat(
            [answers(run, experts, experts.at(expert, -1), run.task.batch(ids)) for ids in members.split(ANSWER_CHUNK)]
        )
        chosen.append(members[central_rows(logits, run.ipc, rng.key(run.seed, "init", "representative", c))])
    return torch.cat(chosen)


@method(
    "ast", config=AST, year=2023, order=2, protocol="mtt-v1",
    paper="Efficient Dataset Distillation through Alignment with Smooth and High-Quality Expert Trajectories",
)  # fmt: skip
def ast(task: Task, config: AST, run: Run) -> SyntheticSet:
    """MTT along experts trained with momentum and kept smooth, by students that are perturbed and matched on the way.

    When to use: where better experts than MTT's are wanted. Cost: experts take about four times MTT's time (a double
    backward in each step); distilling as MTT. Known failure: the released program does not run as it is, so its numbers
    are unverified; momentum makes early students overshoot (lower lr_start).

    Shen, Yang & Lam, 2023. Representative images are found for any ipc: the released program takes ipc / 10 images for
    each of 10 centroids, none at 1 image per class. It loses the experts' momentum where their rate drops; here that
    stays.
    """
    experts = their_experts(config, run, "init=representative" if config.init == "representative" else "")
    ids = representative(task, run, experts) if config.init == "representative" else None
    synthetic = with_step_size(
        config, SyntheticSet.create(task, run.ipc, config, seed=run.seed, device=run.device, ids=ids)
    )
    learner = Learner(config, run, synthetic, experts)
    passed = () if config.intermediate == "none" else range(1, config.expert_epochs)
    for step, expert, epoch in walk(config, run, synthetic, experts, passed=passed):
        start = perturbed(experts.at(expert, epoch), experts, config.perturb, step.key("perturb"))
        weight = start_weight(epoch, config.max_start_epoch) if config.balance else 1.0
        targets = on_the_way(config, experts, expert, epoch)
        learner.descend(step, learner.unroll(learner.loss(step, weight=weight), start, targets))
    return synthetic
