"""Finding, decoding and caching real images: what a user calls DATA in, checked arrays out.

DATA is a registered name, an image folder, an ``.npz`` or ``.h5`` of arrays, or Python objects (arrays, tensors, torch
datasets). Importing this module pulls in neither torch nor PIL, so that names can be listed quickly.

Decoded folders are kept under :func:`cache_dir` as uint8 ``.npy`` files and memory-mapped on reuse. They are found by
the names, sizes and modification times of the files, and known by their content (:attr:`Loaded.fingerprint`).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from condense.errors import CondenseError, did_you_mean
from condense.registry import Registry
from condense.units import by

CACHE_FORMAT = 1
"""Raised whenever the same files and options would decode to other pixels or another cache layout."""
STD_FLOOR = 1e-3
"""Least per-channel standard deviation, for a constant channel."""
TEST_SHARE = 0.2
"""Share of each class that becomes the test split where the data brings none."""
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".ppm", ".tif", ".tiff")
MODE_SAMPLE = 1000
"""Grey or RGB is decided by the headers of at most this many train files, evenly spaced in file order."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataOptions:
    """How images are read; the same for every kind of data."""

    resize: int | None = None
    """Side in pixels: the shorter side is scaled to it (bilinear, antialiased), then the centre square is cut out."""
    grey: bool | None = None
    """True makes one grey channel, false RGB; left out, image folders follow the majority of their train files."""
    mirror: bool | None = None
    """Whether a mirror image keeps its class; left out, false for digits, mnist and svhn, true for everything else."""
    zca: bool = False
    """Train in the ZCA-whitened space (fitted on the train images) instead of dividing by mean and deviation."""

    def __post_init__(self) -> None:
        if self.resize is not None and self.resize < 1:
            raise CondenseError(f"resize={self.resize}: must be at least 1 pixel")


@dataclass(frozen=True)
class Split:
    """Images (N,C,H,W), uint8 or float32 in [0,1], possibly a read-only memory map, and their labels, int64 (N,)."""

    images: np.ndarray
    labels: np.ndarray
    rows: np.ndarray | None = None
    """Where the split has only some of ``images``: which, int64, one for each label."""

    def __len__(self) -> int:
        return len(self.labels)

    def at(self, ids: np.ndarray) -> Split:
        """The part of the split with these row numbers; images are not copied."""
        return Split(self.images, self.labels[ids], ids if self.rows is None else self.rows[ids])


@dataclass(frozen=True)
class Loaded:
    """Checked arrays and what is known of them."""

    classes: tuple[str, ...]
    train: Split
    test: Split
    mean: np.ndarray
    """Per-channel mean of the train pixels in [0,1], float64 (C,)."""
    std: np.ndarray
    """Per-channel standard deviation of the train pixels in [0,1], float64 (C,), at least ``STD_FLOOR``."""
    fingerprint: str
    """SHA-256 hex of class names, pixels and labels in order: equal for equal data, whatever the files are called."""
    name: str = "data"
    source: str | None = None
    mirror: bool = True


@dataclass(frozen=True)
class Named:
    """A registered data set."""

    name: str
    description: str
    read: Callable[[DataOptions, bool], Loaded]
    """``read(options, download)``."""
    mean: tuple[float, ...] | None = None
    """Published per-channel mean, used in place of the computed one; so is ``std``."""
    std: tuple[float, ...] | None = None
    mirror: bool = True


def cache_dir() -> Path:
    """Where decoded images are kept: ``CONDENSE_CACHE``, else ``~/.cache/condense``."""
    return Path(os.environ.get("CONDENSE_CACHE") or Path.home() / ".cache" / "condense")


def data_root() -> Path:
    """Where registered data sets are looked for and fetched to: ``CONDENSE_DATA``, else ``~/.cache/condense/data``."""
    return Path(os.environ.get("CONDENSE_DATA") or Path.home() / ".cache" / "condense" / "data")


def datasets() -> dict[str, str]:
    """The registered names, each with a line that describes it."""
    return {name: DATASETS.get(name).description for name in DATASETS.names()}


