"""Evaluation: students trained on a set and on control arms under one protocol, and the record of the results."""

from condense.judge.downstream_checks import downstream, format_downstream
from condense.judge.evaluation import evaluate, fit
from condense.judge.protocol import MAX_RUNS, OWN, Protocol, get_protocol, protocols
from condense.judge.records import arm_name, environment, labels_of, read_record
from condense.judge.scoring import (
    REUSE_COUNTS,
    compute_scores,
    cross_architecture,
    is_augmented,
    main_entries,
    means_by_arm,
    summary,
    time_to_accuracy,
)

__all__ = [
    "MAX_RUNS",
    "OWN",
    "REUSE_COUNTS",
    "Protocol",
    "arm_name",
    "compute_scores",
    "cross_architecture",
    "downstream",
    "environment",
    "evaluate",
    "fit",
    "format_downstream",
    "get_protocol",
    "is_augmented",
    "labels_of",
    "main_entries",
    "means_by_arm",
    "protocols",
    "read_record",
    "summary",
    "time_to_accuracy",
]
