"""Settings of MTT, from which those of its family derive."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any

from condense.config import require_one_of, require_range
from condense.engine import check_unroll_options
from condense.pretraining import ExpertOptions
from condense.sets import SyntheticOptions


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
