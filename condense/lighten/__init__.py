"""TODO-FACE condense/lighten."""

from condense.lighten.comparison import asked_kinds, chart, compare, table
from condense.lighten.kinds import KINDS
from condense.lighten.lightening import lighten
from condense.lighten.projection import Projection, fitted, head_of, projector_bytes
from condense.lighten.settings import EPOCHS
from condense.lighten.sizes import Point, int8_bytes, label_bytes

__all__ = [
    "EPOCHS",
    "KINDS",
    "Point",
    "Projection",
    "asked_kinds",
    "chart",
    "compare",
    "fitted",
    "head_of",
    "int8_bytes",
    "label_bytes",
    "lighten",
    "projector_bytes",
    "table",
]
