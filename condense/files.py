"""atomic writing, folders, checksums of tensors."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from condense.errors import CondenseError


def check_writable(path: Path, *, force: bool, size: int = 0) -> None:
    """Finds before any work that ``path`` cannot be written.

    Raises:
        CondenseError: it exists (and not ``force``), its folder is missing or read-only, or the disk is full.
    """
    try:
        if path.is_dir():
            raise CondenseError(f"{path} is a folder; name a file")
        if path.exists() and not force:
            raise CondenseError(f"{path} exists; choose another name or give --force")
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".write-test-"):
            pass
        usage = os.statvfs(folder) if hasattr(os, "statvfs") else None
    except OSError as fault:
        raise CondenseError(f"{path}: cannot be written ({fault.strerror}); choose another place") from fault
    needed = size + 1024 * 1024
    if usage is not None and usage.f_bavail * usage.f_frsize < needed:
        free = usage.f_bavail * usage.f_frsize
        raise CondenseError(
            f"{path}: the disk has {free} bytes left, {needed} are needed; free some or choose another place"
        )


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place, synced, when the block succeeds."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
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


@contextlib.contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside ``folder`` that takes its place as a whole when the block succeeds; else nothing
    changes."""
    folder = folder.absolute()
    temporary, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{kind}") for kind in ("tmp", "old"))
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


def content(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the names, types, shapes and bytes of tensors, wherever they are."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_state(path: Path) -> dict[str, Any] | None:
    """What ``torch.save`` wrote, on the CPU; None where the file is damaged or holds anything but plain state."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load compares no checksums
        state = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # a damaged file raises anything
        return None
    return state if isinstance(state, dict) else None
