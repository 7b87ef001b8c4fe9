"""HDF5 files with a manifest: the part that all formats of the toolkit share.

Files are untrusted: nothing in them is executed, links to other files are rejected, and the manifest is checked before
it is used.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from condense.errors import CondenseError, did_you_mean

RESTORE_HINT = "copy or make it again"

MANIFEST_LIMIT = 64 * 1024 * 1024
"""Maximum size of a manifest in bytes."""

OBJECT_LIMIT = 2**16
"""Maximum number of links in a file. Files of the toolkit have a few thousand at most."""


@dataclass(frozen=True)
class Format:
    """A file format."""

    name: str
    version: int
    required: Mapping[str, type]
    """Keys of every manifest, and their types."""
    maker: str
    """Command that writes such files."""


@contextlib.contextmanager
def open_hdf5(path: Path, form: Format) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Opens a file for reading and yields it with its manifest. Errors in the block become one line.

    Raises:
        CondenseError: no such file, a different or a newer format, or the file is truncated or damaged.
    """
    import h5py

    if not path.is_file():
        near = difflib.get_close_matches(path.name, [other.name for other in path.parent.glob("*.h5")], n=1)
        raise CondenseError(f"{path}: no such file{did_you_mean(path.name, near) or f'; `{form.maker}` makes one'}")
    try:
        file = h5py.File(path, "r")
    except OSError as fault:
        with path.open("rb") as raw:
            if raw.read(8) == b"\x89HDF\r\n\x1a\n":
                raise CondenseError(f"{path}: truncated or damaged; {RESTORE_HINT}") from fault
        raise CondenseError(f"{path}: not an HDF5 file; give one that `{form.maker}` writes") from fault
    with file:
        try:
            yield file, _manifest(path, file, form)
        except (OSError, RuntimeError, KeyError, ValueError, TypeError) as fault:
            raise CondenseError(
                f"{path}: truncated or damaged ({str(fault).splitlines()[0]}); {RESTORE_HINT}"
            ) from fault


def _manifest(path: Path, file: Any, form: Format) -> dict[str, Any]:
    marker = file.attrs.get("format")
    if marker != form.name:
        raise CondenseError(
            f"{path}: an HDF5 file of another format ({marker or 'unnamed'}); give one that `{form.maker}` writes"
        )
    if int(file.attrs["version"]) > form.version:
        raise CondenseError(
            f"{path}: written by a newer version (format {file.attrs['version']}); update condense-toolkit"
        )
    if file.attrs.get_id("manifest").get_storage_size() > MANIFEST_LIMIT:
        raise CondenseError(f"{path}: its manifest is larger than {MANIFEST_LIMIT} bytes")
    text = bytes(file.attrs["manifest"])
    if hashlib.sha256(text).hexdigest() != file.attrs["manifest_sha256"]:
        raise CondenseError(f"{path}: the manifest is damaged (its checksum differs); {RESTORE_HINT}")
    manifest = json.loads(text)
    for key, kind in form.required.items():
        if not isinstance(manifest, dict) or not isinstance(manifest.get(key), kind):
            raise CondenseError(f"{path}: the manifest has no proper '{key}'; it was not written by this toolkit")
    return manifest


def read_format(path: Path) -> str:
    """Returns the format name in an HDF5 file; an empty string if there is none or the file is not HDF5."""
    import h5py

    try:
        with h5py.File(path, "r") as file:
            return str(file.attrs.get("format", ""))
    except (OSError, RuntimeError, KeyError, ValueError, TypeError):
        return ""


def create_hdf5(path: Path) -> Any:
    """Opens a new file for writing, in the 1.10 layout.

    The oldest layout limits attributes to 64 KiB. The class names of a large set or the manifest of many experts may be
    longer.
    """
    import h5py

    return h5py.File(path, "w", libver=("v110", "v110"))


def write_manifest(file: Any, form: Format, manifest: Mapping[str, Any]) -> None:
    """Writes the format, its version and the manifest into an open file."""
    text = json.dumps(manifest, sort_keys=True)
    file.attrs["format"], file.attrs["version"] = form.name, form.version
    file.attrs["manifest_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    file.attrs["manifest"] = np.bytes_(text)


def check_link(path: Path, file: Any, name: str) -> None:
    """Checks that an array and all groups of its name are in this file.

    Raises:
        CondenseError: it is missing, or a part of its name is a link to another file.
    """
    import h5py

    parts = name.split("/")
    for depth in range(len(parts)):
        if not isinstance(file.get("/".join(parts[: depth + 1]), getlink=True), h5py.HardLink):
            raise CondenseError(f"{path}: the array '{name}' is missing or links to another file")


def check_self_contained(path: Path, file: Any) -> None:
    """Checks that an open file consists of its own bytes alone, before anything in it is read.

    HDF5 can store the values of an array in any other file of the machine, link to objects of other files and compose
    arrays of them. The function visits every link and every object once and reads no values and no attributes. It uses
    the low-level interface of h5py, because opening an object through the other one already follows links.

    Args:
        path: name of the file, for messages.
        file: open ``h5py.File``.

    Raises:
        CondenseError: a link that is not a hard link, an array with external storage, a virtual array, an array of
            references, or more than ``OBJECT_LIMIT`` links.
    """
    import h5py

    root = h5py.h5g.open(file.id, b"/")
    groups, visited, links = [(b"", root)], {h5py.h5o.get_info(root).addr}, 0
    while groups:
        prefix, group = groups.pop()
        for name in group:
            links += 1
            if links > OBJECT_LIMIT:
                raise CondenseError(f"{path}: more than {OBJECT_LIMIT} objects; give a file with fewer")
            full = (prefix + b"/" + name)[-200:]
            if b"/" in name:  # would be resolved as a path
                raise CondenseError(f"{path}: damaged (a name contains '/'); {RESTORE_HINT}")
            if group.links.get_info(name).type != h5py.h5l.TYPE_HARD:
                raise _not_self_contained(path, full, "is a soft or external link")
            member = h5py.h5o.open(group, name)
            address = h5py.h5o.get_info(member).addr
            if address in visited:
                continue
            visited.add(address)
            if isinstance(member, h5py.h5g.GroupID):
                groups.append((full, member))
            elif isinstance(member, h5py.h5d.DatasetID):
                creation = member.get_create_plist()
                if creation.get_external_count():
                    raise _not_self_contained(path, full, "is stored in another file")
                if creation.get_layout() == h5py.h5d.VIRTUAL:
                    raise _not_self_contained(path, full, "is a virtual array")
                if member.get_type().detect_class(h5py.h5t.REFERENCE):
                    raise _not_self_contained(path, full, "holds references")


def _not_self_contained(path: Path, name: bytes, what: str) -> CondenseError:
    shown = name.decode(errors="replace").lstrip("/")
    return CondenseError(f"{path}: '{shown}' {what}; copy the values themselves into the file")
