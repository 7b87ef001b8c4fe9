"""The distilled set: its file, its decode stages and initial images, its form while it is being optimised, new labels
for it, and pictures of it."""

from condense.sets.distilled import DistilledSet, checksums, packaged_sets
from condense.sets.initial import INITS, SyntheticOptions, central_rows
from condense.sets.preview import save_grid
from condense.sets.relabelling import prepared, relabel, relabelled, tagged
from condense.sets.stages import Compensated, FlipUnion, decode
from condense.sets.synthetic import SyntheticSet

__all__ = [
    "INITS",
    "Compensated",
    "DistilledSet",
    "FlipUnion",
    "SyntheticOptions",
    "SyntheticSet",
    "central_rows",
    "checksums",
    "decode",
    "packaged_sets",
    "prepared",
    "relabel",
    "relabelled",
    "save_grid",
    "tagged",
]
