"""TODO-FACE condense/pretraining."""

from condense.pretraining.budget import PLAN, groups
from condense.pretraining.committee import Committee, require_batch_norm
from condense.pretraining.expert_options import ExpertOptions
from condense.pretraining.experts import Experts, residency
from condense.pretraining.snapshots import OwnNetworks
from condense.pretraining.store import parts_of
from condense.pretraining.teachers import Architecture, TeacherOptions
from condense.pretraining.trajectories import Training, read

__all__ = [
    "PLAN",
    "Architecture",
    "Committee",
    "ExpertOptions",
    "Experts",
    "OwnNetworks",
    "TeacherOptions",
    "Training",
    "groups",
    "parts_of",
    "read",
    "require_batch_norm",
    "residency",
]