def read(data: str, options: DataOptions, *, download: bool = False) -> Loaded:
    """Loads DATA as typed by a user: a registered name, a folder, an ``.npz``/``.h5`` file, each also as ``NAME=DATA``.

    A registered name wins over a folder of that name; ``./cifar10`` means the folder.

    Raises:
        CondenseError: there is no such data, or it cannot be used; one line that says why.
    """
    given, equals, rest = data.partition("=")
    if equals and not os.path.exists(data):
        loaded = read(rest, options, download=download)
        return replace(loaded, name=check_name(given), source=f"{given}={loaded.source}")
    if data in DATASETS:
        return _read_named(DATASETS.get(data), options, download)
    path = Path(data).expanduser().absolute()
    try:
        if path.is_dir():
            loaded = _read_folder(_list_folder(path), options)
            name = path.resolve().name
        elif path.suffix.lower() in (".npz", ".h5", ".hdf5") and path.is_file():
            loaded = _read_mapping(_read_arrays(path), f"'{path}'", options)
            name = path.stem
        elif path.exists():
            raise CondenseError(f"data '{data}': give a folder of images, an .npz or an .h5 file")
        else:
            looks_like_a_path = os.sep in data or "." in data
            hint = "" if looks_like_a_path else f", and no registered name{did_you_mean(data, datasets())}"
            raise CondenseError(f"data '{data}': no such file or folder{hint}")
    except OSError as error:
        raise CondenseError(f"data '{data}': {error.strerror or error}: {error.filename or path}") from error
    return replace(loaded, name=re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._") or "data", source=str(path))


def read_objects(data: Any, options: DataOptions) -> Loaded:
    """Loads Python objects: ``(train_images, train_labels, test_images, test_labels)`` of arrays or tensors, a mapping
    of those names, ``(train_dataset, test_dataset)`` of map-style torch datasets, or the train part of either alone.

    Raises:
        CondenseError: the objects cannot be used; one line that says why.
    """
    if isinstance(data, Mapping):
        return _read_mapping(data, "data", options)
    parts = data if isinstance(data, (tuple, list)) else (data,)
    if len(parts) == 4 or (len(parts) == 2 and hasattr(parts[0], "dtype")):
        keys = ("train_images", "train_labels", "test_images", "test_labels")
        return _read_mapping(dict(zip(keys, parts)), "data", options)
    if len(parts) <= 2 and all(hasattr(part, "__getitem__") and hasattr(part, "__len__") for part in parts):
        return _read_datasets(parts, options)
    raise CondenseError(
        f"data of type {type(data).__name__} cannot be used: give (train_images, train_labels, test_images, "
        "test_labels), a dict of these, or one or two map-style torch datasets (train, test)"
    )


def check_name(name: str) -> str:
    """``name`` where it can stand in set names and records."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise CondenseError(f"name '{name}': use letters, digits, '.', '_' and '-'")
    return name


# --- What every kind of data shares -----------------------------------------------------------------------------------


def _measure(
    classes: Sequence[str], splits: Iterable[tuple[tuple[int, ...], np.dtype, Iterable[np.ndarray], np.ndarray]]
) -> tuple[str, np.ndarray, np.ndarray]:
    """Fingerprint of all splits, and mean and deviation of the first, from ``(shape, dtype, chunks of rows, labels)``.

    The sums of uint8 pixels are exact integers in float64, so they do not depend on the chunks.
    """
    digest = hashlib.sha256(json.dumps(["condense.data/1", list(classes)]).encode())
    mean = std = np.zeros(0)
    for index, (shape, dtype, chunks, labels) in enumerate(splits):
        digest.update(json.dumps([list(shape), dtype.name]).encode())
        total, squares = np.zeros(shape[1]), np.zeros(shape[1])
        for chunk in chunks:
            digest.update(chunk.data)
            if index == 0:
                values = chunk.astype(np.float64)
                total += values.sum(axis=(0, 2, 3))
                squares += np.multiply(values, values, out=values).sum(axis=(0, 2, 3))
        digest.update(labels.astype("<i8").data)
        if index == 0:
            unit = 255.0 if dtype == np.uint8 else 1.0
            pixels = shape[0] * shape[2] * shape[3]
            mean = total / pixels / unit
            variance = np.maximum(squares / pixels / unit**2 - mean**2, 0.0)
            std = np.maximum(np.sqrt(variance), STD_FLOOR)
    return digest.hexdigest(), mean, std


def _finish(classes: Sequence[str], train: Split, test: Split, options: DataOptions) -> Loaded:
    """Applies ``options`` to arrays (N,C,H,W) in memory and measures them."""
    splits = [Split(_adapt(split.images, options), split.labels) for split in (train, test)]
    parts = (
        (
            split.images.shape,
            split.images.dtype,
            (split.images[start : start + 1024] for start in range(0, len(split), 1024)),
            split.labels,
        )
        for split in splits
    )
    fingerprint, mean, std = _measure(classes, parts)
    return Loaded(tuple(classes), splits[0], splits[1], mean, std, fingerprint)


def _resized(height: int, width: int, side: int) -> tuple[int, int, int, int]:
    """(height, width) after scaling the shorter side to ``side``, then top and left of the centre square."""
    short = min(height, width)
    height, width = int(side * height / short), int(side * width / short)
    return height, width, round((height - side) / 2), round((width - side) / 2)


def _adapt(images: np.ndarray, options: DataOptions) -> np.ndarray:
    """Images (N,C,H,W) with the channels and the size that ``options`` ask for, in their own dtype, contiguous."""
    channels, height, width = images.shape[1:]
    side = options.resize
    to_grey, to_rgb = bool(options.grey) and channels == 3, options.grey is False and channels == 1
    resize = side is not None and (height, width) != (side, side)
    if not (to_grey or to_rgb or resize):
        return np.ascontiguousarray(images)

    import torch
    from torch.nn.functional import interpolate

    chunks = []
    for start in range(0, len(images), 1024):
        x = torch.from_numpy(np.ascontiguousarray(images[start : start + 1024])).float()
        if to_grey:
            x = (x * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)  # ITU-R 601, as PIL does
        if to_rgb:
            x = x.expand(-1, 3, -1, -1)
        if resize:
            assert side is not None
            high, wide, top, left = _resized(height, width, side)
            x = interpolate(x, size=(high, wide), mode="bilinear", antialias=True)
            x = x[:, :, top : top + side, left : left + side]
        x = x.round().clamp(0, 255).byte() if images.dtype == np.uint8 else x.clamp(0, 1)
        chunks.append(x.contiguous().numpy())
    return np.concatenate(chunks)


def _stratified(labels: np.ndarray, classes: Sequence[str], where: str, purpose: str) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers of the train and of the test part, each ascending: of every class, in an order drawn for its number
    and ``purpose``, the last ``TEST_SHARE`` (rounded, at least one image) is the test part."""
    from condense.rng import Draws

    train, test = [], []
    for number, name in enumerate(classes):
        rows = np.flatnonzero(labels == number)
        if len(rows) < 2:
            raise CondenseError(f"{where}: class '{name}' has {len(rows)} image(s), too few to split; give a test set")
        order = rows[Draws(purpose, "split", number).permutation(len(rows)).numpy()]
        count = max(1, int(TEST_SHARE * len(rows) + 0.5))
        train.append(order[:-count])
        test.append(order[-count:])
    return np.sort(np.concatenate(train)), np.sort(np.concatenate(test))


def _cut(images: np.ndarray, labels: np.ndarray, rows: tuple[np.ndarray, np.ndarray]) -> tuple[Split, Split]:
    train, test = (Split(images[part], labels[part]) for part in rows)
    return train, test


def _progress(chunks: Iterable[np.ndarray], total: int, what: str) -> Iterator[np.ndarray]:
    """The chunks again, with a bar on stderr where that is a terminal."""
    from tqdm import tqdm

    with tqdm(total=total, desc=what, unit=" images", file=sys.stderr, disable=None, leave=False) as bar:
        for chunk in chunks:
            yield chunk
            bar.update(len(chunk))


# --- Arrays -----------------------------------------------------------------------------------------------------------

_KEYS = {
    "train_images": "x_train",
    "train_labels": "y_train",
    "test_images": "x_test",
    "test_labels": "y_test",
}


def _read_arrays(path: Path) -> dict[str, Any]:
    """The arrays of an ``.npz`` or ``.h5`` file under our key names; nothing is unpickled."""
    wanted = {*_KEYS, *_KEYS.values(), "classes"}
    try:
        if path.suffix.lower() == ".npz":
            with np.load(path, allow_pickle=False) as file:
                return {key: file[key] for key in file.files if key in wanted}
        import h5py

        with h5py.File(path, "r") as file:
            if file.attrs.get("format") == "condense.distilled":
                raise CondenseError(f"'{path}' is a distilled set, not data to distil from")
            arrays: dict[str, Any] = {}
            for key in wanted & set(file):
                if isinstance(file[key], h5py.Dataset):
                    arrays[key] = file[key].asstr()[()] if key == "classes" else file[key][()]
            return arrays
    except CondenseError:
        raise
    except Exception as error:  # BadZipFile, zlib.error, OSError, ValueError, ...: a broken file raises anything
        reason = str(error).split("\n")[0] or type(error).__name__
        raise CondenseError(f"'{path}' cannot be read as arrays: {reason}") from error


def _read_mapping(arrays: Mapping[str, Any], where: str, options: DataOptions) -> Loaded:
    """Loads arrays by name; without test arrays, the train arrays are split (see :func:`_stratified`)."""
    found = {key: arrays.get(key, arrays.get(other)) for key, other in _KEYS.items()}
    missing = [key for key in ("train_images", "train_labels") if found[key] is None]
    if (found["test_images"] is None) != (found["test_labels"] is None):
        missing += [key for key in ("test_images", "test_labels") if found[key] is None]
    if missing:
        others = ", ".join(_KEYS[key] for key in missing)
        has = ", ".join(map(str, arrays)) or "none of the known keys"
        raise CondenseError(f"{where}: no {', '.join(missing)} (or {others}); it has {has}")
    train_images, test_images = _images([found["train_images"], found["test_images"]], where)
    train_labels = _labels(found["train_labels"], len(train_images), "train", where)
    if test_images is None:
        test_labels = train_labels[:0]
    else:
        test_labels = _labels(found["test_labels"], len(test_images), "test", where)
        if test_images.shape[1:] != train_images.shape[1:]:
            sizes = [by(images.shape[1:]) for images in (train_images, test_images)]
            raise CondenseError(f"{where}: train images are {sizes[0]} but test images {sizes[1]}")
    classes = _class_names(arrays.get("classes"), train_labels, test_labels, where)
    if test_images is None:
        rows = _stratified(train_labels, classes, where, "data")
        return _finish(classes, *_cut(train_images, train_labels, rows), options)
    return _finish(classes, Split(train_images, train_labels), Split(test_images, test_labels), options)


def _array(values: Any) -> np.ndarray:
    """A numpy array of anything array-like, tensors on any device included."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = values.float() if values.is_floating_point() else values
        values = values.numpy()
    return np.asarray(values)


def _images(given: Sequence[Any], where: str) -> list[Any]:
    """Arrays as (N,C,H,W), uint8 or float32 in [0,1]; ``None`` stays.

    (N,H,W) is grey. With four axes the channel axis is the one of size 1 or 3, and the second axis where both could be.
    Floats that are all k/255 (as torchvision's ToTensor makes them) become the uint8 that they came from: the same
    values in a quarter of the memory.
    """
    arrays = [None if values is None else _array(values) for values in given]
    for index, (images, part) in enumerate(zip(arrays, ("train", "test"))):
        if images is None:
            continue
        if images.ndim == 3:
            images = images[:, None]
        elif images.ndim == 4 and images.shape[1] not in (1, 3) and images.shape[3] in (1, 3):
            images = images.transpose(0, 3, 1, 2)
        if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
            raise CondenseError(
                f"{where}: {part} images of shape {images.shape}: give (N,C,H,W), (N,H,W,C) or (N,H,W), 1 or 3 channels"
            )
        if images.dtype.kind == "f":
            low, high = float(images.min()), float(images.max())
            if math.isnan(low) or math.isnan(high):
                raise CondenseError(f"{where}: {part} images hold NaN")
            if low < -1e-5 or high > 1 + 1e-5:  # antialiased resizing may round a little beyond 1
                raise CondenseError(
                    f"{where}: pixels must be uint8 or floats in [0,1]; drop Normalize from the dataset's transform – "
                    f"condense normalises itself ({part} pixels run from {low:.3g} to {high:.3g})"
                )
            images = np.clip(images.astype(np.float32), 0.0, 1.0)
        elif images.dtype != np.uint8:
            raise CondenseError(f"{where}: pixels must be uint8 or floats in [0,1], not {images.dtype} ({part} images)")
        arrays[index] = np.ascontiguousarray(images)
    floats = [images for images in arrays if images is not None and images.dtype != np.uint8]
    if all(_is_quantised(images) for images in floats):
        return [images if images is None else _quantised(images) for images in arrays]
    return [images if images is None else _as_float(images) for images in arrays]


def _quantised(images: np.ndarray) -> np.ndarray:
    return images if images.dtype == np.uint8 else np.rint(images * np.float32(255)).astype(np.uint8)


def _as_float(images: np.ndarray) -> np.ndarray:
    return images if images.dtype != np.uint8 else images.astype(np.float32) / np.float32(255)


def _is_quantised(images: np.ndarray) -> bool:
    rows = (images[start : start + 1024] for start in range(0, len(images), 1024))
    return all(np.array_equal(_as_float(_quantised(chunk)), chunk) for chunk in rows)


def _labels(values: Any, count: int, part: str, where: str) -> np.ndarray:
    """int64 (count,) from whole numbers of any type, a trailing axis of size 1 dropped."""
    labels = _array(values)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    whole = labels.dtype.kind in "iub" or (labels.dtype.kind == "f" and np.array_equal(labels, np.rint(labels)))
    if labels.ndim != 1 or not whole:
        raise CondenseError(
            f"{where}: {part} labels must be whole numbers of shape (N,), not {labels.dtype} {labels.shape}"
        )
    if len(labels) != count:
        raise CondenseError(f"{where}: {count} {part} images but {len(labels)} labels")
    return labels.astype(np.int64)


def _class_names(given: Any, train: np.ndarray, test: np.ndarray, where: str) -> tuple[str, ...]:
    """Checked class names, the label numbers where none are given; labels must be 0..C-1, each with a train image."""
    low, high = int(min(train.min(), test.min(initial=0))), int(max(train.max(), test.max(initial=0)))
    if given is None:
        names = [str(label) for label in range(high + 1)] if high < len(train) else []
    else:
        names = [
            name.decode() if isinstance(name, bytes) else str(name) for name in np.asarray(given).reshape(-1).tolist()
        ]
        if len(set(names)) != len(names):
            raise CondenseError(f"{where}: classes holds the same name twice")
    if low < 0 or high >= max(len(names), 1):
        limit = f"0..{len(names) - 1}" if names else "0..C-1 without holes"
        raise CondenseError(f"{where}: labels must be {limit}, but they run from {low} to {high}")
    if len(names) < 2:
        raise CondenseError(f"{where}: only one class; give at least two")
    counts = np.bincount(train, minlength=len(names))
    if 0 in counts:
        empty = [
            f"{label} ('{names[label]}')" if given is not None else str(label) for label in np.flatnonzero(counts == 0)
        ]
        raise CondenseError(f"{where}: no train images of class {_some(empty)}")
    return tuple(names)


def _some(names: Sequence[str], most: int = 5) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


# --- torch datasets ---------------------------------------------------------------------------------------------------


def _read_datasets(parts: Sequence[Any], options: DataOptions) -> Loaded:
    """Loads map-style torch datasets by asking for every item once."""
    arrays: dict[str, Any] = {}
    mode = "L" if options.grey else "RGB" if options.grey is False else None
    for part, dataset in zip(("train", "test"), parts):
        images, labels, mode = _collect(dataset, part, mode, options.resize)
        arrays |= {f"{part}_images": images, f"{part}_labels": labels}
    names = getattr(parts[0], "classes", None)
    if isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names):
        arrays["classes"] = list(names)
    return _read_mapping(arrays, "data", options)


def _collect(
    dataset: Any, part: str, mode: str | None, resize: int | None
) -> tuple[np.ndarray, np.ndarray, str | None]:
    """Every image and label of a dataset, and ``mode``, to which PIL images are converted (None: that of the first)."""
    from tqdm import tqdm

    count = len(dataset)
    if count == 0:
        raise CondenseError(f"data: the {part} dataset is empty")
    images: np.ndarray | None = None
    labels = np.empty(count, np.int64)
    for index in tqdm(range(count), desc=f"reading {part}", unit=" images", file=sys.stderr, disable=None, leave=False):
        where = f"data: item {index} of the {part} dataset"
        item = dataset[index]
        if not isinstance(item, (tuple, list)) or len(item) < 2:
            raise CondenseError(f"{where} is a {type(item).__name__}, not (image, label)")
        image, label = item[0], item[1]
        if hasattr(image, "convert"):  # a PIL image
            mode = mode or ("L" if _is_grey(image.mode) else "RGB")
            image = _pixels(image, mode, resize)
        image = _array(image)
        try:
            labels[index] = int(label)
        except (TypeError, ValueError) as error:
            raise CondenseError(f"{where} has the label {label!r}, not a whole number") from error
        if images is None:
            images = np.empty((count, *image.shape), image.dtype)
        if image.shape != images.shape[1:] or image.dtype != images.dtype:
            raise CondenseError(
                f"{where} is {image.dtype} {by(image.shape)}, the first one {images.dtype} "
                f"{by(images.shape[1:])}; resize them in the dataset's transform"
            )
        images[index] = image
    assert images is not None
    return images, labels, mode


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


def _is_grey(mode: str) -> bool:
    return mode in ("1", "L", "LA", "La", "F") or mode.startswith("I")


def _pixels(image: Any, mode: str, resize: int | None) -> np.ndarray:
    """uint8 (1,H,W) or (3,H,W) of a PIL image: upright, alpha dropped, 16-bit grey scaled to 8 bits.

    Raises:
        ValueError: the image has floating-point pixels, whose range nobody knows.
    """
    from PIL import Image, ImageOps

    if "exif" in image.info:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # PIL's own conversion clips 16 bits at 255
        image = Image.fromarray(((np.asarray(image).astype(np.int64).clip(0, 65535) + 128) // 257).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point pixels; save it with 8 or 16 bits")
    elif image.mode != mode and "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode != mode:
        image = image.convert(mode)
    if resize is not None and image.size != (resize, resize):
        high, wide, top, left = _resized(image.height, image.width, resize)
        image = image.resize((wide, high), Image.Resampling.BILINEAR).crop((left, top, left + resize, top + resize))
    array = np.asarray(image)
    return array[None] if mode == "L" else array.transpose(2, 0, 1)


def _open(path: str, use: Callable[[Any], Any]) -> Any:
    """``use(PIL image)``; whatever a broken file makes PIL raise becomes one line that names the file."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return use(image)
    except Exception as error:
        # PIL names the file in its own words as well: the part in front of the path is enough
        reason = "unknown format" if "cannot identify" in str(error) else str(error) or type(error).__name__
        raise CondenseError(f"'{path}' cannot be read as an image: {reason}") from error


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _decode(paths: Sequence[str], shape: tuple[int, ...], mode: str, resize: int | None) -> Iterator[np.ndarray]:
    """Chunks of decoded images in order, uint8 (n, *shape).

    Measured on two cores, CIFAR-10 as JPEG, µs an image: one process 97, two threads 145 (at 32x32 PIL holds the GIL
    for most of the time), two forked processes 65. Threads win from about 128x128 on (167 against 218; 512x512: 858
    against 1806). So processes are forked where that is safe (they touch neither torch nor a GPU), else threads used.

    Raises:
        CondenseError: a file is corrupt, or its size is not ``shape``.
    """
    rows = max(1, min(256, 2**20 // math.prod(shape)))
    spans = [range(start, min(start + rows, len(paths))) for start in range(0, len(paths), rows)]

    def chunk(span: range) -> np.ndarray:
        out = np.empty((len(span), *shape), np.uint8)
        for row, index in enumerate(span):
            image = _open(paths[index], lambda image: _pixels(image, mode, resize))
            if image.shape != shape:
                raise CondenseError(
                    f"images differ in size: '{paths[0]}' is {shape[2]}x{shape[1]} but '{paths[index]}' is "
                    f"{image.shape[2]}x{image.shape[1]}; give resize=N to bring all to NxN"
                )
            out[row] = image
        return out

    workers = min(_cores(), len(spans))
    if workers < 2 or multiprocessing.current_process().daemon:
        yield from map(chunk, spans)
    elif sys.platform == "linux":
        yield from _forked(chunk, spans, workers)
    else:
        with ThreadPoolExecutor(workers) as pool:
            yield from pool.map(chunk, spans)


def _forked(work: Callable[[range], np.ndarray], spans: Sequence[range], workers: int) -> Iterator[np.ndarray]:
    """``map(work, spans)`` in forked processes: worker w takes every ``workers``-th span and sends results down its own
    pipe, so they arrive in order, no worker runs far ahead, and all end when the parent is gone, even killed."""
    context = multiprocessing.get_context("fork")
    readers: list[Connection] = []
    processes = []
    try:
        for first in range(workers):
            reader, writer = context.Pipe(duplex=False)
            readers.append(reader)
            process = context.Process(
                target=_serve, args=(work, spans[first::workers], writer, list(readers)), daemon=True
            )
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore", DeprecationWarning
                )  # Python 3.12 warns of forking beside torch's threads
                process.start()
            writer.close()
            processes.append(process)
        for index in range(len(spans)):
            try:
                result = readers[index % workers].recv()
            except (EOFError, OSError) as error:
                raise RuntimeError("a process that decoded images was killed") from error
            if isinstance(result, str):
                raise CondenseError(result)
            yield result
    finally:
        for reader in readers:
            reader.close()
        for process in processes:
            process.terminate()
            process.join()


def _serve(
    work: Callable[[range], np.ndarray], spans: Sequence[range], writer: Connection, readers: Sequence[Connection]
) -> None:
    """What a forked worker does; an error is sent as its text."""
    for reader in readers:  # else a worker's pipe would stay open, and itself alive, after the parent is gone
        reader.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the workers; its own handlers are not for them
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        for span in spans:
            writer.send(work(span))
    except CondenseError as error:
        writer.send(str(error))
    except BrokenPipeError:
        pass


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


# --- Registered data sets ---------------------------------------------------------------------------------------------


def _read_named(entry: Named, options: DataOptions, download: bool) -> Loaded:
    """Loads a registered set; its published mean and deviation hold unless ``grey`` changed its channels."""
    try:
        loaded = replace(entry.read(options, download), name=entry.name, source=entry.name, mirror=entry.mirror)
    except OSError as error:
        reason = f"{error.strerror or error}: {error.filename or data_root()}"
        raise CondenseError(f"data '{entry.name}': {reason}") from error
    if entry.mean is None or len(entry.mean) != len(loaded.mean):
        return loaded
    return replace(loaded, mean=np.array(entry.mean), std=np.array(entry.std))


def _read_digits(options: DataOptions, download: bool) -> Loaded:
    from sklearn.datasets import load_digits

    found = load_digits()
    images = np.rint(found.images[:, None] * (255 / 16)).astype(np.uint8)
    labels = found.target.astype(np.int64)
    classes = [str(digit) for digit in range(10)]
    return _finish(classes, *_cut(images, labels, _stratified(labels, classes, "digits", "digits")), options)


def _torchvision(name: str, class_name: str, folder: str) -> Callable[[DataOptions, bool], Loaded]:
    """A reader for a set that torchvision reads and can fetch; its files lie in ``folder`` below the data root."""

    def read(options: DataOptions, download: bool) -> Loaded:
        import torchvision.datasets

        make = getattr(torchvision.datasets, class_name)
        root = data_root() / folder
        if download:
            root.mkdir(parents=True, exist_ok=True)
        parts = []
        for part in ("train", "test"):
            which = {"split": part} if class_name == "SVHN" else {"train": part == "train"}
            try:
                with contextlib.redirect_stdout(sys.stderr):
                    parts.append(make(str(root), download=download, **which))
            except Exception as error:
                if download:
                    reason = str(getattr(error, "reason", error)).split("\n")[0]
                    raise CondenseError(f"data '{name}' could not be downloaded to {root}: {reason}") from error
                if isinstance(error, (RuntimeError, OSError)):  # what torchvision raises for absent or damaged files
                    raise CondenseError(
                        f"data '{name}' is not, or not whole, in {root} (CONDENSE_DATA sets the place); "
                        "--download fetches it"
                    ) from error
                raise
        images = _images([part.data for part in parts], f"data '{name}'")
        labels = [_array(part.labels if class_name == "SVHN" else part.targets).astype(np.int64) for part in parts]
        classes = getattr(parts[0], "classes", None) or [str(digit) for digit in range(10)]
        return _finish(classes, Split(images[0], labels[0]), Split(images[1], labels[1]), options)

    return read


def _read_tiny_imagenet(options: DataOptions, download: bool) -> Loaded:
    folder = data_root() / "tiny-imagenet-200"
    if not (folder / "wnids.txt").is_file():
        raise CondenseError(
            f"data 'tiny-imagenet' is not in {folder} (CONDENSE_DATA sets the place); fetch tiny-imagenet-200.zip from "
            f"http://cs231n.stanford.edu/tiny-imagenet-200.zip and unzip it into {data_root()}"
        )
    listing = _list_folder(folder)
    if set(listing.classes) != set((folder / "wnids.txt").read_text().split()):
        raise CondenseError(f"data 'tiny-imagenet': the classes in {folder / 'train'} are not those of wnids.txt")
    return _read_folder(listing, options)


DATASETS: Registry[Named] = Registry("data set")

for _entry in (
    Named("digits", "scikit-learn's 1,797 handwritten digits, 1x8x8, embedded", _read_digits, mirror=False),
    Named(
        "mnist",
        "70,000 handwritten digits, 1x28x28",
        _torchvision("mnist", "MNIST", "."),
        (0.1307,),
        (0.3081,),
        mirror=False,
    ),
    Named(
        "fashion-mnist",
        "70,000 pieces of clothing in 10 classes, 1x28x28",
        _torchvision("fashion-mnist", "FashionMNIST", "."),
        (0.2861,),
        (0.3530,),
    ),
    Named(
        "svhn",
        "99,289 house-number digits (without the extra ones), 3x32x32",
        _torchvision("svhn", "SVHN", "svhn"),
        (0.4377, 0.4438, 0.4728),
        (0.1980, 0.2010, 0.1970),
        mirror=False,
    ),
    Named(
        "cifar10",
        "60,000 photographs in 10 classes, 3x32x32",
        _torchvision("cifar10", "CIFAR10", "."),
        (0.4914, 0.4822, 0.4465),
        (0.2023, 0.1994, 0.2010),
    ),
    Named(
        "cifar100",
        "60,000 photographs in 100 classes, 3x32x32",
        _torchvision("cifar100", "CIFAR100", "."),
        (0.5071, 0.4866, 0.4409),
        (0.2673, 0.2564, 0.2762),
    ),
    Named(
        "tiny-imagenet",
        "110,000 photographs in 200 classes, 3x64x64; the official validation images are the test split",
        _read_tiny_imagenet,
        (0.485, 0.456, 0.406),
        (0.229, 0.224, 0.225),
    ),
):
    DATASETS.add(_entry.name, _entry)
