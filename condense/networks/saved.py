"""Files of teachers: networks with all weights and buffers in one HDF5 file."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from condense import hdf5, rng
from condense.errors import CondenseError
from condense.files import atomic_write, tensors_sha256
from condense.formatting import by
from condense.hdf5 import RESTORE_HINT
from condense.networks import architectures
from condense.networks.outline import build_outline
from condense.networks.public import PublicNetwork

_AMOUNT = {"type": "number", "minimum": 0, "maximum": 1e15}

TEACHER_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["classes", "image_shape", "fingerprint", "transform", "members", "recipe", "epochs", "content"],
    "properties": {
        "classes": hdf5.CLASSES_SCHEMA,
        "image_shape": hdf5.IMAGE_SHAPE_SCHEMA,
        "fingerprint": hdf5.NAME_SCHEMA,
        "transform": {"type": "array", "items": hdf5.SHA256_SCHEMA},
        "members": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["network", "number", "sha256", "accuracy", "seconds"],
                "properties": {
                    "network": hdf5.NAME_SCHEMA,
                    "number": {"type": "integer", "minimum": 0},
                    "sha256": hdf5.SHA256_SCHEMA,
                    "accuracy": {"type": "number", "minimum": 0, "maximum": 1},
                    "seconds": _AMOUNT,
                    "library_version": {"type": ["string", "null"]},
                },
            },
        },
        "recipe": {"type": "string"},
        "epochs": {"type": "integer", "minimum": 0},
        "content": hdf5.SHA256_SCHEMA,
        "judged_on": {"type": "string"},
        "normalisation": {
            "type": ["object", "null"],
            "additionalProperties": {"type": "array", "items": {"type": "number"}},
        },
    },
}

TEACHER_FORMAT = hdf5.Format("condense.teachers", 1, TEACHER_SCHEMA, "condense teachers")

TEACHER_DTYPES = (np.float16, np.float32, np.float64, np.int32, np.int64, np.uint8, np.bool_)
"""Data types that the arrays of a file may have."""

State = dict[str, Tensor]

MemberKey = tuple[str, int]
"""A member's network and number."""

# -- what a method sees -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Member:
    """One teacher."""

    network: architectures.Network
    """Frozen, in eval mode, on the device; takes images in training space."""
    name: str
    """Of its architecture."""
    accuracy: float
    """Fraction of images that it gets right; of which, the committee says."""
    seconds: float = 0.0
    """That its training took; 0 where that is not known."""
    number: int = 0
    """Among the teachers of its architecture."""
    sha256: str = ""
    """Of its state."""


def state_nbytes(net: nn.Module) -> int:
    """Bytes of weights and buffers."""
    return sum(value.numel() * value.element_size() for value in net.state_dict().values())


# -- the file ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredArray:
    """Place of an array in a file."""

    offset: int
    """First byte."""
    shape: tuple[int, ...]
    dtype: np.dtype


@dataclass(frozen=True, eq=False)
class TeacherFile:
    """A file of teachers. Members are read and verified when they are asked for."""

    path: Path
    manifest: dict[str, Any]
    places: list[dict[str, StoredArray]]
    """Arrays of each member by name."""
    is_damaged: bool = False
    """Whether it was opened for repair: only members that are intact may be used, and the file must be rewritten."""

    @property
    def entries(self) -> list[dict[str, Any]]:
        """What the manifest says of each member."""
        return self.manifest["members"]

    @property
    def keys(self) -> list[MemberKey]:
        """Network and number of each member."""
        return [(entry["network"], entry["number"]) for entry in self.entries]

    def load_state(self, k: int) -> State:
        """Weights and buffers of member ``k`` by name, on the CPU.

        Raises:
            CondenseError: it is damaged.
        """
        state = {}
        try:
            with self.path.open("rb") as file:
                for name, place in self.places[k].items():
                    file.seek(place.offset)
                    count = math.prod(place.shape)
                    state[name] = torch.from_numpy(np.fromfile(file, place.dtype, count).reshape(place.shape))
            is_intact = tensors_sha256(state) == self.entries[k]["sha256"]
        except (OSError, ValueError):  # it was removed or cut in the meantime
            is_intact = False
        if not is_intact:
            raise CondenseError(
                f"{self.path}: {member_title(self.entries[k])} is damaged (its checksum differs); {RESTORE_HINT}"
            )
        return state

    def is_intact(self, k: int) -> bool:
        """Whether member ``k`` is what was written."""
        with contextlib.suppress(CondenseError):
            return bool(self.load_state(k))
        return False

    def load_member(self, k: int, device: torch.device) -> Member:
        """Member ``k``, verified.

        Raises:
            CondenseError: it is damaged, or its network is unknown here, or another one by now.
        """
        entry, known, state = self.entries[k], self.manifest, self.load_state(k)
        channels, height, width = known["image_shape"]
        try:
            net, misfit = build_from_state(entry["network"], (channels, height, width), len(known["classes"]), state)
        except CondenseError as fault:
            raise CondenseError(f"{self.path}: {fault}") from fault
        if misfit:
            raise CondenseError(
                f"{self.path}: {member_title(entry)} is of another version of its network ({misfit}); make it again"
            )
        return Member(
            freeze(net, device),
            entry["network"],
            float(entry["accuracy"]),
            float(entry["seconds"]),
            entry["number"],
            entry["sha256"],
        )


def member_title(entry: Mapping[str, Any]) -> str:
    """``teacher 0 of convnet-d3-w128-bn``, for messages."""
    return f"teacher {entry['number']} of {entry['network']}"


def combined_sha256(digests: Iterable[str]) -> str:
    """SHA-256 of several SHA-256, in their order."""
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()


