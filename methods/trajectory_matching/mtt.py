"""MTT: matching training trajectories."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any

from condense.config import require_one_of, require_range
from condense.data import Task
from condense.engine import ParamGroup, Run, Target, check_unroll_options
from condense.methods.trajectory_matching.matching import (
    UnrolledStudent,
    apply_update,
    check_step_size,
    draw_segment,
    get_experts,
    step_size_group,
)
from condense.pretraining import ExpertOptions
from condense.registry import method
from condense.sets import SyntheticOptions, SyntheticSet


@dataclass(frozen=True)
class MTT(SyntheticOptions, ExpertOptions):
    """Hyper-parameters of MTT; the defaults are those that reproduce CIFAR-10 at 10 images per class."""

    steps: int = 5000
    """Outer steps, each a student's training along one segment of one expert's trajectory."""
    syn_steps: int = 30
    """Training steps of the student in each outer step (the paper's N)."""
    batch_syn: int | None = None
    """Synthetic images in each training step of the student; all of them by default."""
    lr_img: float = 100.0
    """Learning rate of the pixels."""
    lr_lr: float = 1e-5
    """Learning rate of the student's step size."""
    lr_start: float = 0.001
    """Initial step size of the student (alpha)."""
    step_size: str = "positive"
    """positive bends steps down so that it stays above 0; raw lets it become negative, as released."""
    momentum: float = 0.5
    """Momentum of pixels and step size."""
    grad_mode: str = "adjoint"
    """adjoint (exact, memory of one training step), graph (exact, memory of all of them) or tesla (omits the effect of
    a step on the gradients of later ones)."""
    tesla_factor: float = 1.0
    """Factor on the pixels' gradient where grad_mode=tesla; 0.5 as released."""
    inner_optimizer: str = "sgd"
    """Optimiser of the student: sgd, or one that `higher` supports, such as adam (grad_mode=graph only)."""
    inner_momentum: float = 0.0
    """Momentum of the student's SGD."""

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = dict.fromkeys(("steps", "syn_steps", "batch_syn"), (1, math.inf))
        factors = dict.fromkeys(("lr_img", "lr_lr", "tesla_factor"), (0, sys.float_info.max))
        shares = dict.fromkeys(("momentum", "inner_momentum"), (0, 1))
        require_range(self, **counts, **factors, **shares, lr_start=(1e-12, sys.float_info.max), **self.expert_ranges())
        require_one_of(self, step_size=("positive", "raw"))
        check_unroll_options(self.grad_mode, self.inner_optimizer, self.inner_momentum)

    def unroll_options(self) -> dict[str, Any]:
        """Keyword arguments of ``unroll``."""
        return {
            "grad_mode": self.grad_mode,
            "momentum": self.inner_momentum,
            "factor": self.tesla_factor,
            "optimizer": self.inner_optimizer,
        }


@method(
    "mtt",
    config=MTT,
    paper="Dataset Distillation by Matching Training Trajectories",
    year=2022,
    order=2,
    protocol="mtt-v1",
    pretrains="experts",
)
def mtt(task: Task, config: MTT, run: Run) -> SyntheticSet:
    """Matches a student's weights after steps on the synthetic set to an expert's weights after epochs on real data.

    When to use: the highest accuracy of methods with hard labels, if experts can be afforded. Cost: experts are trained
    on the real data first (cached, and shared by runs), then a step is ``syn_steps`` training steps on the set and as
    many double backwards, in the memory of one of them. Known failure: if the pixel learning rate is too high for N,
    batch and network, the loss exceeds 1 (that of a student that does not move) and then explodes.

    Cazenavette, Wang, Torralba, Efros & Zhu, CVPR 2022. The loss is |theta_N - goal|^2 / |start - goal|^2 over all
    weights. Gradients are exact (grad_mode=adjoint equals graph). Released: chunks of the set are taken from the end of
    a permutation, the step size may become negative (step_size=raw), sets are picked by test accuracy; here the last
    set is kept. Labels are those of the images; the learned step size is stored in the set. Ranks share the training of
    experts, but each repeats the distillation. Networks with BatchNorm are trained with the statistics of the batch.
    """
    experts = get_experts(config, run)
    synthetic = SyntheticSet.create(task, run.ipc, config, seed=run.seed, device=run.device)
    synthetic.learn_step_size(config.lr_start)
    student = UnrolledStudent(config, run, synthetic, experts)
    images = ParamGroup(lr=config.lr_img, momentum=config.momentum)
    for step in run.optimise(synthetic, config.steps, images=images, step_size=step_size_group(config)):
        expert, epoch = draw_segment(config, run, experts, step.index)
        start, goal = experts.params_at(expert, epoch), experts.params_at(expert, epoch + config.expert_epochs)
        outcome = student.unroll(student.loss(step), start, [Target(config.syn_steps, goal)])
        apply_update(step, outcome)
    check_step_size(config, run, synthetic)
    return synthetic
