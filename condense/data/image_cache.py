"""Decodes image folders into a cache of memory-mapped ``.npy`` files.

A cached folder is found by the names, sizes and modification times of its files. The cache lies under
:func:`condense.data.cache_dir`.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import logging
import math
import os
import shutil
import time
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from condense.data.decoding import decode_images, image_to_array, read_image
from condense.data.folders import DecodedFormat, FolderListing, ImageFile, decoded_format, labels_of, sampled_files
from condense.data.loaded import DataOptions, LoadedData, Split, cache_dir, measure_splits
from condense.device import check_host_memory
from condense.formatting import by
from condense.tracking import Progress

_log = logging.getLogger(__name__)

CACHE_FORMAT = 2
"""Version of the cache: raised if the same files and options decode to other pixels or to another layout."""

VERIFIED_BYTES = 4 * 2**30
"""Caches up to this size are compared with their checksums whenever they are opened, at about 2 GB a second."""


def read_folder(listing: FolderListing, options: DataOptions) -> LoadedData:
    """Reads the images of a folder, from the cache if the same files were decoded with the same options before.

    If the cache cannot be written, the images stay in memory and a warning is logged.
    """
    sizes = [options.resize]
    if options.crop is not None or options.test_resize is not None:  # earlier versions did not have them
        sizes += [options.crop, options.test_resize]
    lines = [json.dumps([CACHE_FORMAT, *sizes, options.grey, listing.classes, options.bits])]
    start = len(str(listing.root))  # relative names, so that the key does not change when the folder is moved
    lines += [
        f"{part}\t{file.label}\t{file.path[start:]}\t{file.size}\t{file.changed}"
        for part, files in (("train", listing.train), ("test", listing.test))
        for file in files
    ]
    key = hashlib.blake2b("\n".join(lines).encode(errors="surrogateescape"), digest_size=16).hexdigest()
    loaded = _read_files(listing, options, cache_dir() / "images" / key)
    if options.resizing("train") is None:
        return loaded
    return replace(loaded, train=replace(loaded.train, original=OriginalImages(listing.train, options)))


class OriginalImages:
    """Decodes files at their own size, see :attr:`Split.original`.

    Args:
        files: the files.
        options: options with which they were decoded before.
    """

    def __init__(self, files: Sequence[ImageFile], options: DataOptions) -> None:
        self.paths = np.array([os.fsencode(file.path) for file in files])  # half the memory of a list of texts
        self.sample = sampled_files(files)
        self.options = options

    @functools.cached_property
    def decoded(self) -> DecodedFormat:
        """Format to which the files were decoded."""
        return decoded_format(self.sample, self.options)

    def __call__(self, index: int) -> np.ndarray:
        path, decoded = os.fsdecode(self.paths[index]), self.decoded
        image: np.ndarray = read_image(path, lambda image: image_to_array(image, decoded.mode, None, decoded.white))
        return image


def _read_files(listing: FolderListing, options: DataOptions, directory: Path) -> LoadedData:
    """Reads the images from the cache in ``directory``, which is filled first if necessary."""
    loaded = _open_cache(directory, listing)
    if loaded is not None:
        return loaded
    decoded = decoded_format(listing.train, options)
    try:
        _fill_cache(directory, listing, decoded, options)
        loaded = _open_cache(directory, listing)
        if loaded is not None:
            return loaded
        reason = "it cannot be read back"
    except OSError as error:
        reason = error.strerror or str(error)
    _log.warning("decoded images cannot be kept in %s (%s): they stay in memory", directory.parent, reason)
    shape, count = decoded.shape, len(listing.train) + len(listing.test)
    check_host_memory(count * math.prod(shape), f"{count} images of {by(shape)}", "give a smaller resize=N")
    stored: list[np.ndarray] = []

    def keep(chunks: Iterable[np.ndarray], count: int, part: str) -> Iterator[np.ndarray]:
        images, start = np.empty((count, *shape), np.uint8), 0
        stored.append(images)
        for chunk in chunks:
            images[start : start + len(chunk)] = chunk
            start += len(chunk)
            yield chunk

    fingerprint, mean, std = _decode_all(listing, decoded, options, keep)
    train, test = (Split(images, labels_of(files)) for images, files in zip(stored, (listing.train, listing.test)))
    return LoadedData(listing.classes, train, test, mean, std, fingerprint, note=decoded.note)


def _decode_all(
    listing: FolderListing,
    decoded: DecodedFormat,
    options: DataOptions,
    keep: Callable[[Iterable[np.ndarray], int, str], Iterator[np.ndarray]],
) -> tuple[str, np.ndarray, np.ndarray]:
    """Decodes and measures both splits; ``keep(chunks, count, part)`` stores the chunks as they pass through."""

    def splits() -> Iterator[tuple[tuple[int, ...], np.dtype, Iterable[np.ndarray], np.ndarray]]:
        for part, files in (("train", listing.train), ("test", listing.test)):
            chunks = _progress(
                decode_images(
                    [file.path for file in files], decoded.shape, decoded.mode, options.resizing(part), decoded.white
                ),
                len(files),
                f"decoding {part}",
            )
            yield (len(files), *decoded.shape), np.dtype(np.uint8), keep(chunks, len(files), part), labels_of(files)

    return measure_splits(listing.classes, splits())


def _open_cache(directory: Path, listing: FolderListing) -> LoadedData | None:
    """Opens the cached images as read-only memory maps; returns None if the cache does not exist or is damaged."""
    try:
        meta = _without_digest((directory / "meta.json").read_text())
        files = [directory / f"{part}.npy" for part in ("train", "test")]
        if sum(file.stat().st_size for file in files) <= VERIFIED_BYTES and meta["crc32"] != _checksums(directory):
            return None
        train, test = (
            Split(np.load(directory / f"{part}.npy", mmap_mode="r", allow_pickle=False), labels_of(files))
            for part, files in (("train", listing.train), ("test", listing.test))
        )
        if any(len(split.images) != len(split) for split in (train, test)):
            return None
        mean, std = np.array(meta["mean"]), np.array(meta["std"])
        return LoadedData(listing.classes, train, test, mean, std, meta["fingerprint"], note=str(meta["note"]))
    except Exception:  # a damaged header raises errors of many types
        return None


def _checksums(directory: Path) -> dict[str, int]:
    """CRC-32 of the files of the images."""
    checksums = {}
    for part in ("train", "test"):
        checksums[part] = 0
        with open(directory / f"{part}.npy", "rb") as file:
            while block := file.read(1 << 22):
                checksums[part] = zlib.crc32(block, checksums[part])
    return checksums


def _with_digest(facts: dict[str, Any]) -> str:
    """The facts as JSON, with the SHA-256 of this JSON."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return json.dumps({**facts, "sha256": digest})