def read_teacher_file(path: Path, *, repair: bool = False) -> TeacherFile:
    """Opens a file of teachers from anywhere: types, sizes and links are checked, no member is read.

    Args:
        path: The file.
        repair: Whether to open a damaged file, in order to find its intact members.

    Raises:
        CondenseError: one line: no such file, not our format, newer version, truncated or damaged.
    """
    with hdf5.open_hdf5(path, TEACHER_FORMAT, repair=repair) as (file, manifest):
        places = [_places(path, file, k) for k in range(len(manifest["members"]))]
    if combined_sha256(entry["sha256"] for entry in manifest["members"]) != manifest["content"]:
        raise CondenseError(f"{path}: the manifest is damaged (its members do not match its digest); {RESTORE_HINT}")
    return TeacherFile(path, manifest, places, repair)


def _places(path: Path, file: Any, k: int) -> dict[str, StoredArray]:
    """Places of the arrays of member ``k``: each in this file, of a known type, and together no larger than it."""
    import h5py

    hdf5.check_link(path, file, f"members/{k}")
    group, total, size = file[f"members/{k}"], 0, path.stat().st_size
    if not isinstance(group, h5py.Group):
        raise CondenseError(f"{path}: 'members/{k}' is not what the manifest says; {RESTORE_HINT}")
    places = {}
    for name in sorted(group):
        hdf5.check_link(path, file, f"members/{k}/{name}")
        array = group[name]
        if not isinstance(array, h5py.Dataset) or array.is_virtual or array.external or array.chunks is not None:
            raise CondenseError(f"{path}: 'members/{k}/{name}' is not an array stored in one piece in this file")
        if array.shape is None or array.dtype.type not in TEACHER_DTYPES or not array.dtype.isnative:
            raise CondenseError(f"{path}: 'members/{k}/{name}' has the type {array.dtype}, which no teacher uses")
        nbytes, offset = math.prod(array.shape) * array.dtype.itemsize, array.id.get_offset()
        total += nbytes
        if total > size:
            raise CondenseError(f"{path}: teacher {k} claims {total} bytes, more than the file holds; {RESTORE_HINT}")
        if nbytes and (offset is None or offset + nbytes > size):
            raise CondenseError(f"{path}: 'members/{k}/{name}' is not an array stored in one piece in this file")
        places[name] = StoredArray(offset or 0, array.shape, array.dtype)
    return places


def write_teacher_file(
    path: Path, about: Mapping[str, Any], members: Iterable[tuple[Mapping[str, Any], State]]
) -> None:
    """The file, atomically, from one member after the other: its entry of the manifest and its state."""
    entries = []
    with atomic_write(path) as temporary, hdf5.create_hdf5(temporary, TEACHER_FORMAT) as file:
        for k, (entry, state) in enumerate(members):
            group = file.create_group(f"members/{k}")
            for name, value in state.items():
                group.create_dataset(name, data=value.numpy())
            entries.append(dict(entry))
        key = combined_sha256(entry["sha256"] for entry in entries)
        hdf5.write_manifest(file, TEACHER_FORMAT, {**about, "members": entries, "content": key})


def freeze(net: architectures.Network, device: torch.device) -> architectures.Network:
    """Moves the network to the device, in eval mode and without gradients of its weights."""
    return net.to(device).requires_grad_(False).eval()


def build_from_state(
    network: str, shape: architectures.Shape, classes: int, state: Mapping[str, Tensor]
) -> tuple[architectures.Network, str]:
    """Builds a network that an untrusted file names and gives it the weights in the file.

    The weights are compared with a network without memory first, so that a name cannot claim more memory than the file
    has bytes.

    Returns:
        The network with the state, and what does not fit; if anything does not, the network has no memory.

    Raises:
        CondenseError: An unknown network, or it does not take such images.
    """
    if "own_mean" in state:
        inner = {name.removeprefix("net."): value for name, value in state.items() if name.startswith("net.")}
        net, misfit = build_from_state(network, (3, *shape[1:]), classes, inner)
        public = None if misfit else PublicNetwork.from_state(net, shape[0], state)
        return (net, misfit or "its normalisation is invalid") if public is None else (public, "")
    outline = build_outline(network, shape, classes)
    if outline is not None and (misfit := state_misfit(outline, state)):
        return outline, misfit
    with rng.seeded("layout"):
        net = architectures.build_network(network, shape, classes)
    return net, apply_state(net, state)


def apply_state(net: nn.Module, state: Mapping[str, Tensor]) -> str:
    """Gives ``net`` the state, or changes nothing and says what does not fit."""
    misfit = state_misfit(net, state)
    if not misfit:
        counters = {name: value for name, value in net.state_dict().items() if name.endswith("num_batches_tracked")}
        net.load_state_dict({**counters, **state})  # old checkpoints lack them, and nothing reads them in eval mode
    return misfit


def state_misfit(net: nn.Module, state: Mapping[str, Tensor]) -> str:
    """Says what of a state does not fit ``net``, which may be on the meta device; an empty text if all does."""
    own = net.state_dict()
    both = [name for name in own if name in state]
    unlike = [name for name in both if state[name].shape != own[name].shape]
    faults = {
        "missing": [name for name in own if name not in state and not name.endswith("num_batches_tracked")],
        "unknown": [name for name in state if name not in own],
        "of another shape": [f"{name} ({by(state[name].shape)}, not {by(own[name].shape)})" for name in unlike],
        "not finite": [name for name in both if not bool(state[name].isfinite().all())],
    }
    return ", ".join(
        f"{len(names)} {words}: {names[0]}" + ", ..." * (len(names) > 1) for words, names in faults.items() if names
    )
