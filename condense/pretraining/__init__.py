"""Networks trained on the real data before a method distils: snapshots, experts, teachers, and scores of images."""

from condense.pretraining.budget import PLAN_FILE, TrainingPlan, measure_step_seconds, plan_training
from condense.pretraining.committee import (
    Committee,
    committee_of,
    find_teachers,
    get_committee,
    load_or_train_teachers,
    load_teacher_ensemble,
    require_batch_norm,
)
from condense.pretraining.expert_options import ExpertOptions
from condense.pretraining.experts import (
    Experts,
    choose_placement,
    find_experts,
    load_expert_ensemble,
    load_experts,
    load_or_train_experts,
)
from condense.pretraining.features import load_or_compute_features
from condense.pretraining.pipeline import Architecture, iter_training_groups, make_student
from condense.pretraining.scoring import ScoreOptions, load_or_train_scores
from condense.pretraining.snapshots import SnapshotOptions, Snapshots, load_or_train_snapshots
from condense.pretraining.store import ContentGuard, TrainedFile, parts_folder, transform_digests
from condense.pretraining.teachers import (
    DEFAULT_TEACHER_NETWORK,
    OBJECTIVES,
    BarlowOptions,
    TeacherOptions,
    TeacherTraining,
    teacher_cache_file,
    train_teacher_file,
)
from condense.pretraining.trajectories import (
    MAX_EXPERT_GROUP,
    TRAJECTORY_DTYPES,
    TRAJECTORY_FORMAT,
    ExpertTraining,
    TrajectoryFile,
    expert_cache_file,
    expert_cache_key_fields,
    read_trajectory_file,
    train_trajectory_file,
    trajectory_nbytes,
    write_trajectory_file,
)

__all__ = [
    "DEFAULT_TEACHER_NETWORK",
    "MAX_EXPERT_GROUP",
    "OBJECTIVES",
    "PLAN_FILE",
    "TRAJECTORY_DTYPES",
    "TRAJECTORY_FORMAT",
    "Architecture",
    "BarlowOptions",
    "Committee",
    "ContentGuard",
    "ExpertOptions",
    "ExpertTraining",
    "Experts",
    "ScoreOptions",
    "SnapshotOptions",
    "Snapshots",
    "TeacherOptions",
    "TeacherTraining",
    "TrainedFile",
    "TrainingPlan",
    "TrajectoryFile",
    "choose_placement",
    "committee_of",
    "expert_cache_file",
    "expert_cache_key_fields",
    "find_experts",
    "find_teachers",
    "get_committee",
    "iter_training_groups",
    "load_expert_ensemble",
    "load_experts",
    "load_or_compute_features",
    "load_or_train_experts",
    "load_or_train_scores",
    "load_or_train_snapshots",
    "load_or_train_teachers",
    "load_teacher_ensemble",
    "make_student",
    "measure_step_seconds",
    "parts_folder",
    "plan_training",
    "read_trajectory_file",
    "require_batch_norm",
    "teacher_cache_file",
    "train_teacher_file",
    "train_trajectory_file",
    "trajectory_nbytes",
    "transform_digests",
    "write_trajectory_file",
]
