"""Checked arrays in memory: their options, their splits, and the statistics that identify them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.functional import interpolate

from condense.config import require_one_of
from condense.device import check_host_memory
from condense.errors import CondenseError, did_you_mean
from condense.formatting import by, shorten
from condense.rng import Draws

STD_FLOOR = 1e-3
"""Minimum standard deviation of a channel, for constant channels."""

CHUNK_VALUES = 2**28
"""Maximum number of values that are converted at once, at least those of one image."""

PIECE_VALUES = 2**26
"""Number of uint8 values that are summed at once."""

MAX_SIDE = 1024
"""Side in pixels to which images of any size may be enlarged."""

MAX_ENLARGEMENT = 4
"""Factor by which larger images may be enlarged."""

TEST_SHARE = 0.2
"""Share of each class that becomes the test split if the data have none."""


class Resizing(NamedTuple):
    """Scaling of images, and the square that is cut out of their centre."""

    shorter: int
    """Pixels to which the shorter side is scaled."""
    side: int
    """Side of the square in pixels."""


def parse_channels(name: str, text: str) -> tuple[float, ...]:
    """Numbers of an option with one number for each channel, joined by commas.

    Raises:
        CondenseError: a part is no finite number.
    """
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or not all(np.isfinite(values)):
        raise CondenseError(f"{name}={shorten(text, 100)}: write numbers joined by commas, e.g. 0.4914,0.4822,0.4465")
    return values


ORDERS = ("hardest", "easiest", "middle")
"""Ways to take a share of images by a score."""


@dataclass(frozen=True)
class DataOptions:
    """Options for reading images; the same for every kind of data."""

    resize: int | None = None
    """Pixels: the shorter side is scaled to so many (bilinear, antialiased), then the centre square is cut out."""
    crop: int | None = None
    """Side in pixels of that square, e.g. resize=256 crop=224; by default resize."""
    test_resize: int | None = None
    """Instead of resize for test images, e.g. crop=64 test_resize=72; by default the same."""
    grey: bool | None = None
    """True makes one grey channel, false RGB. By default, image folders follow the majority of their train files."""
    mirror: bool | None = None
    """Whether a mirror image keeps its class. By default false for digits, mnist and svhn, true for all other data."""
    zca: bool = False
    """Train in ZCA-whitened space (fitted on the train images) instead of standardising by mean and std."""
    split: str | None = None
    """Parts of an image folder, TRAIN or TRAIN,TEST, where their names are unusual or ambiguous, e.g. learn,holdout.
    Without TEST, a fifth of each class is the test split. CLASS stands for the class folders where these are not
    directly inside a part: CLASS/images takes only the images in this sub-folder of each class, CLASS makes every
    folder a class with all images below it."""
    bits: int | None = None
    """Bits that the values of 16-bit image files use: 2**bits - 1 becomes white. By default the smallest of 8, 10, 12,
    14 and 16 that holds the values of the train images."""
    drop_empty: bool = False
    """Leave out classes without train images instead of refusing the data, and accept classes without test images."""

    unlabelled: bool = False
    """Read all images below a folder as one class, for methods that need no classes (krrst). A fifth are the test
    split."""
    repeat_small: bool = False
    """Repeat the train images of classes with fewer than ipc images while a set is distilled, instead of refusing."""
    normalise: str | None = None
    """Name of the registered data, or imagenet, whose mean and std standardise the images. By default those of a data
    set with a registered name, else those of the train pixels."""
    mean: str | None = None
    """Mean in [0,1] of each channel, e.g. 0.4914,0.4822,0.4465, instead; goes with std."""
    std: str | None = None
    """Std of each channel, e.g. 0.2023,0.1994,0.2010; goes with mean."""
    prune: str | None = None
    """A file of `condense scores`: methods distil from a share of each class of the train images, chosen by a score.
    Students and control arms of an evaluation have all images."""
    prune_keep: float | None = None
    """The share of each class that is kept, e.g. 0.2; goes with prune."""
    prune_order: str = "easiest"
    """Images that are kept: easiest, hardest or middle (around the median)."""
    prune_score: str = "el2n"
    """Score by which images are easy or hard."""

    def __post_init__(self) -> None:
        for name in ("resize", "crop", "test_resize"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise CondenseError(f"{name}={value}: must be at least 1 pixel")
        if self.test_resize is not None and self.crop is None and self.resize is None:
            raise CondenseError(f"test_resize={self.test_resize}: give crop=N too, the side of all images")
        for shorter, side in filter(None, map(self.resizing, ("train", "test"))):
            if side > shorter:
                raise CondenseError(f"crop={side}: must be at most the {shorter} pixels to which images are scaled")
        self._check_normalisation()
        self._check_pruning()
        if self.bits is not None and not 1 <= self.bits <= 16:
            raise CondenseError(f"bits={self.bits}: must be 1 to 16")
        if self.split is not None:
            parse_split(self.split)

    def _check_normalisation(self) -> None:
        if (self.mean is None) != (self.std is None):
            raise CondenseError("mean= and std= go together; give both")
        if self.normalise is not None and self.mean is not None:
            raise CondenseError(f"normalise={self.normalise}: goes without mean= and std=")
        if self.zca and (self.normalise is not None or self.mean is not None):
            raise CondenseError("zca=true: replaces mean and std; leave normalise=, mean= and std= out")
        if self.mean is not None and self.std is not None:
            mean, std = parse_channels("mean", self.mean), parse_channels("std", self.std)
            if len(mean) != len(std) or min(std) <= 0:
                raise CondenseError(f"std={self.std}: give one number above 0 for each of the {len(mean)} of mean=")

    def _check_pruning(self) -> None:
        if (self.prune is None) != (self.prune_keep is None):
            raise CondenseError("prune= and prune_keep= go together; give both, e.g. prune=scores.h5 prune_keep=0.2")
        if self.prune_keep is not None and not 0 < self.prune_keep <= 1:
            raise CondenseError(f"prune_keep={self.prune_keep:g}: must be more than 0 and at most 1")
        require_one_of(self, prune_order=ORDERS)

    def resizing(self, part: str) -> Resizing | None:
        """How the images of ``train`` or ``test`` are scaled and cropped; None if they are not."""
        shorter = (self.test_resize if part == "test" else None) or self.resize or self.crop
        side = self.crop or self.resize
        return None if shorter is None or side is None else Resizing(shorter, side)

    def to_dict(self) -> dict[str, Any]:
        """The options as stored in files. Those that old versions do not have are omitted at their default."""
        added: dict[str, Any] = {"drop_empty": False, "repeat_small": False}
        added |= dict.fromkeys(("split", "bits", "crop", "test_resize", "normalise", "mean", "std", "prune"))
        added |= {"prune_keep": None, "prune_order": "easiest", "prune_score": "el2n"}
        return {key: value for key, value in asdict(self).items() if key not in added or value != added[key]}


PRUNING_OPTIONS = ("prune", "prune_keep", "prune_order", "prune_score")
"""Options that choose the train images of a method, and nothing of its evaluation."""

CLASS_WORD = "CLASS"
"""Stands for the class folders in the option ``split``."""


class PartFolder(NamedTuple):
    """A part of an image folder: its class folders are in ``head``, the images of each in its sub-folder ``tail``."""

    head: tuple[str, ...]
    tail: tuple[str, ...] = ()


def parse_split(text: str) -> list[PartFolder]:
    """The one or two parts of the option ``split``.

    Raises:
        CondenseError: it is not TRAIN or TRAIN,TEST, or a part lies outside the folder.
    """
    parts = []
    for part in text.split(","):
        names = tuple(part.strip().strip("/").split("/"))
        if part.strip().startswith("/") or any(name in ("", ".", "..") for name in names):
            raise CondenseError(f"split={text}: write TRAIN or TRAIN,TEST, names of folders inside the data folder")
        at = names.index(CLASS_WORD) if CLASS_WORD in names else len(names)
        parts.append(PartFolder(names[:at], names[at + 1 :]))
    if len(parts) > 2:
        raise CondenseError(f"split={text}: write TRAIN or TRAIN,TEST, not {len(parts)} folders")
    return parts


@dataclass(frozen=True)
class Split:
    """Images (N,C,H,W), uint8 or float32 in [0,1], possibly a read-only memory map, and their labels, int64 (N,)."""

    images: np.ndarray
    labels: np.ndarray
    rows: np.ndarray | None = None
    """Indices into ``images``, int64, one per label, if the split uses only some of them; None: all, in order."""
    original: Callable[[int], np.ndarray] | None = None
    """Returns one of ``images`` by its index as it was before it was scaled and cropped, uint8 or float32 in [0,1]
    (C,H,W) of any height and width; None if images were not scaled, or their source is not kept."""

    def __len__(self) -> int:
        return len(self.labels)

    def at(self, ids: np.ndarray) -> Split:
        """Returns the part of the split with these row numbers. Images are not copied."""
        return replace(self, labels=self.labels[ids], rows=ids if self.rows is None else self.rows[ids])


@dataclass(frozen=True)
class LoadedData:
    """Checked arrays with their classes, statistics and origin."""

    classes: tuple[str, ...]
    train: Split
    test: Split
    mean: np.ndarray
    """Per-channel mean of the train pixels in [0,1], float64 (C,)."""
    std: np.ndarray
    """Per-channel standard deviation of the train pixels in [0,1], float64 (C,), at least ``STD_FLOOR``."""
    fingerprint: str
    """SHA-256 hex of class names, pixels and labels in order. It does not depend on file names."""
    name: str = "data"
    source: str | None = None
    mirror: bool = True
    note: str = ""
    """What was chosen while reading that a user should know; shown once."""


def cache_dir() -> Path:
    """Folder of the cache: ``CONDENSE_CACHE``, or ``~/.cache/condense`` if that is not set."""
    return Path(os.environ.get("CONDENSE_CACHE") or Path.home() / ".cache" / "condense")


def data_root() -> Path:
    """Folder of registered data sets: ``CONDENSE_DATA``, or ``~/.cache/condense/data`` if that is not set."""
    return Path(os.environ.get("CONDENSE_DATA") or Path.home() / ".cache" / "condense" / "data")


def check_class_names(classes: tuple[str, ...], where: str) -> tuple[str, ...]:
    """Returns the class names if the manifest of a set may contain them.

    Raises:
        CondenseError: one is empty or is not Unicode, as that of a folder in another encoding, or two are equal.
    """
    for name in classes:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise CondenseError(f"{where}: the class name {name!a} is not UTF-8; rename it") from None
    if "" in classes or len(set(classes)) < len(classes):
        twice = next((name for name in classes if classes.count(name) > 1), "")
        raise CondenseError(f"{where}: " + (f"two classes are called '{twice}'" if twice else "a class has no name"))
    return classes


def class_numbers(names: Sequence[str], classes: Sequence[str], where: str) -> list[int]:
    """Numbers of the classes ``names`` among ``classes``.

    Raises:
        CondenseError: a name is unknown or given twice, or fewer than two are given.
    """
    if isinstance(names, str):
        raise CondenseError(f"classes: give a list of names of {where}, not the text '{names}'")
    for name in names:
        if name not in classes:
            raise CondenseError(f"classes: '{name}' is no class of {where}{did_you_mean(name, classes)}")
    if len(set(names)) < max(2, len(names)):
        raise CondenseError(f"classes={','.join(map(str, names))}: give at least two different classes of {where}")
    return [list(classes).index(name) for name in names]


def selected_fingerprint(fingerprint: str, names: Sequence[str]) -> str:
    """Fingerprint of some classes of data: SHA-256 of theirs and of the names."""
    return hashlib.sha256(json.dumps([fingerprint, list(names)]).encode()).hexdigest()


def measure_splits(
    classes: Sequence[str], splits: Iterable[tuple[tuple[int, ...], np.dtype, Iterable[np.ndarray], np.ndarray]]
) -> tuple[str, np.ndarray, np.ndarray]:
    """Computes the fingerprint of all splits, and the mean and std of the first.

    The sums of uint8 pixels are exact integers in float64, so the result does not depend on the chunks.

    Args:
        classes: class names.
        splits: ``(shape, dtype, chunks of rows, labels)`` of each split.

    Returns:
        SHA-256 hex, and mean and std of the pixels in [0,1], float64 (C,).
    """
    digest = hashlib.sha256(json.dumps(["condense.data/1", list(classes)]).encode())
    mean = std = np.zeros(0)
    for index, (shape, dtype, chunks, labels) in enumerate(splits):
        digest.update(json.dumps([list(shape), dtype.name]).encode())
        total, squares = np.zeros(shape[1]), np.zeros(shape[1])
        for chunk in chunks:
            digest.update(chunk.data)
            pieces = chunk.size // PIECE_VALUES + 1 if dtype == np.uint8 else 1
            for piece in np.array_split(chunk, pieces, axis=2) if index == 0 else ():
                values = piece.astype(np.float64)
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


def from_splits(classes: Sequence[str], train: Split, test: Split, options: DataOptions) -> LoadedData:
    """Applies ``options`` to arrays (N,C,H,W) in memory and measures them."""
    splits = [
        Split(_convert(split.images, options, options.resizing(part)), split.labels)
        for part, split in (("train", train), ("test", test))
    ]
    if options.resizing("train") is not None and splits[0].images is not train.images:
        splits[0] = replace(splits[0], original=OriginalArrays(train.images, options))
    parts = (
        (
            split.images.shape,
            split.images.dtype,
            (split.images[start : start + 1024] for start in range(0, len(split), 1024)),
            split.labels,
        )
        for split in splits
    )
    fingerprint, mean, std = measure_splits(classes, parts)
    return LoadedData(tuple(classes), splits[0], splits[1], mean, std, fingerprint)


class OriginalArrays:
    """Images in memory at their own size, see :attr:`Split.original`.

    Args:
        images: (N,C,H,W).
        options: options with which they were converted before.
    """

    def __init__(self, images: np.ndarray, options: DataOptions) -> None:
        self.images, self.options = images, options

    def __call__(self, index: int) -> np.ndarray:
        return _convert(self.images[index : index + 1], self.options, None)[0]


def resized_box(height: int, width: int, resizing: Resizing) -> tuple[int, int, int, int]:
    """(height, width) after scaling the shorter side, then top and left of the centre square."""
    short, (shorter, side) = min(height, width), resizing
    height, width = int(shorter * height / short), int(shorter * width / short)
    return height, width, round((height - side) / 2), round((width - side) / 2)


def check_resize(resizing: Resizing | None, height: int, width: int) -> None:
    """Checks that images are not enlarged beyond reason; the option may come from someone else's file.

    Raises:
        CondenseError: the side exceeds ``MAX_SIDE`` and ``MAX_ENLARGEMENT`` times the images' own.
    """
    limit = max(MAX_SIDE, MAX_ENLARGEMENT * height, MAX_ENLARGEMENT * width)
    if resizing is not None and resizing.shorter > limit:
        raise CondenseError(f"resize={resizing.shorter}: the images are {width}x{height} pixels; give at most {limit}")


def _convert(images: np.ndarray, options: DataOptions, resizing: Resizing | None) -> np.ndarray:
    """Returns images (N,C,H,W) with the channels and the size of ``options``, in the same dtype, contiguous.

    Raises:
        CondenseError: ``grey`` with neither 1 nor 3 channels, or the images do not fit in memory.
    """
    channels, height, width = images.shape[1:]
    check_resize(resizing, height, width)
    if options.grey is not None and channels not in (1, 3):
        raise CondenseError(f"grey={str(options.grey).lower()}: needs 1 or 3 channels, not {channels}; leave it out")
    to_grey, to_rgb = bool(options.grey) and channels == 3, options.grey is False and channels == 1
    if resizing == (height, width):
        resizing = None
    if not (to_grey or to_rgb or resizing):
        return np.ascontiguousarray(images)
    chunks = []
    new_height, new_width, top, left = resized_box(height, width, resizing) if resizing else (height, width, 0, 0)
    values = (3 if to_rgb else channels) * max(height * width, new_height * new_width)
    rows = max(1, min(1024, CHUNK_VALUES // values))
    if resizing:
        side = resizing.side
        needed = images.itemsize * len(images) * (3 if to_rgb else channels) * side * side + 8 * rows * values
        what = f"resize={resizing.shorter}: {len(images)} images of {by((channels, side, side))}"
        check_host_memory(needed, what, "lower it")
    for start in range(0, len(images), rows):
        x = torch.from_numpy(np.ascontiguousarray(images[start : start + rows])).float()
        if to_grey:
            x = (x * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)  # ITU-R 601, as PIL does
        if to_rgb:
            x = x.expand(-1, 3, -1, -1)
        if resizing:
            x = interpolate(x, size=(new_height, new_width), mode="bilinear", antialias=True)
            x = x[:, :, top : top + resizing.side, left : left + resizing.side]
        x = x.round().clamp(0, 255).byte() if images.dtype == np.uint8 else x.clamp(0, 1)
        chunks.append(x.contiguous().numpy())
    return np.concatenate(chunks)


def stratified_rows(
    labels: np.ndarray, classes: Sequence[str], where: str, purpose: str
) -> tuple[np.ndarray, np.ndarray]:
    """Splits every class into a train and a test part.

    The rows of each class are shuffled with a key of its number and ``purpose``; the last ``TEST_SHARE`` of them
    (rounded, at least one image) is the test part.

    Returns:
        Row numbers of the train and of the test part, each ascending.

    Raises:
        CondenseError: a class has fewer than two images.
    """
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


def stratified_splits(
    images: np.ndarray, labels: np.ndarray, classes: Sequence[str], where: str, purpose: str
) -> tuple[Split, Split]:
    """Train and test split of arrays without a test part; see :func:`stratified_rows`."""
    train, test = (Split(images[rows], labels[rows]) for rows in stratified_rows(labels, classes, where, purpose))
    return train, test


def format_some(names: Sequence[str], limit: int = 5) -> str:
    """The first ``limit`` names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
