"""TODO-DOC."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any

from condense.augment import dsa
from condense.config import one_of, require
from condense.data import Task
from condense.engine import Group, Run, Target, check
from condense.methods.trajectory_matching.matching import Learner, their_experts, walk, with_step_size
from condense.pretraining import Training
from condense.registry import method
from condense.sets import SyntheticOptions, SyntheticSet
from condense.training import Recipe

# -- settings that all share ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MTT(SyntheticOptions):
    """Hyper-parameters of MTT; the defaults are those that reproduce CIFAR-10 at 10 images per class."""

    steps: int = 5000
    """Outer steps, each a student's training along one stretch of one expert."""
    syn_steps: int = 30
    """Training steps of the student in each outer step (the paper's N)."""
    expert_epochs: int = 2
    """Epochs of the expert that these steps shall equal (the paper's M)."""
    max_start_epoch: int = 20
    """Students start at epochs of the expert below this (T+)."""
    min_start_epoch: int = 0
    """Students start at this epoch or later."""
    batch_syn: int | None = None
    """Images of the set in each training step of the student; all of them by default."""
    lr_img: float = 100.0
    """Learning rate of the pixels."""
    lr_lr: float = 1e-5
    """Learning rate of the student's step size."""
    lr_start: float = 0.001
    """Step size of the student at the start (alpha)."""
    step_size: str = "positive"
    """positive bends steps down so that it stays above 0; raw lets it become negative, as released."""
    momentum: float = 0.5
    """Momentum of pixels and step size."""
    augment: str = "color_crop_cutout_flip_scale_rotate"
    """DSA operations joined by _, or none, of experts and students; one a step, its parameters per image."""
    grad_mode: str = "adjoint"
    """adjoint (exact, memory of one training step), graph (exact, memory of all of them) or tesla (without what a step
    does to the gradients of later ones)."""
    tesla_factor: float = 1.0
    """Factor on the pixels' gradient where grad_mode=tesla; 0.5 as released."""
    inner_optimizer: str = "sgd"
    """Optimiser of the student: sgd, or one that `higher` knows, such as adam (grad_mode=graph only)."""
    inner_momentum: float = 0.0
    """Momentum of the student's SGD."""
    experts: str = ""
    """File of `condense experts`; by default the cache is searched, and what it lacks is trained."""
    num_experts: int = 100
    """Experts, at most as many as a given file has."""
    buffer_epochs: int | None = None
    """Epochs of an expert's training; by default as many as are read."""
    expert_lr: float = 0.01
    """Learning rate of the experts' SGD."""
    expert_momentum: float = 0.0
    """Momentum of the experts."""
    expert_decay: float = 0.0
    """Weight decay of the experts."""
    expert_batch: int = 256
    """Real images in each training step of an expert."""

    def __post_init__(self) -> None:
        super().__post_init__()
        largest = sys.float_info.max
        require(
            self, steps=(1, math.inf), syn_steps=(1, math.inf), expert_epochs=(1, math.inf),
            min_start_epoch=(0, math.inf), max_start_epoch=(self.min_start_epoch + 1, math.inf),
            batch_syn=(1, math.inf), lr_img=(0, largest), lr_lr=(0, largest), lr_start=(1e-12, largest),
            momentum=(0, 1), tesla_factor=(0, largest), inner_momentum=(0, 1), num_experts=(1, math.inf),
            buffer_epochs=(self.min_start_epoch + self.expert_epochs, math.inf), expert_lr=(0, largest),
            expert_momentum=(0, 1), expert_decay=(0, largest), expert_batch=(1, math.inf),
        )  # fmt: skip
        one_of(self, step_size=("positive", "raw"))
        check(self.grad_mode, self.inner_optimizer, self.inner_momentum)

    def epochs_needed(self) -> int:
        """Epochs of an expert that are trained: up to the last one that a student is compared with."""
        return self.buffer_epochs or self.max_start_epoch - 1 + self.expert_epochs

    def epochs_read(self) -> tuple[int, int]:
        """The first and the last epoch that students start from or are compared with."""
        return self.min_start_epoch, min(self.max_start_epoch - 1 + self.expert_epochs, self.epochs_needed())

    def training(self, task: Task) -> Training:
        """How the experts are trained: plain SGD at a constant rate, so that students without momentum can follow."""
        recipe = Recipe(
            steps=0, batch=self.expert_batch, lr=self.expert_lr, momentum=self.expert_momentum,
            weight_decay=self.expert_decay, drops=(), augment=dsa(self.augment, mirror=task.mirror),
        )  # fmt: skip
        return Training(recipe, None, None)

    def groups(self) -> dict[str, Any]:
        """How what is learned is stepped, a :class:`Group` for each tensor."""
        return {
            "images": Group(lr=self.lr_img, momentum=self.momentum),
            "step_size": Group(lr=self.lr_lr, momentum=self.momentum, positive=self.step_size == "positive"),
        }

    def unrolling(self) -> dict[str, Any]:
        """Keywords of ``unroll``."""
        return {
            "grad_mode": self.grad_mode, "momentum": self.inner_momentum, "factor": self.tesla_factor,
            "optimizer": self.inner_optimizer,
        }  # fmt: skip


# -- MTT --------------------------------------------------------------------------------------------------------------


@method(
    "mtt", config=MTT, paper="Dataset Distillation by Matching Training Trajectories", year=2022, order=2,
    protocol="mtt-v1",
)  # fmt: skip
def mtt(task: Task, config: MTT, run: Run) -> SyntheticSet:
    """Trains a student from an expert's epoch on the set and asks it to land where the expert was epochs later.

    When to use: the highest accuracy of methods with hard labels, where experts can be afforded. Cost: experts are
    trained on the real data first (kept, and shared by runs), then a step is ``syn_steps`` training steps on the set
    and as many double backwards; memory is that of one of them. Known failure: a pixel learning rate that is too high
    for N, batch and network makes the loss exceed 1 (not better than standing still) and then explode.

    Cazenavette, Wang, Torralba, Efros & Zhu, CVPR 2022. The loss is |theta_N - goal|^2 / |start - goal|^2 over all
    weights. Gradients are exact (grad_mode=adjoint equals graph). Released: chunks of the set are taken from the end of
    a permutation, the step size may become negative (step_size=raw), sets are picked by test accuracy; here the last
    set is kept. Labels are those of the images; the learned step size travels in the set. Ranks share the training of
    experts, but each repeats the distilling. Networks with running statistics are trained by the batch's own.
    """
    experts = their_experts(config, run)
    synthetic = with_step_size(config, SyntheticSet.create(task, run.ipc, config, seed=run.seed, device=run.device))
    learner = Learner(config, run, synthetic, experts)
    for step, expert, epoch in walk(config, run, synthetic, experts):
        start, goal = experts.at(expert, epoch), experts.at(expert, epoch + config.expert_epochs)
        outcome = learner.unroll(learner.loss(step), start, [Target(config.syn_steps, goal)])
        learner.descend(step, outcome)
    return synthetic
