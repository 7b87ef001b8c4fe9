"""HDF5 files with a manifest: the part that all formats of the toolkit share.

A file begins with an HDF5 user block of 512 bytes of text, which ``head -c 512`` shows: format, size, and the SHA-256
of all further bytes (``tail -c +513 FILE | sha256sum``). The digest is compared before the HDF5 library parses
anything, because the library may loop for ever on damaged bytes. An array that is too large to be read at every opening
may be left out of it; its values then have checksums of their own. Files of earlier versions have no user block. Their
structure is first parsed in a child process with a time limit.

Files are untrusted: nothing in them is executed, links to other files are rejected, and the manifest is checked against
a JSON schema before it is used.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import math
import re
import subprocess
import sys
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

ATTRIBUTE_LIMIT = 1024
"""Maximum size in bytes of the other attributes."""

USER_BLOCK_SIZE = 512

PARSE_SECONDS = 60
"""Time limit for a process that parses the structure of a file without a user block."""

NAME_SCHEMA = {"type": "string", "minLength": 1, "maxLength": 1000, "pattern": r"^[^\x00-\x1f\x7f-\x9f]*$"}
"""JSON schema of a name in a manifest: a text without control characters."""

SHA256_SCHEMA = {"type": "string", "pattern": "^[0-9a-f]{64}$"}

CLASSES_SCHEMA = {
    "type": "array",
    "items": {"type": "string", "minLength": 1},
    "minItems": 1,
    "maxItems": 10**6,
    "uniqueItems": True,
}
"""JSON schema of class names."""

IMAGE_SHAPE_SCHEMA = {
    "type": "array",
    "items": {"type": "integer", "minimum": 1, "maximum": 65536},
    "minItems": 3,
    "maxItems": 3,
}
"""JSON schema of (C,H,W)."""

_SIGNATURE = b"\x89HDF\r\n\x1a\n"

_USER_BLOCK = re.compile(
    rb"(?P<format>condense\.[a-z]+) file, HDF5 from byte 512\nbytes (?P<size>[1-9][0-9]{0,17})\n"
    rb"sha256 (?P<sha256>[0-9a-f]{64})\n(?:not in the sha256: (?P<start>[1-9][0-9]{0,17})-(?P<end>[1-9][0-9]{0,17})\n)?"
    rb" *\n"
)

_PARSE = """
import json, os, sys, time
sys.path[:] = json.loads(sys.argv[2])
import h5py
try:
    import resource
    # Of the processor's time, because the machine may be busy. The kernel ends the process, also without its parent.
    seconds = int(time.process_time() + 3 + os.path.getsize(sys.argv[1]) / 2e6)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
except (ImportError, ValueError):
    pass
with h5py.File(sys.argv[1], "r") as file:
    for name in ("format", "version", "manifest_sha256", "manifest"):
        file.attrs.get(name)
    file.visititems(lambda name, item: (item.shape, item.dtype) if isinstance(item, h5py.Dataset) else None)
