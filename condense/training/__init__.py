"""The training loop for students, experts and teachers: configuration, data sources, checkpoints and accuracy."""

from condense.training.config import STUDENT_VERSION, Recipe, batch_ids, check_rule, steps_per_pass
from condense.training.loop import TEST_CHUNK, accuracy, pick_together, train
from condense.training.student import FixedSource, Source, Student, TaskSource, Update, Work

__all__ = [
    "STUDENT_VERSION",
    "TEST_CHUNK",
    "FixedSource",
    "Recipe",
    "Source",
    "Student",
    "TaskSource",
    "Update",
    "Work",
    "accuracy",
    "batch_ids",
    "check_rule",
    "pick_together",
    "steps_per_pass",
    "train",
]
