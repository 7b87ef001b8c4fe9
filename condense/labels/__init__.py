"""Label providers: what a student of a distilled set trains on, and how it is stored.

Each kind (``hard``, ``soft``, ``per-view`` ...) is a class with the interface :class:`Labels`, registered in
:data:`LABEL_KINDS` under the name that manifests use.
"""

from condense.labels.adapters import MergedProjector, Projector
from condense.labels.arrays import stated_image_shape
from condense.labels.base import LABEL_KINDS, Labels, check_image_count, check_loss, mix_rows
from condense.labels.coded import CodedLabels, LowRankLabels, TopKLabels
from condense.labels.codes import (
    DEFAULT_MAX_K,
    DEFAULT_MAX_RANK,
    HalfCode,
    Int8Code,
    LowRankCode,
    TopKCode,
    default_size,
    fidelity,
)
from condense.labels.distances import DistanceLabels
from condense.labels.features import FeatureLabels
from condense.labels.per_image import HardLabels, RegressionLabels, SoftLabels
from condense.labels.per_view import PerViewLabels
from condense.labels.pool import PoolLabels, PruningOptions, compute_pool_logits, kept_pool_epochs
from condense.labels.projector import ProjectorLabels
from condense.labels.static import StaticLabels
from condense.labels.teacher import Int8TeacherLabels, TeacherLabels, dequantise, quantise
from condense.labels.teacher_logits import (
    STATISTICS,
    compute_logits,
    compute_view_logits,
    compute_view_nll,
    grouping_version,
    resumable_logits,
    split_evenly,
)
from condense.labels.view_options import LabelViewOptions

__all__ = [
    "DEFAULT_MAX_K",
    "DEFAULT_MAX_RANK",
    "LABEL_KINDS",
    "STATISTICS",
    "CodedLabels",
    "DistanceLabels",
    "FeatureLabels",
    "HalfCode",
    "HardLabels",
    "Int8Code",
    "Int8TeacherLabels",
    "LabelViewOptions",
    "Labels",
    "LowRankCode",
    "LowRankLabels",
    "MergedProjector",
    "PerViewLabels",
    "PoolLabels",
    "Projector",
    "ProjectorLabels",
    "PruningOptions",
    "RegressionLabels",
    "SoftLabels",
    "StaticLabels",
    "TeacherLabels",
    "TopKCode",
    "TopKLabels",
    "check_image_count",
    "check_loss",
    "compute_logits",
    "compute_pool_logits",
    "compute_view_logits",
    "compute_view_nll",
    "default_size",
    "dequantise",
    "fidelity",
    "grouping_version",
    "kept_pool_epochs",
    "mix_rows",
    "quantise",
    "resumable_logits",
    "split_evenly",
    "stated_image_shape",
]
