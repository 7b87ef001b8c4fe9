"""Files: atomic writes, checks before the work, checksums of tensors."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from condense.errors import CondenseError
from condense.formatting import shorten


def check_name(name: str, what: str = "name") -> str:
    """Returns ``name`` if it may become a part of a path and of a set's name.

    Args:
        name: to check.
        what: messages call it.

    Raises:
        CondenseError: it is empty, longer than 100 characters, or has other characters than ASCII letters and digits,
            ``.``, ``_`` and ``-``, or begins with one of the latter.
    """
    if not (isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name)):
        raise CondenseError(
            f"{what} {shorten(str(name), 100)!r}: use up to 100 letters, digits, '.', '_' and '-', "
            "first a letter or digit"
        )
    return name


def as_path(value: str | Path, what: str) -> Path:
    """Returns a path that a caller gave.

    Args:
        value: to check.
        what: messages call it.

    Raises:
        CondenseError: it is not a path, or contains a NUL character.
    """
    if not isinstance(value, (str, os.PathLike)) or "\0" in os.fspath(value):
        raise CondenseError(f"{what} {value!r}: is no path of a file or folder")
    return Path(value)


def check_writable(path: Path, *, force: bool, size: int = 0) -> None:
    """Checks before any work that ``path`` can be written.

    Args:
        path: file to write; missing folders are created later.
        force: an existing file may be replaced.
        size: bytes that are needed.

    Raises:
        CondenseError: it exists (without ``force``), is no regular file, its folder is read-only, or the disk is full.
    """
    try:
        if path.is_dir():
            raise CondenseError(f"{path} is a folder; name a file")
        if path.exists() and not path.is_file():  # a file would replace /dev/null
            raise CondenseError(f"{path} is a device, pipe or socket; name a file")
        if path.exists() and not force:
            raise CondenseError(f"{path} exists; choose another name or give --force")
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".write-test-"):
            pass
        usage = os.statvfs(folder) if hasattr(os, "statvfs") else None
    except OSError as fault:
        raise CondenseError(f"{path}: cannot be written ({fault.strerror}); choose another place") from fault
    needed = size + 1024 * 1024
    free = needed if usage is None else usage.f_bavail * usage.f_frsize
    if free < needed:
        raise CondenseError(
            f"{path}: the disk has {free} bytes left, {needed} are needed; free some or choose another place"
        )


@contextlib.contextmanager
def exclusive_lock(path: Path, folder: Path, wait: Callable[[], None]) -> Iterator[None]:
    """In this block, no other process of this machine holds the lock for ``path``.

    The operating system releases the lock of a process that ends in any way. Without POSIX locks nothing is locked.

    Args:
        path: what the block writes.
        folder: where the empty lock files are, which stay.
        wait: called twice a second while another process holds the lock; may raise.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(str(path.absolute()).encode(errors="surrogateescape")).hexdigest()
    with (folder / f"{name}.lock").open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                wait()
                time.sleep(0.5)
        yield


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path; its file is synced and replaces ``path`` when the block succeeds.

    Raises:
        CondenseError: writing failed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    _remove_stale(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as fault:
        raise CondenseError(f"{path}: writing failed ({fault.strerror or fault})") from fault
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder that replaces ``folder`` when the block succeeds; otherwise nothing changes.

    Raises:
        CondenseError: writing failed.
    """
    folder = folder.absolute()
    temporary, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{kind}") for kind in ("tmp", "old"))
    _remove_stale(folder)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
    except OSError as fault:
        raise CondenseError(f"{folder}: writing failed ({fault.strerror or fault})") from fault
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _remove_stale(path: Path) -> None:
    """Removes the temporary files and folders beside ``path`` whose process was killed while it wrote them."""
    if os.name != "posix":  # elsewhere, signal 0 does not tell whether a process exists
        return
    pattern = re.compile(rf"\.{re.escape(path.name)}\.(\d+)\.(tmp|old)")
    with contextlib.suppress(OSError):
        for other in path.absolute().parent.iterdir():
            match = pattern.fullmatch(other.name)
            if match is None or _is_running(int(match[1])):
                continue
            if match[2] == "old" and not path.exists():
                other.rename(path)  # killed between its two renames
            elif other.is_dir():
                shutil.rmtree(other, ignore_errors=True)
            else:
                other.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the names, dtypes, shapes and bytes of tensors on any device."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


LFS_POINTER = b"version https://git-lfs"


def check_data_file(path: Path) -> None:
    """Checks that a file holds its data: no Git LFS pointer and, for an archive such as a ``.pt`` file, intact entries.

    ``torch.load`` and ``numpy.load`` do not compare the checksums of all entries.

    Raises:
        CondenseError: it is a pointer, or an entry is damaged or compressed more than a thousandfold.
    """
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise CondenseError(
                f"{path}: a Git LFS pointer, not the file itself; fetch it with `git lfs pull` in its repository"
            )
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
            if unpacked > 1000 * max(path.stat().st_size, 1):
                raise CondenseError(f"{path}: its entries claim {unpacked} bytes, more than a thousand times the file")
            damaged = archive.testzip()
    except CondenseError:
        raise
    except Exception as fault:  # damaged archives raise errors of many types
        raise CondenseError(f"{path}: damaged ({str(fault).splitlines()[0] if str(fault) else fault!r})") from fault
    if damaged:
        raise CondenseError(f"{path}: damaged (the checksum of '{damaged}' differs); copy it again")


def read_state(path: Path) -> dict[str, Any] | None:
    """Reads a dictionary that ``torch.save`` wrote, with its tensors on the CPU.

    Returns None if the file is missing, damaged, or holds anything that is not a tensor or plain value.
    """
    try:
        if not zipfile.is_zipfile(path):
            return None
        check_data_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # a damaged file raises errors of many types
        return None
    return state if isinstance(state, dict) else None


def is_existing_file(path: str) -> bool:
    """Returns whether ``path`` is a file; False also for text that is no valid path."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False
