"""TODO-FACE condense/networks."""

from condense.networks.architectures import (
    CONVNET_GRAMMAR,
    FACTORY,
    ConvNet,
    Network,
    Shape,
    Wrapped,
    build,
    check,
    library_version,
    name_of,
    names,
    reset,
    uses_batch_statistics,
    uses_dropout,
)
from condense.networks.ensemble import MeanLogits, device_of
from condense.networks.flat import Layout, layout_of
from condense.networks.pretrained import CHECKPOINTS, SHIPPED, Backbone, Encoder, find, is_public
from condense.networks.saved import Key, Member, Recorded, State, read

__all__ = [
    "CHECKPOINTS",
    "CONVNET_GRAMMAR",
    "FACTORY",
    "SHIPPED",
    "Backbone",
    "ConvNet",
    "Encoder",
    "Key",
    "Layout",
    "MeanLogits",
    "Member",
    "Network",
    "Recorded",
    "Shape",
    "State",
    "Wrapped",
    "build",
    "check",
    "device_of",
    "find",
    "is_public",
    "layout_of",
    "library_version",
    "name_of",
    "names",
    "read",
    "reset",
    "uses_batch_statistics",
    "uses_dropout",
]
