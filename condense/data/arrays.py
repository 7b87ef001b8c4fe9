"""TODO-DOC."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from condense.data.decoding import _is_grey, _pixels
from condense.data.loaded import DataOptions, Loaded, Split, _cut, _finish, _some, _stratified
from condense.errors import CondenseError
from condense.formatting import by

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
