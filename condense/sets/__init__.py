"""The distilled set: its file, its decode stages and initial images, its form while it is being optimised, new labels
for it, and pictures of it."""

from condense.sets.array_file import checksums, read_arrays, write_arrays
from condense.sets.distilled import DISTILLED_FORMAT, DistilledSet, Resampling, check_set, packaged_sets
from condense.sets.initial import INITS, SyntheticOptions
from condense.sets.joining import join
from condense.sets.preview import save_grid
from condense.sets.relabelling import add_preparation_seconds, add_tag, relabel, replace_labels
from condense.sets.stages import Compensated, FlipUnion, Formation, decode
from condense.sets.synthetic import SyntheticSet

__all__ = [
    "DISTILLED_FORMAT",
    "INITS",
    "Compensated",
    "DistilledSet",
    "FlipUnion",
    "Formation",
    "Resampling",
    "SyntheticOptions",
    "SyntheticSet",
    "add_preparation_seconds",
    "add_tag",
    "check_set",
    "checksums",
    "decode",
    "join",
    "packaged_sets",
    "read_arrays",
    "relabel",
    "replace_labels",
    "save_grid",
    "write_arrays",
]