"""
"""Reads all of the structure of a file that the toolkit will read."""


@dataclass(frozen=True)
class Format:
    """A file format."""

    name: str
    version: int
    schema: Mapping[str, Any]
    """JSON schema of the manifest."""
    maker: str
    """Command that writes such files."""
    separate: str = ""
    """Array that the digest of the file leaves out, because its values have checksums of their own."""


@dataclass(frozen=True)
class UserBlock:
    """The text at the beginning of a file."""

    format: str
    size: int
    """Bytes of the file."""
    separate: tuple[int, int] | None = None
    """First byte and end of the array that the digest leaves out."""

    def text(self, sha256: str) -> bytes:
        """Returns the 512 bytes."""
        lines = [f"{self.format} file, HDF5 from byte {USER_BLOCK_SIZE}", f"bytes {self.size}", f"sha256 {sha256}"]
        if self.separate is not None:
            lines.append("not in the sha256: {}-{}".format(*self.separate))
        return ("\n".join(lines) + "\n").ljust(USER_BLOCK_SIZE - 1).encode() + b"\n"

    def sha256(self, path: Path) -> str:
        """Computes the digest of the bytes after the block."""
        digest = hashlib.sha256()
        start, end = self.separate or (self.size, self.size)
        buffer = memoryview(bytearray(1 << 20))
        with path.open("rb") as file:
            for first, stop in ((USER_BLOCK_SIZE, start), (end, self.size)):
                file.seek(first)
                while first < stop and (count := file.readinto(buffer[: min(len(buffer), stop - first)])):
                    digest.update(buffer[:count])
                    first += count
        return digest.hexdigest()


@contextlib.contextmanager
def open_hdf5(path: Path, form: Format, *, repair: bool = False) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Opens a file for reading and yields it with its manifest. Errors in the block become one line.

    Args:
        path: The file.
        form: Its format.
        repair: Whether to open a file whose digest differs, in order to find what is intact in it. Each array must then
            be compared with its own checksum.

    Raises:
        CondenseError: no such file, a different or a newer format, or the file is truncated or damaged.
    """
    import h5py

    if not path.is_file():
        near = difflib.get_close_matches(path.name, [other.name for other in path.parent.glob("*.h5")], n=1)
        raise CondenseError(f"{path}: no such file{did_you_mean(path.name, near) or f'; `{form.maker}` makes one'}")
    try:
        block = _check_digest(path, form)
    except CondenseError:
        if not repair:
            raise
        block = None
    if block is None:
        _check_structure(path)
    try:
        file = h5py.File(path, "r")
    except (OSError, RuntimeError, ValueError) as fault:
        raise CondenseError(f"{path}: truncated or damaged; {RESTORE_HINT}") from fault
    with file:
        try:
            manifest = _read_manifest(path, file, form, allow_variable=block is None)
            if block is not None and block.separate != _separate_bytes(file, form):
                raise CondenseError(f"{path}: its digest leaves out other bytes than '{form.separate}'; {RESTORE_HINT}")
            check_self_contained(path, file)
            yield file, manifest
        except (OSError, RuntimeError, KeyError, ValueError, TypeError, OverflowError) as fault:
            reason = (str(fault).splitlines() or [type(fault).__name__])[0]
            raise CondenseError(f"{path}: truncated or damaged ({reason}); {RESTORE_HINT}") from fault


def _read_user_block(path: Path) -> tuple[UserBlock, str] | None:
    """Reads the text at the beginning of a file and the digest in it; None if the file has no valid one."""
    with path.open("rb") as file:
        match = _USER_BLOCK.fullmatch(file.read(USER_BLOCK_SIZE))
    if match is None or match.end() != USER_BLOCK_SIZE:
        return None
    separate = (int(match["start"]), int(match["end"])) if match["start"] else None
    return UserBlock(match["format"].decode(), int(match["size"]), separate), match["sha256"].decode()


def _check_digest(path: Path, form: Format) -> UserBlock | None:
    """Compares the size and the digest of a file; returns None for a file of an earlier version, which has none.

    Raises:
        CondenseError: another format, or the file is truncated or damaged.
    """
    damaged = CondenseError(f"{path}: truncated or damaged; {RESTORE_HINT}")
    try:
        with path.open("rb") as file:
            head = file.read(USER_BLOCK_SIZE + len(_SIGNATURE))
        if head.startswith(_SIGNATURE):
            return None
        described = _read_user_block(path)
        if described is None:
            if head.startswith(b"condense.") or head.endswith(_SIGNATURE):
                raise damaged
            raise CondenseError(f"{path}: not an HDF5 file; give one that `{form.maker}` writes")
        block, expected = described
        if block.format != form.name:
            raise CondenseError(
                f"{path}: an HDF5 file of another format ({block.format}); give one that `{form.maker}` writes"
            )
        start, end = block.separate or (block.size, block.size)
        if block.size != path.stat().st_size or not USER_BLOCK_SIZE <= start <= end <= block.size:
            raise damaged
        if block.sha256(path) != expected:
            raise damaged
    except OSError as fault:
        raise CondenseError(f"{path}: cannot be read ({fault.strerror or fault}); {RESTORE_HINT}") from fault
    return block


