"""Label providers: what a student of a distilled set trains on, and how it is stored.

Each kind (``hard``, ``soft``, ``per-view`` ...) is a class with the interface :class:`Labels`, registered in
:data:`PROVIDERS` under the name that manifests use.
"""

from condense.labels.adapters import Merged, Projector
from condense.labels.base import PROVIDERS, Labels, check_image_count, check_loss, mixed
from condense.labels.coded import CodedLabels, LowRankLabels, TopKLabels
from condense.labels.codes import MOST_KEPT, MOST_RANK, Bytes, Half, LowRank, TopK, fidelity, usual
from condense.labels.distances import DistanceLabels
from condense.labels.per_image import HardLabels, SoftLabels
from condense.labels.per_view import PerViewLabels
from condense.labels.pool import PoolLabels, Pruning, pool_answers, pooled_epochs
from condense.labels.projector import ProjectorLabels
from condense.labels.static import StaticLabels
from condense.labels.teacher import Int8TeacherLabels, TeacherLabels, dequantised, quantised
from condense.labels.teacher_logits import STATISTICS, answers, stored_answers, view_answers, view_distances

__all__ = [
    "MOST_KEPT",
    "MOST_RANK",
    "PROVIDERS",
    "STATISTICS",
    "Bytes",
    "CodedLabels",
    "DistanceLabels",
    "Half",
    "HardLabels",
    "Int8TeacherLabels",
    "Labels",
    "LowRank",
    "LowRankLabels",
    "Merged",
    "PerViewLabels",
    "PoolLabels",
    "Projector",
    "ProjectorLabels",
    "Pruning",
    "SoftLabels",
    "StaticLabels",
    "TeacherLabels",
    "TopK",
    "TopKLabels",
    "answers",
    "check_image_count",
    "check_loss",
    "dequantised",
    "fidelity",
    "mixed",
    "pool_answers",
    "pooled_epochs",
    "quantised",
    "stored_answers",
    "usual",
    "view_answers",
    "view_distances",
]