def _without_digest(text: str) -> dict[str, Any]:
    """Returns the facts of :func:`_with_digest`.

    Raises:
        ValueError: the digest differs.
    """
    facts = json.loads(text)
    facts.pop("sha256", None)
    if _with_digest(facts) != text:
        raise ValueError("the digest differs")
    return facts


def _fill_cache(directory: Path, listing: FolderListing, decoded: DecodedFormat, options: DataOptions) -> None:
    """Decodes into a temporary folder and renames it when it is complete.

    So neither a kill nor a second process that fills the same cache leaves an incomplete one.

    Raises:
        OSError: the cache cannot be written, or the disk is full.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    for abandoned in directory.parent.glob(".tmp-*"):  # from processes that were killed
        with contextlib.suppress(OSError):
            if time.time() - abandoned.stat().st_mtime > 86400:
                shutil.rmtree(abandoned, ignore_errors=True)
    needed = (len(listing.train) + len(listing.test)) * math.prod(decoded.shape)
    if shutil.disk_usage(directory.parent).free < needed + 2**20:
        raise OSError(errno.ENOSPC, f"{needed >> 20} MiB needed, the disk is full")
    temporary = directory.parent / f".tmp-{uuid.uuid4().hex}"
    temporary.mkdir()

    def keep(chunks: Iterable[np.ndarray], count: int, part: str) -> Iterator[np.ndarray]:
        with open(temporary / f"{part}.npy", "wb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": (count, *decoded.shape)}
            np.lib.format.write_array_header_1_0(file, header)
            for chunk in chunks:
                file.write(chunk.data)
                yield chunk
            _sync(file)

    try:
        fingerprint, mean, std = _decode_all(listing, decoded, options, keep)
        with open(temporary / "meta.json", "w") as file:
            facts = {
                "fingerprint": fingerprint,
                "mean": mean.tolist(),
                "std": std.tolist(),
                "root": str(listing.root),
                "note": decoded.note,
                "crc32": _checksums(temporary),
            }
            file.write(_with_digest(facts))
            _sync(file)
        if directory.exists():
            if _open_cache(directory, listing) is not None:  # another process has filled it
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
    """Writes the buffers of an open file to the disk."""
    file.flush()
    os.fsync(file.fileno())


def _progress(chunks: Iterable[np.ndarray], total: int, description: str) -> Iterator[np.ndarray]:
    """Yields the chunks and shows the progress on stderr."""
    progress, done = Progress(description, total, unit="image"), 0
    for chunk in chunks:
        yield chunk
        done += len(chunk)
        progress.update(done)
    progress.close()