def _check_structure(path: Path) -> None:
    """Parses the structure of a file in a child process, because the HDF5 library may loop or crash on damaged bytes.

    Raises:
        CondenseError: it does not end within :data:`PARSE_SECONDS`, or the library crashes.
    """
    command = [sys.executable, "-I", "-c", _PARSE, str(path.absolute()), json.dumps([*map(str, sys.path)])]
    quiet: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    try:
        crashed = subprocess.run(command, timeout=PARSE_SECONDS, **quiet).returncode < 0
    except subprocess.TimeoutExpired:
        crashed = True
    except OSError:  # no process can be started here
        return
    if crashed:
        raise CondenseError(f"{path}: damaged (the HDF5 library cannot parse it); {RESTORE_HINT}")


def _read_attribute(path: Path, file: Any, name: str, limit: int, allow_variable: bool) -> Any:
    """Reads a scalar attribute: text or bytes as bytes, else a number. Its type and size are checked before."""
    import h5py

    attribute = file.attrs.get_id(name)
    kind = attribute.get_type()
    is_text = isinstance(kind, h5py.h5t.TypeStringID)
    if attribute.shape != () or not (is_text or isinstance(kind, h5py.h5t.TypeIntegerID)):
        raise CondenseError(f"{path}: the attribute '{name}' is neither a text nor a number; {RESTORE_HINT}")
    if is_text and kind.is_variable_str() and not allow_variable:
        raise CondenseError(f"{path}: the attribute '{name}' has no fixed length; {RESTORE_HINT}")
    if attribute.get_storage_size() > limit:
        raise CondenseError(f"{path}: the attribute '{name}' is larger than {limit} bytes")
    value = file.attrs[name]
    return (value.encode() if isinstance(value, str) else bytes(value)) if is_text else int(value)


def _read_manifest(path: Path, file: Any, form: Format, allow_variable: bool) -> dict[str, Any]:
    def read(name: str, limit: int = ATTRIBUTE_LIMIT) -> Any:
        return _read_attribute(path, file, name, limit, allow_variable)

    marker = read("format") if "format" in file.attrs else b""
    if marker != form.name.encode():
        shown = str(marker, errors="replace") if isinstance(marker, bytes) else ""
        shown = shown if shown.isprintable() else ""
        raise CondenseError(
            f"{path}: an HDF5 file of another format ({shown[:40] or 'unnamed'}); give one that `{form.maker}` writes"
        )
    version = read("version")
    if not isinstance(version, int) or version > form.version:
        raise CondenseError(f"{path}: written by a newer version (format {version}); update condense-toolkit")
    text = read("manifest", MANIFEST_LIMIT)
    if not isinstance(text, bytes) or hashlib.sha256(text).hexdigest().encode() != read("manifest_sha256"):
        raise CondenseError(f"{path}: the manifest is damaged (its checksum differs); {RESTORE_HINT}")
    manifest = json.loads(text)
    if mistake := schema_mistake(manifest, form.schema):
        raise CondenseError(f"{path}: the manifest has no proper {mistake}; it was not written by this toolkit")
    return manifest


def schema_mistake(value: Any, schema: Mapping[str, Any]) -> str:
    """Returns the place of a mistake in quotes, with the reason; an empty text if ``value`` fits the JSON schema.

    Beyond the standard, numbers must be finite, integers must fit into 64 bits, and text must be Unicode without lone
    surrogates.
    """
    from jsonschema import Draft202012Validator, validators
    from jsonschema.exceptions import best_match

    checker = Draft202012Validator.TYPE_CHECKER.redefine_many(
        {"number": _is_number, "integer": _is_integer, "string": _is_text}
    )
    strict: Any = validators.extend(Draft202012Validator, type_checker=checker)
    fault = best_match(strict(schema).iter_errors(value))
    if fault is None:
        return ""
    where = [str(part) for part in fault.absolute_path]
    if fault.validator == "required":
        where.append(next(key for key in fault.validator_value if key not in fault.instance))
    place = "".join(c if c.isprintable() else "?" for c in ".".join(where)[:80])
    return f"'{place}'" + ("" if fault.validator == "required" else f" ({_shortened(fault.message)})")


