"""What a method runs on: Run and Step, the optimizer of synthetic sets, checkpoints, gradients of unrolled training."""

from condense.engine.checkpoint import (
    CHECKPOINT_FILE,
    PREVIOUS_CHECKPOINT_FILE,
    VIEW_LABELS_FILE,
    VIEW_LABELS_STATE_FILE,
    Diverged,
    Interrupted,
)
from condense.engine.optimizer import ParamGroup, SyntheticOptimizer
from condense.engine.real_batches import BATCH_DEFAULTS, BATCHES, RealBatches, RealBatchOptions
from condense.engine.run import Run, Step, copy_state
from condense.engine.unrolling import (
    GRAD_MODES,
    BatchLoss,
    NetworkLoss,
    StepLoss,
    Target,
    UnrollResult,
    check_unroll_options,
    unroll,
)

__all__ = [
    "BATCHES",
    "BATCH_DEFAULTS",
    "CHECKPOINT_FILE",
    "GRAD_MODES",
    "PREVIOUS_CHECKPOINT_FILE",
    "VIEW_LABELS_FILE",
    "VIEW_LABELS_STATE_FILE",
    "BatchLoss",
    "Diverged",
    "Interrupted",
    "NetworkLoss",
    "ParamGroup",
    "RealBatchOptions",
    "RealBatches",
    "Run",
    "Step",
    "StepLoss",
    "SyntheticOptimizer",
    "Target",
    "UnrollResult",
    "check_unroll_options",
    "copy_state",
    "unroll",
]
