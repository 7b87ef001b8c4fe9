"""AST: alignment with smooth, high-quality expert trajectories."""

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
from condense.config import require_one_of, require_range
from condense.data import Task
from condense.device import upload
from condense.engine import ParamGroup, Run, Target
from condense.methods.trajectory_matching.expert_updates import Smooth
from condense.methods.trajectory_matching.matching import (
    LOGIT_CHUNK,
    UnrolledStudent,
    apply_update,
    check_step_size,
    compute_expert_logits,
    draw_segment,
    get_experts,
    step_size_group,
)
from condense.methods.trajectory_matching.settings import MTT
from condense.pretraining import Experts, ExpertTraining
from condense.registry import method
from condense.selection import nearest_to_centroids
from condense.sets import INITS, SyntheticSet

INTERMEDIATE_WEIGHTS: dict[str, Callable[[int, int], float]] = {
    "none": lambda k, count: 0.0,
    "agg": lambda k, count: 1.0,
    "adaptive": lambda k, count: k / (1 + count),
}
"""Weight of match k (from 1) of ``count`` intermediate ones."""


@dataclass(frozen=True)
class AST(MTT):
    """Hyper-parameters of AST: its options as the authors' readme has them, MTT's rates."""

    init: str = "representative"
    """{inherited} representative: nearest to the centroids of the class in an expert's logits."""
    lr_start: float = 0.01
    inner_momentum: float = 0.9
    """{inherited} The experts have the same."""
    balance: bool = True
    """Weigh the student's loss by its start: more for late starts, less for early ones."""
    intermediate: str = "agg"
    """Intermediate epochs that the student is matched with too: none, agg (each counts 1) or adaptive (later ones count
    more)."""
    perturb: float = 1.0
    """Length of the random direction by which the convolutions' weights are multiplied at the start; 0 for none."""
    buffer_epochs: int | None = 50
    """{inherited} The experts' learning rate drops after half of them."""
    expert_lr: float = 0.003
    expert_momentum: float = 0.9
    expert_decay: float = 1e-3
    penalty: float = 2.0
    """Weight of the experts' input-gradient penalty; 0 for none."""
    warm_loss: bool = True
    """Whether the experts' loss counts half in the first epoch and grows to its full weight over ten."""

    inits: ClassVar[tuple[str, ...]] = (*INITS, "representative")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self, perturb=(0, sys.float_info.max), penalty=(0, sys.float_info.max))
        require_one_of(self, intermediate=INTERMEDIATE_WEIGHTS)

    def expert_training(self, task: Task) -> ExpertTraining:
        """SGD with momentum and one milestone, on a smooth loss; in float32 because of its second derivative."""
        recipe, epochs = super().expert_training(task).recipe, self.epochs_needed()
        milestone = min(1.0, (epochs // 2 + 2) / epochs)  # as released, after the epoch with the index epochs // 2 + 1
        recipe = dataclasses.replace(recipe, lr_milestones=(milestone,), lr_gamma=0.6)
        return ExpertTraining(recipe, Smooth(self.penalty, self.warm_loss), "fp32")


def start_weight(epoch: int, max_start_epoch: int) -> float:
    """Weight of the student's loss: log5(8 + epochs after the middle start), or one over it before the middle."""
    past = epoch - max_start_epoch // 2
    weight = math.log(abs(past) + 8, 5)
    return weight if past >= 0 else 1 / weight


def make_targets(config: AST, experts: Experts, expert: int, epoch: int) -> list[Target]:
    """Weights that the student is matched with: those of the segment's last epoch and of the epochs before it."""
    last, between = config.expert_epochs, config.expert_epochs - 1
    stride = config.syn_steps // last
    targets = [Target(config.syn_steps, experts.params_at(expert, epoch + last))]
    for k in range(1, last):
        weight = INTERMEDIATE_WEIGHTS[config.intermediate](k, between)
        if weight and stride:
            targets.append(Target(k * stride, experts.params_at(expert, epoch + k), weight))
    return targets


def perturb_convolutions(start: Tensor, experts: Experts, length: float, key: Sequence[int | str]) -> Tensor:
    """Flat weights (P,) where each convolution's W becomes W + length * D / |D| * W, with D normal."""
    if not length:
        return start
    moved, generator = start.clone(), rng.generator(*key)
    for weight in experts.layout.unflatten(moved).values():
        if weight.dim() == 4:
            direction = upload(torch.randn(weight.shape, generator=generator), weight.device)
            weight.mul_(1 + length * direction / direction.norm())
    return moved


def select_representatives(task: Task, run: Run, experts: Experts) -> Tensor:
    """Ids of the real images nearest to ``ipc`` k-means centroids of each class, in the logits of a random expert."""
    expert = int(rng.Draws(run.seed, "init", "expert").integers(experts.count, 1))
    chosen = []
    for c in range(task.num_classes):
        members = torch.from_numpy(task.class_ids(c))
        chunks = [run.task.batch(ids) for ids in members.split(LOGIT_CHUNK)]
        logits = torch.cat(
            [compute_expert_logits(run, experts, experts.params_at(expert, -1), images) for images in chunks]
        )
        chosen.append(members[nearest_to_centroids(logits, run.ipc, rng.key(run.seed, "init", "representative", c))])
    return torch.cat(chosen)


@method(
    "ast",
    config=AST,
    paper="Efficient Dataset Distillation through Alignment with Smooth and High-Quality Expert Trajectories",
    year=2023,
    order=2,
    protocol="mtt-v1",
    pretrains="experts",
)
def ast(task: Task, config: AST, run: Run) -> SyntheticSet:
    """MTT with experts of a gradient penalty, perturbed initial student weights and matches at intermediate epochs.

    When to use: if better experts than MTT's are needed. Cost: experts take about four times MTT's time (a double
    backward in each step); distillation as MTT. Known failure: the released program does not run as it is, so its
    numbers are unverified; momentum makes early students overshoot (lower lr_start).

    Shen, Yang & Lam, 2023. Representative images are selected for any ipc: the released program takes ipc / 10 images
    for each of 10 centroids, none at 1 image per class. It resets the experts' momentum at the milestone; here it is
    kept.
    """
    experts = get_experts(config, run, "init=representative" if config.init == "representative" else "")
    ids = select_representatives(task, run, experts) if config.init == "representative" else None
    synthetic = SyntheticSet.create(task, run.ipc, config, seed=run.seed, device=run.device, ids=ids)
    synthetic.learn_step_size(config.lr_start)
    student = UnrolledStudent(config, run, synthetic, experts)
    between = () if config.intermediate == "none" else range(1, config.expert_epochs)
    images = ParamGroup(lr=config.lr_img, momentum=config.momentum)
    for step in run.optimise(synthetic, config.steps, images=images, step_size=step_size_group(config)):
        expert, epoch = draw_segment(config, run, experts, step.index, between=between)
        start = perturb_convolutions(experts.params_at(expert, epoch), experts, config.perturb, step.key("perturb"))
        weight = start_weight(epoch, config.max_start_epoch) if config.balance else 1.0
        targets = make_targets(config, experts, expert, epoch)
        outcome = student.unroll(student.loss(step, weight=weight), start, targets)
        apply_update(step, outcome)
    check_step_size(config, run, synthetic)
    return synthetic
