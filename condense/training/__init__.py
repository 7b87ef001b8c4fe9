"""The training loop for students, experts and teachers: configuration, data sources, checkpoints and accuracy."""

from condense.training.config import (
    STUDENT_VERSION,
    TrainConfig,
    batch_ids,
    check_batch_norm_group,
    check_optimizer,
    epoch_steps,
)
from condense.training.loop import TEST_CHUNK, accuracy, correct_by_class, prefers_stacked, train
from condense.training.probe import fit_linear_probe
from condense.training.student import (
    FixedSource,
    GradientRule,
    ResampledSource,
    Source,
    Student,
    TaskSource,
    TrainingStep,
)

__all__ = [
    "STUDENT_VERSION",
    "TEST_CHUNK",
    "FixedSource",
    "GradientRule",
    "ResampledSource",
    "Source",
    "Student",
    "TaskSource",
    "TrainConfig",
    "TrainingStep",
    "accuracy",
    "batch_ids",
    "check_batch_norm_group",
    "check_optimizer",
    "correct_by_class",
    "epoch_steps",
    "fit_linear_probe",
    "prefers_stacked",
    "train",
]