def _shortened(message: str, limit: int = 100) -> str:
    """Keeps the beginning, the value as repr, and the end, what the schema demands."""
    return message if len(message) <= limit else f"{message[: limit // 2]}...{message[-limit // 2 :]}"


def _is_integer(checker: Any, value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def _is_number(checker: Any, value: Any) -> bool:
    return _is_integer(checker, value) or (isinstance(value, float) and math.isfinite(value))


def _is_text(checker: Any, value: Any) -> bool:
    return isinstance(value, str) and not any(0xD800 <= ord(c) < 0xE000 for c in value)


def read_block_format(path: Path) -> str:
    """Returns the format name in the user block of a file; an empty string if it has no valid one."""
    try:
        described = _read_user_block(path)
    except OSError:
        return ""
    return described[0].format if described else ""


def read_format(path: Path) -> str:
    """Returns the format name in an HDF5 file; an empty string if there is none or the file is not HDF5.

    Raises:
        CondenseError: the HDF5 library cannot parse the file.
    """
    import h5py

    if not path.is_file():
        return ""
    try:
        with path.open("rb") as raw:
            is_without_block = raw.read(len(_SIGNATURE)) == _SIGNATURE
    except OSError:
        return ""
    if not is_without_block:
        return read_block_format(path)
    _check_structure(path)
    try:
        with h5py.File(path, "r") as file:
            return str(_read_attribute(path, file, "format", ATTRIBUTE_LIMIT, True), "utf-8")
    except (CondenseError, OSError, RuntimeError, KeyError, ValueError, TypeError):
        return ""


@contextlib.contextmanager
def create_hdf5(path: Path, form: Format) -> Iterator[Any]:
    """Opens a new file for writing; at the end of the block it is closed and gets its user block.

    The file has the 1.10 layout. The oldest layout limits attributes to 64 KiB. The class names of a large set or the
    manifest of many experts may be longer.
    """
    import h5py

    with h5py.File(path, "w", libver=("v110", "v110"), userblock_size=USER_BLOCK_SIZE) as file:
        yield file
    write_user_block(path, form)


def write_user_block(path: Path, form: Format) -> None:
    """Writes the user block of a closed file that has room for it."""
    import h5py

    with h5py.File(path, "r") as file:
        separate = _separate_bytes(file, form)
    block = UserBlock(form.name, path.stat().st_size, separate)
    text = block.text(block.sha256(path))
    with path.open("r+b") as raw:
        raw.write(text)


def _separate_bytes(file: Any, form: Format) -> tuple[int, int] | None:
    """First byte and end of the array that the digest leaves out."""
    if not form.separate or form.separate not in file or file[form.separate].chunks is not None:
        return None
    array = file[form.separate].id
    offset = array.get_offset()
    return None if offset is None else (offset, offset + array.get_storage_size())


def write_manifest(file: Any, form: Format, manifest: Mapping[str, Any]) -> None:
    """Writes the format, its version and the manifest into an open file, as attributes of fixed length.

    Raises:
        CondenseError: the manifest does not fit its schema.
    """
    text = json.dumps(manifest, sort_keys=True).encode()
    if mistake := schema_mistake(json.loads(text), form.schema):
        raise CondenseError(f"the manifest cannot be stored without a proper {mistake}")
    file.attrs["format"], file.attrs["version"] = np.bytes_(form.name), form.version
    file.attrs["manifest_sha256"] = np.bytes_(hashlib.sha256(text).hexdigest())
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
