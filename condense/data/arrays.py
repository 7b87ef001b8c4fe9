"""Reads data from arrays: ``.npz`` and ``.h5`` files, mappings, and map-style torch datasets."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from condense.data.decoding import (
    FULL_RANGE,
    image_to_array,
    is_grey,
    largest_value,
    range_note,
    uses_16_bits,
    white_of,
)
from condense.data.loaded import DataOptions, LoadedData, Resizing, Split, format_some, from_splits, stratified_splits
from condense.device import check_host_memory
from condense.errors import CondenseError
from condense.formatting import by
from condense.hdf5 import check_self_contained, read_format

ALIASES = {
    "train_images": "x_train",
    "train_labels": "y_train",
    "test_images": "x_test",
    "test_labels": "y_test",
}
"""Names of the arrays, and the names that Keras uses for them."""

IMAGE_COLUMNS = ("image", "img", "images", "pixel_values", "picture", "png", "jpg", "jpeg", "webp")
"""Usual names of the column with the image in datasets whose items are rows, the most common first."""

LABEL_COLUMNS = ("label", "labels", "fine_label", "target", "class", "category", "cls")
"""Usual names of the column with the class."""

RANGE_SAMPLE = 1000
"""Maximum number of images of a dataset that decide the range of 16-bit images, evenly spaced."""


PARSE_SECONDS = 60
"""Time limit of the process that first parses an ``.h5`` file."""

_PARSE = """
import json, os, sys, time
sys.path[:] = json.loads(sys.argv[2])
import h5py
from condense.hdf5 import check_self_contained
try:
    import resource
    seconds = int(time.process_time() + 3 + os.path.getsize(sys.argv[1]) / 1e8)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))  # ends the process also without its parent
except (ImportError, ValueError):
    pass
try:
    with h5py.File(sys.argv[1], "r") as file:
        check_self_contained(sys.argv[1], file)
        file.attrs.get("format")
        if "classes" in file:
            file["classes"][()]
except Exception:
    pass
