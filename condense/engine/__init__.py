"""TODO-FACE condense/engine."""

from condense.engine.checkpoint import CHECKPOINT, PREVIOUS, VIEW_LABELS, VIEW_LABELS_STATE, Diverged, Interrupted
from condense.engine.optimizer import Group, SyntheticOptimizer
from condense.engine.run import Run, Step
from condense.engine.unrolling import GRAD_MODES, Outcome, StepLoss, Target, check, unroll

__all__ = [
    "CHECKPOINT",
    "GRAD_MODES",
    "PREVIOUS",
    "VIEW_LABELS",
    "VIEW_LABELS_STATE",
    "Diverged",
    "Group",
    "Interrupted",
    "Outcome",
    "Run",
    "Step",
    "StepLoss",
    "SyntheticOptimizer",
    "Target",
    "check",
    "unroll",
]
