"""Reads data from arrays: ``.npz`` and ``.h5`` files, mappings, and map-style torch datasets."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from condense.data.decoding import image_to_array, is_grey
from condense.data.loaded import DataOptions, LoadedData, Split, format_some, from_splits, stratified_splits
from condense.errors import CondenseError
from condense.formatting import by

ALIASES = {
    "train_images": "x_train",
    "train_labels": "y_train",
    "test_images": "x_test",
    "test_labels": "y_test",
}
"""Names of the arrays, and the names that Keras uses for them."""


def read_array_file(path: Path) -> dict[str, Any]:
    """Reads the arrays of an ``.npz`` or ``.h5`` file that have one of our names. Nothing is unpickled.

    Raises:
        CondenseError: the file is damaged or is a distilled set.
    """
    names = {*ALIASES, *ALIASES.values(), "classes"}
    try:
        if path.suffix.lower() == ".npz":
            with np.load(path, allow_pickle=False) as file:
                return {key: file[key] for key in file.files if key in names}
        import h5py

        with h5py.File(path, "r") as file:
            if file.attrs.get("format") in ("condense.distilled", b"condense.distilled"):
                raise CondenseError(f"'{path}' is a distilled set, not data to distil from")
            arrays: dict[str, Any] = {}
            for key in names & set(file):
                if isinstance(file[key], h5py.Dataset):
                    arrays[key] = file[key].asstr()[()] if key == "classes" else file[key][()]
            return arrays
    except CondenseError:
        raise
    except Exception as error:  # BadZipFile, zlib.error, OSError, ValueError, ... for a damaged file
        reason = str(error).split("\n")[0] or type(error).__name__
        raise CondenseError(f"'{path}' cannot be read as arrays: {reason}") from error


def read_mapping(arrays: Mapping[str, Any], where: str, options: DataOptions) -> LoadedData:
    """Loads arrays by name. Without test arrays, the train arrays are split (see :func:`stratified_rows`).

    Raises:
        CondenseError: an array is missing or has a wrong shape, type or range.
    """
    values = {key: arrays.get(key, arrays.get(alias)) for key, alias in ALIASES.items()}
    missing = [key for key in ("train_images", "train_labels") if values[key] is None]
    if (values["test_images"] is None) != (values["test_labels"] is None):
        missing += [key for key in ("test_images", "test_labels") if values[key] is None]
    if missing:
        aliases = ", ".join(ALIASES[key] for key in missing)
        present = ", ".join(map(str, arrays)) or "none of the known keys"
        raise CondenseError(f"{where}: no {', '.join(missing)} (or {aliases}); it has {present}")
    train_images, test_images = check_images([values["train_images"], values["test_images"]], where)
    train_labels = _labels(values["train_labels"], len(train_images), "train", where)
    if test_images is None:
        test_labels = train_labels[:0]
    else:
        test_labels = _labels(values["test_labels"], len(test_images), "test", where)
        if test_images.shape[1:] != train_images.shape[1:]:
            sizes = [by(images.shape[1:]) for images in (train_images, test_images)]
            raise CondenseError(f"{where}: train images are {sizes[0]} but test images {sizes[1]}")
    classes = _class_names(arrays.get("classes"), train_labels, test_labels, where)
    if test_images is None:
        return from_splits(classes, *stratified_splits(train_images, train_labels, classes, where, "data"), options)
    return from_splits(classes, Split(train_images, train_labels), Split(test_images, test_labels), options)


def to_array(values: Any) -> np.ndarray:
    """Converts anything array-like to numpy, including tensors on any device; floating-point tensors become float32."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = values.float() if values.is_floating_point() else values
        values = values.numpy()
    return np.asarray(values)


def check_images(splits: Sequence[Any], where: str) -> list[Any]:
    """Converts the images of train and test to (N,C,H,W), uint8 or float32 in [0,1]; None stays None.

    Images (N,H,W) are grey. With four axes the channel axis is the one of size 1 or 3; the second axis, if both are.
    If all floats are k/255, as torchvision's ToTensor makes them, they become uint8: the same values in a quarter of
    the memory.

    Raises:
        CondenseError: another shape or type, NaN, or pixels outside [0,1].
    """
    arrays = [None if values is None else to_array(values) for values in splits]
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
            if low < -1e-5 or high > 1 + 1e-5:  # antialiased resizing may round beyond 1
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
    """Converts labels to int64 (count,). They may be whole numbers of any type, with a trailing axis of size 1."""
    labels = to_array(values)
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


def _class_names(classes: Any, train: np.ndarray, test: np.ndarray, where: str) -> tuple[str, ...]:
    """Returns the class names, by default the label numbers. Labels must be 0..C-1, each with a train image."""
    low, high = int(min(train.min(), test.min(initial=0))), int(max(train.max(), test.max(initial=0)))
    if classes is None:
        names = [str(label) for label in range(high + 1)] if high < len(train) else []
    else:
        names = [
            name.decode() if isinstance(name, bytes) else str(name) for name in np.asarray(classes).reshape(-1).tolist()
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
            f"{label} ('{names[label]}')" if classes is not None else str(label)
            for label in np.flatnonzero(counts == 0)
        ]
        raise CondenseError(f"{where}: no train images of class {format_some(empty)}")
    return tuple(names)


def read_torch_datasets(parts: Sequence[Any], options: DataOptions) -> LoadedData:
    """Loads map-style torch datasets (train, or train and test); reads every item once.

    Raises:
        CondenseError: an item is not (image, label), or images differ in shape or type.
    """
    arrays: dict[str, Any] = {}
    mode = "L" if options.grey else "RGB" if options.grey is False else None
    for part, dataset in zip(("train", "test"), parts):
        images, labels, mode = _collect(dataset, part, mode, options.resize)
        arrays |= {f"{part}_images": images, f"{part}_labels": labels}
    names = getattr(parts[0], "classes", None)
    if isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names):
        arrays["classes"] = list(names)
    return read_mapping(arrays, "data", options)


def _collect(
    dataset: Any, part: str, mode: str | None, resize: int | None
) -> tuple[np.ndarray, np.ndarray, str | None]:
    """Reads every image and label of a dataset.

    Args:
        dataset: map-style torch dataset of (image, label).
        part: ``train`` or ``test``, for messages.
        mode: mode that PIL images are converted to; None: that of the first image.
        resize: side in pixels of the centre square, or None.

    Returns:
        Images (N,...), labels int64 (N,), and the mode.
    """
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
            mode = mode or ("L" if is_grey(image.mode) else "RGB")
            image = image_to_array(image, mode, resize)
        image = to_array(image)
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