"""
"""Reads those parts of a file that are not plain arrays. Errors are left to the reader."""


def _check_parses(path: Path) -> None:
    """Parses an HDF5 file in another process, because the library may loop for ever, or crash, on damaged bytes.

    Raises:
        CondenseError: it does.
    """
    command = [sys.executable, "-c", _PARSE, str(path), json.dumps(sys.path)]
    try:
        ended = subprocess.run(command, capture_output=True, timeout=PARSE_SECONDS).returncode >= 0
    except subprocess.TimeoutExpired:
        ended = False
    if not ended:
        raise CondenseError(f"'{path}' cannot be read as arrays: it is damaged")


def read_array_file(path: Path) -> dict[str, Any]:
    """Reads the arrays of an ``.npz`` or ``.h5`` file that have one of our names. Nothing is unpickled.

    Raises:
        CondenseError: the file is damaged, is a distilled set, refers to other files, or its arrays do not fit in
            memory.
    """
    names = {*ALIASES, *ALIASES.values(), "classes"}
    try:
        if path.suffix.lower() == ".npz":
            with zipfile.ZipFile(path) as archive:  # no member unpacks to more than the size that it states
                needed = sum(entry.file_size for entry in archive.infolist() if Path(entry.filename).stem in names)
            check_host_memory(2 * needed, f"'{path}': the arrays", "give fewer or smaller images")
            with np.load(path, allow_pickle=False) as file:
                return {key: file[key] for key in file.files if key in names}
        import h5py

        _check_parses(path)
        if read_format(path) == "condense.distilled":
            raise CondenseError(f"'{path}' is a distilled set, not data to distil from")
        with h5py.File(path, "r") as file:
            check_self_contained(path, file)
            found = {key: file[key] for key in names & set(file) if isinstance(file[key], h5py.Dataset)}
            needed = sum(array.nbytes for array in found.values())
            check_host_memory(2 * needed, f"'{path}': the arrays", "give fewer or smaller images")
            return {key: _read_classes(array) if key == "classes" else array[()] for key, array in found.items()}
    except CondenseError:
        raise
    except Exception as error:  # BadZipFile, zlib.error, OSError, ValueError, ... for a damaged file
        reason = str(error).split("\n")[0] or type(error).__name__
        raise CondenseError(f"'{path}' cannot be read as arrays: {reason}") from error


def _read_classes(array: Any) -> Any:
    """Class names of an HDF5 file, as text or numbers."""
    return array.asstr("utf-8")[()] if array.dtype.kind in "OS" else array[()]


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
    classes = _class_names(arrays.get("classes"), train_labels, test_labels, where, options.drop_empty)
    note = ""
    if options.drop_empty:
        kept = np.unique(train_labels)
        known = np.isin(test_labels, kept)
        dropped = [name for number, name in classes.items() if number not in kept]
        if dropped or not known.all():
            note = f"classes without train images are left out: {format_some(dropped)} ({(~known).sum()} test images)"
        train_labels, test_labels = np.searchsorted(kept, train_labels), np.searchsorted(kept, test_labels[known])
        test_images = None if test_images is None else test_images[known]
        classes = {number: classes[label] for number, label in enumerate(kept.tolist())}
    names = tuple(classes.values())
    if len(names) < 2:
        raise CondenseError(f"{where}: only one class; give at least two")
    if test_images is None:
        train, test = stratified_splits(train_images, train_labels, names, where, "data")
    else:
        train, test = Split(train_images, train_labels), Split(test_images, test_labels)
    return replace(from_splits(names, train, test, options), note=note)


def to_array(values: Any) -> np.ndarray:
    """Converts anything array-like to numpy, including tensors on any device; floating-point tensors become float32.

    Raises:
        CondenseError: it is not an array, e.g. a sparse tensor or a list of arrays of different shapes.
    """
    try:
        if hasattr(values, "detach"):
            values = values.detach().cpu()
            values = values.float() if values.is_floating_point() else values
            values = values.numpy()
        return np.asarray(values)
    except (TypeError, ValueError, NotImplementedError) as error:
        reason = str(error).split("\n")[0][:200]
        raise CondenseError(f"data: a {type(values).__name__} cannot be used as an array: {reason}") from error


def check_images(splits: Sequence[Any], where: str) -> list[Any]:
    """Converts the images of train and test to (N,C,H,W), uint8 or float32 in [0,1]; None stays None.

    Images (N,H,W) are grey. With four axes the channel axis is the one of size 1 or 3 (the second axis, if both are).
    If neither is, the two axes of equal size are height and width, or else the smaller of the second and the last axis
    holds the channels (the second, if they are equal).
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
        elif images.ndim == 4 and _has_channels_last(images.shape[1:]):
            images = images.transpose(0, 3, 1, 2)
        if images.ndim != 4 or 0 in images.shape:
            raise CondenseError(
                f"{where}: {part} images of shape {images.shape}: give (N,C,H,W), (N,H,W,C) or (N,H,W), none of them 0"
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
            raise CondenseError(
                f"{where}: pixels must be uint8 or floats in [0,1], not {images.dtype} ({part} images); divide them by "
                "their largest possible value"
            )
        arrays[index] = np.ascontiguousarray(images)
    floats = [images for images in arrays if images is not None and images.dtype != np.uint8]
    if all(_is_quantised(images) for images in floats):
        return [images if images is None else _quantised(images) for images in arrays]
    return [images if images is None else _as_float(images) for images in arrays]


def _has_channels_last(shape: tuple[int, ...]) -> bool:
    """Whether the shape of one image is (H,W,C) and not (C,H,W); see :func:`check_images`."""
    first, second, last = shape
    if first in (1, 3) or last in (1, 3):
        return first not in (1, 3)
    if (first == second) != (second == last):
        return first == second
    return last < first


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
    if labels.ndim == 2 and labels.dtype.kind in "iubf" and np.isin(labels, (0, 1)).all():
        fix = (
            "give labels.argmax(1)"
            if (labels.sum(1) == 1).all()
            else "multi-label data are not supported, give one class"
        )
        raise CondenseError(
            f"{where}: {part} labels of shape {labels.shape} are not whole numbers of shape (N,); {fix}"
        )
    whole = labels.dtype.kind in "iub" or (labels.dtype.kind == "f" and np.array_equal(labels, np.rint(labels)))
    if labels.ndim != 1 or not whole:
        fix = "; number the names, e.g. by np.unique(labels, return_inverse=True)" if labels.dtype.kind in "USO" else ""
        raise CondenseError(
            f"{where}: {part} labels must be whole numbers of shape (N,), not {labels.dtype} {labels.shape}{fix}"
        )
    if len(labels) != count:
        raise CondenseError(f"{where}: {count} {part} images but {len(labels)} labels")
    for label in (labels.min(initial=0), labels.max(initial=0)):
        if not abs(float(label)) < 2**31:
            raise CondenseError(f"{where}: {part} labels must be 0..C-1, but one is {label}")
    return labels.astype(np.int64)


def _class_names(classes: Any, train: np.ndarray, test: np.ndarray, where: str, drop_empty: bool) -> dict[int, str]:
    """Returns the class names by label, by default the labels themselves.

    Labels must be 0..C-1, each with a train image. With ``drop_empty`` classes may lack train images.
    """
    low, high = int(min(train.min(), test.min(initial=0))), int(max(train.max(), test.max(initial=0)))
    if classes is None and drop_empty and low >= 0:
        return {label: str(label) for label in np.unique(np.concatenate([train, test])).tolist()}
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
    counts = np.bincount(train, minlength=len(names))
    if 0 in counts and len(names) > 1 and not drop_empty:
        empty = [
            f"{label} ('{names[label]}')" if classes is not None else str(label)
            for label in np.flatnonzero(counts == 0)
        ]
        raise CondenseError(
            f"{where}: no train images of class {format_some(empty)}; drop_empty=true leaves such classes out"
        )
    return dict(enumerate(names))


def read_torch_datasets(parts: Sequence[Any], options: DataOptions) -> LoadedData:
    """Loads map-style torch datasets (train, or train and test); reads every item once.

    Raises:
        CondenseError: an item is not (image, label), or images differ in shape or type.
    """
    arrays: dict[str, Any] = {}
    pixels = _PixelFormat("L" if options.grey else "RGB" if options.grey is False else None, options)
    for part, dataset in zip(("train", "test"), parts):
        pixels.resizing = options.resizing(part)
        images, labels = _collect(dataset, part, pixels)
        arrays |= {f"{part}_images": images, f"{part}_labels": labels}
    names = _names_of(parts[0])
    if names is not None:
        arrays["classes"] = names
    if pixels.has_decoded:
        options = replace(options, resize=None, crop=None, test_resize=None)  # done
    loaded = read_mapping(arrays, "data", options)
    return replace(loaded, note="; ".join(note for note in (loaded.note, pixels.note) if note))


def _names_of(dataset: Any) -> list[str] | None:
    """Class names that a torchvision or Hugging Face dataset states."""
    names = getattr(dataset, "classes", None)
    features = getattr(dataset, "features", None)
    if names is None and isinstance(features, Mapping) and len(dataset):
        label_key = _columns(features, features)[1]
        names = getattr(features.get(label_key), "names", None)
    valid = isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
    return list(names) if valid and names is not None else None


def _columns(item: Mapping[str, Any], features: Any) -> tuple[str | None, str | None]:
    """Names of the columns of a row with the image and its label, None for one that is not found.

    The types that a Hugging Face dataset states decide, then the usual names.
    """
    found: list[str | None] = []
    for kind, usual in (("Image", IMAGE_COLUMNS), ("ClassLabel", LABEL_COLUMNS)):
        typed = [key for key in features or () if type(features[key]).__name__ == kind and key in item]
        named = [key for key in usual if key in item]
        found.append(typed[0] if len(typed) == 1 else next(iter(named), None))
    return found[0], found[1]


class _PixelFormat:
    """How the PIL images of datasets are converted: decided by the first one, the same for train and test."""

    def __init__(self, mode: str | None, options: DataOptions) -> None:
        self.mode = mode
        self.resizing: Resizing | None = None
        self.has_decoded = False
        self.white = 2**options.bits - 1 if options.bits else None
        self.note = ""

    def decide(self, image: Any, dataset: Any, features: Any) -> None:
        """Chooses grey or RGB, and the range of 16-bit images from a sample of the dataset."""
        self.mode = self.mode or ("L" if is_grey(image.mode) else "RGB")
        if self.white is not None or not uses_16_bits(image):
            return
        rows = np.unique(np.linspace(0, len(dataset) - 1, RANGE_SAMPLE).astype(int))
        images = (_image_and_label(_item(dataset, int(row), "data"), features, "data")[0] for row in rows)
        self.white = white_of(max(largest_value(image) for image in images if hasattr(image, "convert")))
        self.note = range_note(self.white)

    def convert(self, image: Any) -> np.ndarray:
        assert self.mode is not None
        self.has_decoded = True
        return image_to_array(image, self.mode, self.resizing, self.white or FULL_RANGE)


def _image_and_label(item: Any, features: Any, where: str) -> tuple[Any, Any]:
    """The image and the label of an item: (image, label), or a row of named columns."""
    if isinstance(item, Mapping):
        image_key, label_key = _columns(item, features)
        if image_key is None or label_key is None:
            lacking = "image" if image_key is None else "label"
            names = format_some([str(key) for key in item])
            raise CondenseError(f"{where} has the columns {names}; rename the one with the {lacking} to '{lacking}'")
        return item[image_key], item[label_key]
    if not isinstance(item, (tuple, list)) or len(item) < 2:
        raise CondenseError(f"{where} is a {type(item).__name__}, not (image, label)")
    return item[0], item[1]


def _item(dataset: Any, index: int, where: str) -> Any:
    """An item of a user's dataset; whatever it raises is one line."""
    try:
        return dataset[index]
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CondenseError(f"{where} cannot be read from the {type(dataset).__name__}: {reason}") from error


def _collect(dataset: Any, part: str, pixels: _PixelFormat) -> tuple[np.ndarray, np.ndarray]:
    """Reads every image and label of a dataset.

    Args:
        dataset: map-style torch dataset of (image, label), or Hugging Face dataset with columns for these.
        part: ``train`` or ``test``, for messages.
        pixels: how PIL images are converted.

    Returns:
        Images (N,...), and labels int64 (N,).
    """
    count, features = len(dataset), getattr(dataset, "features", None)
    if count == 0:
        raise CondenseError(f"data: the {part} dataset is empty")
    images: np.ndarray | None = None
    labels = np.empty(count, np.int64)
    for index in tqdm(range(count), desc=f"reading {part}", unit=" images", file=sys.stderr, disable=None, leave=False):
        where = f"data: item {index} of the {part} dataset"
        image, label = _image_and_label(_item(dataset, index, where), features, where)
        if hasattr(image, "convert"):  # a PIL image
            if images is None:
                pixels.decide(image, dataset, features)
            try:
                image = pixels.convert(image)
            except ValueError as error:
                raise CondenseError(f"{where} cannot be read as an image: {error}") from error
        image = to_array(image)
        label = to_array(label)
        if label.size > 1:
            raise CondenseError(f"{where} has {label.size} labels; multi-label data are not supported, give one class")
        try:
            labels[index] = int(label.item())
        except (TypeError, ValueError, OverflowError) as error:
            raise CondenseError(f"{where} has the label {label.item()!r}, not a whole number") from error
        if labels[index] != label.item():
            raise CondenseError(f"{where} has the label {label.item()!r}, not a whole number")
        if images is None:
            check_host_memory(2 * count * image.nbytes, f"data: {count} images of {by(image.shape)}", "give resize=N")
            images = np.empty((count, *image.shape), image.dtype)
        if image.shape != images.shape[1:] or image.dtype != images.dtype:
            raise CondenseError(
                f"{where} is {image.dtype} {by(image.shape)}, the first one {images.dtype} "
                f"{by(images.shape[1:])}; resize them in the dataset's transform, or give resize=N"
            )
        images[index] = image
    assert images is not None
    return images, labels
