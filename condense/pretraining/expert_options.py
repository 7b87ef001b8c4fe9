"""Settings of methods that follow expert trajectories."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

from condense.augment import make_augmentation
from condense.data import Task
from condense.pretraining.trajectories import ExpertTraining
from condense.training import TrainConfig


@dataclass(frozen=True)
class ExpertOptions:
    """Settings of the experts and of the trajectory segments that students follow; mixed into a method's own."""

    experts: str = ""
    """File of `condense experts`; by default the cache is searched, and missing experts are trained."""
    num_experts: int = 100
    """Number of experts, at most as many as a given file has."""
    buffer_epochs: int | None = None
    """Epochs of an expert's training; by default up to the last epoch that is matched."""
    expert_lr: float = 0.01
    """Learning rate of the experts' SGD."""
    expert_momentum: float = 0.0
    """Momentum of the experts' SGD."""
    expert_decay: float = 0.0
    """Weight decay of the experts."""
    expert_batch: int = 256
    """Real images in each training step of an expert."""
    augment: str = "color_crop_cutout_flip_scale_rotate"
    """DSA operations joined by _, or none, of experts and students; one per step, its parameters per image."""
    expert_epochs: int = 2
    """Epochs of the expert in a segment (the paper's M)."""
    max_start_epoch: int = 20
    """Segments start at epochs of the expert below this (T+)."""
    min_start_epoch: int = 0
    """Segments start at this epoch or later."""

    def expert_ranges(self) -> dict[str, tuple[float, float]]:
        """For ``__post_init__``: the ranges of these settings, as ``require`` takes them."""
        largest = sys.float_info.max
        return {
            "num_experts": (1, math.inf),
            "buffer_epochs": (self.min_start_epoch + self.expert_epochs, math.inf),
            "expert_lr": (0, largest),
            "expert_momentum": (0, 1),
            "expert_decay": (0, largest),
            "expert_batch": (1, math.inf),
            "expert_epochs": (1, math.inf),
            "min_start_epoch": (0, math.inf),
            "max_start_epoch": (self.min_start_epoch + 1, math.inf),
        }

    def epochs_needed(self) -> int:
        """Epochs of an expert that are trained: up to the last one that is matched, or ``buffer_epochs``."""
        return self.buffer_epochs or self.max_start_epoch - 1 + self.expert_epochs

    def epochs_read(self) -> tuple[int, int]:
        """The first and the last epoch at which students start or that they are matched with."""
        return self.min_start_epoch, min(self.max_start_epoch - 1 + self.expert_epochs, self.epochs_needed())

    def expert_training(self, task: Task) -> ExpertTraining:
        """The experts' training: SGD at a constant rate, by default plain, so that students without momentum follow."""
        recipe = TrainConfig(
            steps=0,
            batch=self.expert_batch,
            lr=self.expert_lr,
            momentum=self.expert_momentum,
            weight_decay=self.expert_decay,
            lr_milestones=(),
            augment=make_augmentation(self.augment, mirror=task.mirror),
        )
        return ExpertTraining(recipe)
