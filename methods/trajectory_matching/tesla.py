"""TESLA: trajectory matching with constant memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from condense.data import Task
from condense.engine import ParamGroup, Run, Target
from condense.labels import SoftLabels
from condense.methods.trajectory_matching.matching import (
    UnrolledStudent,
    apply_update,
    check_step_size,
    compute_set_logits,
    draw_segment,
    get_experts,
    step_size_group,
)
from condense.methods.trajectory_matching.settings import MTT
from condense.registry import method
from condense.sets import SyntheticSet


@dataclass(frozen=True)
class TESLA(MTT):
    """Hyper-parameters of TESLA; those of CIFAR-10 at 1 image per class."""

    steps: int = 10_000
    syn_steps: int = 50
    max_start_epoch: int = 5
    lr_img: float = 500.0
    """Learning rate of the pixels for the exact formula; published as 1000 for half the formula (tesla_factor)."""
    lr_lr: float = 1e-7
    lr_start: float = 0.01
    grad_mode: str = "tesla"
    """{inherited} adjoint gives the exact gradient at the same memory for about half as much time again."""
    assign_labels: bool = False
    """Soft labels: in each step the softmax of the expert at the end of the segment (published for ImageNet-1K). Such
    a set is evaluated under protocol=mtt-soft-v1."""


@method(
    "tesla",
    config=TESLA,
    paper="Scaling Up Dataset Distillation to ImageNet-1K with Constant Memory",
    year=2023,
    order=2,
    protocol="mtt-v1",
    pretrains="experts",
)
def tesla(task: Task, config: TESLA, run: Run) -> SyntheticSet:
    """MTT with an approximate gradient in the memory of one training step, and soft labels assigned by the expert.

    When to use: for sets of very many classes, by assign_labels=true; for memory alone MTT's exact gradient costs
    little more. Cost: as MTT's, without the derivatives in the weights. Known failure: the gradient omits the effect of
    a step on the gradients of later ones, so its error grows with the distance that the student moves.

    Cui, Wang, Si & Hsieh, ICML 2023. The released program halves the pixels' gradient by mistake (tesla_factor=0.5). It
    evaluates with the labels that the last expert assigned; here the set's final labels are the mean softmax of all
    experts at the last epoch that is matched.
    """
    experts = get_experts(config, run, "assign_labels=true" if config.assign_labels else "")
    synthetic = SyntheticSet.create(task, run.ipc, config, seed=run.seed, device=run.device)
    synthetic.learn_step_size(config.lr_start)
    student = UnrolledStudent(config, run, synthetic, experts)
    images = ParamGroup(lr=config.lr_img, momentum=config.momentum)
    for step in run.optimise(synthetic, config.steps, images=images, step_size=step_size_group(config)):
        expert, epoch = draw_segment(config, run, experts, step.index)
        start, goal = experts.params_at(expert, epoch), experts.params_at(expert, epoch + config.expert_epochs)
        labels = compute_set_logits(run, experts, goal, synthetic).softmax(1) if config.assign_labels else None
        outcome = student.unroll(student.loss(step, targets=labels), start, [Target(config.syn_steps, goal)])
        apply_update(step, outcome)
    check_step_size(config, run, synthetic)
    if config.assign_labels:
        epoch = min(config.max_start_epoch - 1 + config.expert_epochs, experts.epochs)
        weights = (experts.params_at(k, epoch) for k in range(experts.count))
        probabilities = [compute_set_logits(run, experts, theta, synthetic).softmax(1) for theta in weights]
        synthetic.labels = SoftLabels(torch.stack(probabilities).mean(0).log())
        synthetic.label_source = {"experts": experts.describe(), "epoch": epoch, "rule": "mean softmax"}
    return synthetic
