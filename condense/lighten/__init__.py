"""Labels in fewer bytes for an existing set, and the comparison of accuracy against label bytes."""

from condense.lighten.comparison import compare_label_kinds, format_comparison, parse_kinds, plot_comparison
from condense.lighten.kinds import LIGHTEN_KINDS
from condense.lighten.lightening import lighten
from condense.lighten.projection import Projection, head_kind, projector_bytes, train_projector
from condense.lighten.settings import DEFAULT_LABEL_EPOCHS
from condense.lighten.sizes import LabelComparison, int8_bytes, label_bytes

__all__ = [
    "DEFAULT_LABEL_EPOCHS",
    "LIGHTEN_KINDS",
    "LabelComparison",
    "Projection",
    "compare_label_kinds",
    "format_comparison",
    "head_kind",
    "int8_bytes",
    "label_bytes",
    "lighten",
    "parse_kinds",
    "plot_comparison",
    "projector_bytes",
    "train_projector",
]
