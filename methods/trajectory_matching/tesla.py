"""TODO-DOC."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from condense.data import Task
from condense.engine import Run, Target
from condense.labels import SoftLabels
from condense.methods.trajectory_matching.matching import Learner, about_the_set, their_experts, walk, with_step_size
from condense.methods.trajectory_matching.mtt import MTT
from condense.registry import method
from condense.sets import SyntheticSet

# -- TESLA ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TESLA(MTT):
    """Hyper-parameters of TESLA; those of CIFAR-10 at 1 image per class."""

    steps: int = 10_000
    """See MTT's."""
    syn_steps: int = 50
    """See MTT's."""
    max_start_epoch: int = 5
    """See MTT's."""
    lr_img: float = 500.0
    """Learning rate of the pixels for the exact formula; published as 1000 for half the formula (tesla_factor)."""
    lr_lr: float = 1e-7
    """See MTT's."""
    lr_start: float = 0.01
    """See MTT's."""
    grad_mode: str = "tesla"
    """See MTT's; adjoint gives the exact gradient at the same memory for about half as much time again."""
    assign_labels: bool = False
    """Soft labels: in each step the softmax of the expert that is to be reached (published for ImageNet-1K). Such a set
    is judged under protocol=mtt-soft-v1."""


@method(
    "tesla", config=TESLA, paper="Scaling Up Dataset Distillation to ImageNet-1K with Constant Memory", year=2023,
    order=2, protocol="mtt-v1",
)  # fmt: skip
def tesla(task: Task, config: TESLA, run: Run) -> SyntheticSet:
    """MTT with an approximate gradient that needs one training step's memory, and labels assigned by the expert.

    When to use: for sets of very many classes, by assign_labels=true; for memory alone MTT's exact gradient costs
    little more. Cost: as MTT's, without the derivatives in the weights. Known failure: the gradient leaves out what a
    step does to the gradients of later ones, so the more the student moves, the further it is from the exact one.

    Cui, Wang, Si & Hsieh, ICML 2023. The released program halves the pixels' gradient by a slip (tesla_factor=0.5). It
    evaluates with the labels that the last expert happened to give; here the set's final labels are the mean softmax of
    all experts at the last epoch that students are asked to reach.
    """
    experts = their_experts(config, run, "assign_labels=true" if config.assign_labels else "")
    synthetic = with_step_size(config, SyntheticSet.create(task, run.ipc, config, seed=run.seed, device=run.device))
    learner = Learner(config, run, synthetic, experts)
    for step, expert, epoch in walk(config, run, synthetic, experts):
        start, goal = experts.at(expert, epoch), experts.at(expert, epoch + config.expert_epochs)
        assigned = about_the_set(run, experts, goal, synthetic).softmax(1) if config.assign_labels else None
        outcome = learner.unroll(learner.loss(step, targets=assigned), start, [Target(config.syn_steps, goal)])
        learner.descend(step, outcome)
    if config.assign_labels:
        epoch = min(config.max_start_epoch - 1 + config.expert_epochs, experts.epochs)
        thetas = (experts.at(k, epoch) for k in range(experts.count))
        shares = [about_the_set(run, experts, theta, synthetic).softmax(1) for theta in thetas]
        synthetic.labels = SoftLabels(torch.stack(shares).mean(0).log())
        synthetic.label_source = {"experts": experts.describe(), "epoch": epoch, "rule": "mean softmax"}
    return synthetic
