"""Real data: reads, caches and serves the images that methods distil and that students are tested on."""

from condense.data.folders import read_images
from condense.data.loaded import (
    ORDERS,
    PRUNING_OPTIONS,
    DataOptions,
    Split,
    cache_dir,
    class_numbers,
    data_root,
    selected_fingerprint,
)
from condense.data.registered import DATASETS, datasets
from condense.data.task import Task, load_task, to_unit_range
from condense.data.transform import (
    ZCA,
    Standardise,
    Transform,
    black_pixel,
    digests,
    transform_from_arrays,
    working_dtype,
)

__all__ = [
    "DATASETS",
    "ORDERS",
    "PRUNING_OPTIONS",
    "ZCA",
    "DataOptions",
    "Split",
    "Standardise",
    "Task",
    "Transform",
    "black_pixel",
    "cache_dir",
    "class_numbers",
    "data_root",
    "datasets",
    "digests",
    "load_task",
    "read_images",
    "selected_fingerprint",
    "to_unit_range",
    "transform_from_arrays",
    "working_dtype",
]
