"""TODO-DOC."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import math
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from condense.data.decoding import _decode, _is_grey, _open, _pixels
from condense.data.loaded import DataOptions, Loaded, Split, _measure, _progress, _some, _stratified, cache_dir
from condense.errors import CondenseError

_log = logging.getLogger(__name__)

CACHE_FORMAT = 1
"""Raised whenever the same files and options would decode to other pixels or another cache layout."""

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".ppm", ".tif", ".tiff")

MODE_SAMPLE = 1000
"""Grey or RGB is decided by the headers of at most this many train files, evenly spaced in file order."""

# --- Image folders ----------------------------------------------------------------------------------------------------


class _File(NamedTuple):
    path: str
    label: int
    size: int
    changed: tuple[int, int]
    """Times of modification and of the last change of anything about the file, in ns: some archives fix the first."""


@dataclass(frozen=True)
class _Listing:
    root: Path
    classes: tuple[str, ...]
    train: list[_File]
    test: list[_File]


def _folders(folder: Path) -> list[str]:
    """Names of the visible folders inside, sorted."""
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith((".", "__MACOSX")))


def _files(folder: str, label: int) -> list[_File]:
    """Image files at any depth below ``folder``, sorted by path."""
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.name.lower().endswith(SUFFIXES):
                status = entry.stat()
                found.append(_File(entry.path, label, status.st_size, (status.st_mtime_ns, status.st_ctime_ns)))
            elif entry.is_dir():
                found += _files(entry.path, label)
    found.sort()
    return found


def _class_files(folder: Path, classes: Sequence[str]) -> list[_File]:
    files = []
    for label, name in enumerate(classes):
        of_class = _files(str(folder / name), label)
        if not of_class:
            raise CondenseError(f"data folder '{folder}': class '{name}' has no images ({', '.join(SUFFIXES)})")
        files += of_class
    return files


def _list_folder(root: Path) -> _Listing:
    """Lists an image folder: ``train/<class>/*`` with ``test/`` (or ``val/``, ``valid/``, ``validation/``) of the same
    classes; without a test folder, or with class folders directly inside, every class is split. Classes are numbered in
    sorted order. Tiny ImageNet's own layout (its validation labels are in a text file) is known too.
    """
    what = f"data folder '{root}'"
    inside = _folders(root)
    tests = [name for name in ("test", "val", "valid", "validation") if name in inside]
    if tests and "train" not in inside:
        raise CondenseError(f"{what}: has {tests[0]}/ but no train/")
    train_folder = root / "train" if "train" in inside else root
    classes = tuple(_folders(train_folder))
    if not classes:
        with os.scandir(train_folder) as entries:
            state = "is empty" if next(entries, None) is None else "holds no class folders"
        raise CondenseError(
            f"data folder '{train_folder}' {state}; expected train/<class>/* and test/<class>/*, or <class>/*"
        )
    if len(classes) == 1:
        raise CondenseError(f"data folder '{train_folder}': only one class, '{classes[0]}'; give at least two")
    train = _class_files(train_folder, classes)
    if (root / "val" / "val_annotations.txt").is_file():
        return _Listing(root, classes, train, _annotated(root / "val", classes))
    if tests:
        test_folder = root / tests[0]
        others = _folders(test_folder)
        if set(others) != set(classes):
            only_train, only_test = sorted(set(classes) - set(others)), sorted(set(others) - set(classes))
            said = [
                f"{where}/ alone has {_some(names)}"
                for where, names in (("train", only_train), (tests[0], only_test))
                if names
            ]
            raise CondenseError(f"{what}: train/ and {tests[0]}/ differ in their classes: {'; '.join(said)}")
        return _Listing(root, classes, train, _class_files(test_folder, classes))
    rows = _stratified(np.array([file.label for file in train]), classes, what, "data")
    return _Listing(root, classes, [train[row] for row in rows[0]], [train[row] for row in rows[1]])


def read_images(folder: Path, options: DataOptions) -> tuple[tuple[str, ...], Split]:
    """Every image of ``<class>/*`` or ``train/<class>/*`` as one split, uint8, and the names of the class folders.

    For a distilled set in a folder: no class is cut into train and test, and nothing is kept in the cache.

    Raises:
        CondenseError: no class folders, or one of the files is no image or of another size.
    """
    if not folder.is_dir():
        raise CondenseError(f"'{folder}' is no folder; give one with <class>/* or train/<class>/*")
    inside = folder / "train"
    if not inside.is_dir() or not _folders(inside):  # a class may be called train
        inside = folder
    classes = tuple(_folders(inside))
    if not classes:
        raise CondenseError(f"'{folder}' holds no class folders; expected <class>/* or train/<class>/*")
    files = _class_files(inside, classes)
    mode = "L" if options.grey else "RGB" if options.grey is False else _majority(files)
    shape = _open(files[0].path, lambda image: _pixels(image, mode, options.resize)).shape
    chunks = list(_decode([file.path for file in files], shape, mode, options.resize))
    return classes, Split(np.concatenate(chunks), _labels_of(files))


def _annotated(folder: Path, classes: Sequence[str]) -> list[_File]:
    """Tiny ImageNet's validation images, by class and then by name."""
    numbers = {name: number for number, name in enumerate(classes)}
    label_of = {}
    for line in (folder / "val_annotations.txt").read_text().splitlines():
        name, wnid = line.split("\t")[:2]
        if wnid in numbers:
            label_of[name] = numbers[wnid]
    found = _files(str(folder / "images"), 0)
    labelled = [
        f._replace(label=label_of[os.path.basename(f.path)]) for f in found if os.path.basename(f.path) in label_of
    ]
    empty = sorted(set(range(len(classes))) - {file.label for file in labelled})
    if empty:
        raise CondenseError(f"data folder '{folder}': class '{classes[empty[0]]}' has no images")
    return sorted(labelled, key=lambda file: (file.label, file.path))


def _read_folder(listing: _Listing, options: DataOptions) -> Loaded:
    """The images of a folder, from the cache where the same files were decoded with the same options before."""
    lines = [json.dumps([CACHE_FORMAT, options.resize, options.grey, listing.classes])]
    start = len(str(listing.root))  # names are relative, so that a folder may be moved
    lines += [
        f"{part}\t{file.label}\t{file.path[start:]}\t{file.size}\t{file.changed}"
        for part, files in (("train", listing.train), ("test", listing.test))
        for file in files
    ]
    key = hashlib.blake2b("\n".join(lines).encode(errors="surrogateescape"), digest_size=16).hexdigest()
    directory = cache_dir() / "images" / key
    loaded = _open_cache(directory, listing)
    if loaded is not None:
        return loaded
    mode = "L" if options.grey else "RGB" if options.grey is False else _majority(listing.train)
    shape = _open(listing.train[0].path, lambda image: _pixels(image, mode, options.resize)).shape
    try:
        _fill_cache(directory, listing, shape, mode, options.resize)
        loaded = _open_cache(directory, listing)
        if loaded is not None:
            return loaded
        reason = "it cannot be read back"
    except OSError as error:
        reason = error.strerror or str(error)
    _log.warning("decoded images cannot be kept in %s (%s): they stay in memory", directory.parent, reason)
    stored: list[np.ndarray] = []

    def keep(chunks: Iterable[np.ndarray], count: int, part: str) -> Iterator[np.ndarray]:
        images, start = np.empty((count, *shape), np.uint8), 0
        stored.append(images)
        for chunk in chunks:
            images[start : start + len(chunk)] = chunk
            start += len(chunk)
            yield chunk

    fingerprint, mean, std = _decode_all(listing, shape, mode, options.resize, keep)
    train, test = (Split(images, _labels_of(files)) for images, files in zip(stored, (listing.train, listing.test)))
    return Loaded(listing.classes, train, test, mean, std, fingerprint)


def _majority(files: Sequence[_File]) -> str:
    """``"L"`` where more than half of a sample of the files (see ``MODE_SAMPLE``) is grey, else ``"RGB"``."""
    rows = np.unique(np.linspace(0, len(files) - 1, MODE_SAMPLE).astype(int))
    grey = sum(_open(files[row].path, lambda image: _is_grey(image.mode)) for row in rows)
    return "L" if 2 * grey > len(rows) else "RGB"


def _labels_of(files: Sequence[_File]) -> np.ndarray:
    return np.array([file.label for file in files], np.int64)


def _decode_all(
    listing: _Listing,
    shape: tuple[int, ...],
    mode: str,
    resize: int | None,
    keep: Callable[[Iterable[np.ndarray], int, str], Iterator[np.ndarray]],
) -> tuple[str, np.ndarray, np.ndarray]:
    """Decodes both splits, hands each chunk through ``keep(chunks, count, part)`` and measures it on the way."""

    def splits() -> Iterator[tuple[tuple[int, ...], np.dtype, Iterable[np.ndarray], np.ndarray]]:
        for part, files in (("train", listing.train), ("test", listing.test)):
            chunks = _progress(_decode([f.path for f in files], shape, mode, resize), len(files), f"decoding {part}")
            yield (len(files), *shape), np.dtype(np.uint8), keep(chunks, len(files), part), _labels_of(files)

    return _measure(listing.classes, splits())


def _open_cache(directory: Path, listing: _Listing) -> Loaded | None:
    """The cached images as read-only memory maps, or None where there are none, or none that are whole."""
    try:
        meta = json.loads((directory / "meta.json").read_text())
        train, test = (
            Split(np.load(directory / f"{part}.npy", mmap_mode="r", allow_pickle=False), _labels_of(files))
            for part, files in (("train", listing.train), ("test", listing.test))
        )
        if any(len(split.images) != len(split) for split in (train, test)):
            return None
        mean, std = np.array(meta["mean"]), np.array(meta["std"])
        return Loaded(listing.classes, train, test, mean, std, meta["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _fill_cache(directory: Path, listing: _Listing, shape: tuple[int, ...], mode: str, resize: int | None) -> None:
    """Decodes into a temporary folder that is renamed when it is whole, so that neither a kill nor a second process
    doing the same ever leaves half a cache.

    Raises:
        OSError: the cache cannot be written, or the disk is full.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    for left in directory.parent.glob(".tmp-*"):  # of processes that were killed
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > 86400:
                shutil.rmtree(left, ignore_errors=True)
    needed = (len(listing.train) + len(listing.test)) * math.prod(shape)
    if shutil.disk_usage(directory.parent).free < needed + 2**20:
        raise OSError(errno.ENOSPC, f"{needed >> 20} MiB needed, the disk is full")
    temporary = directory.parent / f".tmp-{uuid.uuid4().hex}"
    temporary.mkdir()

    def keep(chunks: Iterable[np.ndarray], count: int, part: str) -> Iterator[np.ndarray]:
        with open(temporary / f"{part}.npy", "wb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)}
            np.lib.format.write_array_header_1_0(file, header)
            for chunk in chunks:
                file.write(chunk.data)
                yield chunk
            _sync(file)

    try:
        fingerprint, mean, std = _decode_all(listing, shape, mode, resize, keep)
        with open(temporary / "meta.json", "w") as file:
            json.dump(
                {"fingerprint": fingerprint, "mean": mean.tolist(), "std": std.tolist(), "root": str(listing.root)},
                file,
            )
            _sync(file)
        if directory.exists():
            if _open_cache(directory, listing) is not None:  # another process was first
                return
            shutil.rmtree(directory)
        try:
            os.rename(temporary, directory)
        except OSError:
            if _open_cache(directory, listing) is None:
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
