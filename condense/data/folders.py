"""Image folders: finds the files of each class and lists the train and the test split."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from condense.data.decoding import decode_images, image_to_array, is_grey, read_image
from condense.data.loaded import DataOptions, Split, format_some, stratified_rows
from condense.errors import CondenseError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".ppm", ".tif", ".tiff")

MODE_SAMPLE = 1000
"""Maximum number of train files whose headers decide between grey and RGB, evenly spaced in file order."""


class ImageFile(NamedTuple):
    """An image file with its label, and what identifies its content."""

    path: str
    label: int
    size: int
    changed: tuple[int, int]
    """Times of modification and of the last status change, in ns. Some archives set the first to a constant."""


@dataclass(frozen=True)
class FolderListing:
    """Classes and files of an image folder."""

    root: Path
    classes: tuple[str, ...]
    train: list[ImageFile]
    test: list[ImageFile]


def _folders(folder: Path) -> list[str]:
    """Names of the visible folders inside, sorted."""
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith((".", "__MACOSX")))


def _files(folder: str, label: int) -> list[ImageFile]:
    """Image files at any depth below ``folder``, sorted by path."""
    files = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.name.lower().endswith(SUFFIXES):
                status = entry.stat()
                files.append(ImageFile(entry.path, label, status.st_size, (status.st_mtime_ns, status.st_ctime_ns)))
            elif entry.is_dir():
                files += _files(entry.path, label)
    files.sort()
    return files


def _class_files(folder: Path, classes: Sequence[str]) -> list[ImageFile]:
    files = []
    for label, name in enumerate(classes):
        of_class = _files(str(folder / name), label)
        if not of_class:
            raise CondenseError(f"data folder '{folder}': class '{name}' has no images ({', '.join(SUFFIXES)})")
        files += of_class
    return files


def list_folder(root: Path) -> FolderListing:
    """Lists an image folder: ``train/<class>/*`` and ``test/<class>/*`` (or ``val/``, ``valid/``, ``validation/``).

    Without a test folder, or with class folders directly in ``root``, every class is split. Classes are numbered in
    sorted order. Tiny ImageNet's layout, whose validation labels are in a text file, is supported too.

    Raises:
        CondenseError: no class folders, only one, an empty one, or different classes in train and test.
    """
    what = f"data folder '{root}'"
    folders = _folders(root)
    tests = [name for name in ("test", "val", "valid", "validation") if name in folders]
    if tests and "train" not in folders:
        raise CondenseError(f"{what}: has {tests[0]}/ but no train/")
    train_folder = root / "train" if "train" in folders else root
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
        return FolderListing(root, classes, train, _annotated(root / "val", classes))
    if tests:
        test_folder = root / tests[0]
        test_classes = _folders(test_folder)
        if set(test_classes) != set(classes):
            only_train, only_test = sorted(set(classes) - set(test_classes)), sorted(set(test_classes) - set(classes))
            differences = [
                f"{where}/ alone has {format_some(names)}"
                for where, names in (("train", only_train), (tests[0], only_test))
                if names
            ]
            raise CondenseError(f"{what}: train/ and {tests[0]}/ differ in their classes: {'; '.join(differences)}")
        return FolderListing(root, classes, train, _class_files(test_folder, classes))
    rows = stratified_rows(np.array([file.label for file in train]), classes, what, "data")
    return FolderListing(root, classes, [train[row] for row in rows[0]], [train[row] for row in rows[1]])


def read_images(folder: Path, options: DataOptions) -> tuple[tuple[str, ...], Split]:
    """Reads every image of ``<class>/*`` or ``train/<class>/*`` as one split, uint8.

    This is for distilled sets: classes are not split into train and test, and nothing is cached.

    Returns:
        Names of the class folders, and the split.

    Raises:
        CondenseError: no class folders, or a file that is not an image or has a different size.
    """
    if not folder.is_dir():
        raise CondenseError(f"'{folder}' is no folder; give one with <class>/* or train/<class>/*")
    root = folder / "train"
    if not root.is_dir() or not _folders(root):  # a class may be called train
        root = folder
    classes = tuple(_folders(root))
    if not classes:
        raise CondenseError(f"'{folder}' holds no class folders; expected <class>/* or train/<class>/*")
    files = _class_files(root, classes)
    shape, mode = decoded_format(files, options)
    chunks = list(decode_images([file.path for file in files], shape, mode, options.resize))
    return classes, Split(np.concatenate(chunks), labels_of(files))


def decoded_format(files: Sequence[ImageFile], options: DataOptions) -> tuple[tuple[int, ...], str]:
    """Shape (C,H,W) and mode (``L`` or ``RGB``) to which all files are decoded, from ``options`` and the first file."""
    mode = "L" if options.grey else "RGB" if options.grey is False else _majority_mode(files)
    return read_image(files[0].path, lambda image: image_to_array(image, mode, options.resize)).shape, mode


def _annotated(folder: Path, classes: Sequence[str]) -> list[ImageFile]:
    """Tiny ImageNet's validation images, by class and then by name."""
    numbers = {name: number for number, name in enumerate(classes)}
    label_of = {}
    for line in (folder / "val_annotations.txt").read_text().splitlines():
        name, wnid = line.split("\t")[:2]
        if wnid in numbers:
            label_of[name] = numbers[wnid]
    labelled = [
        file._replace(label=label_of[os.path.basename(file.path)])
        for file in _files(str(folder / "images"), 0)
        if os.path.basename(file.path) in label_of
    ]
    empty = sorted(set(range(len(classes))) - {file.label for file in labelled})
    if empty:
        raise CondenseError(f"data folder '{folder}': class '{classes[empty[0]]}' has no images")
    return sorted(labelled, key=lambda file: (file.label, file.path))


def _majority_mode(files: Sequence[ImageFile]) -> str:
    """``"L"`` where more than half of a sample of the files (see ``MODE_SAMPLE``) is grey, otherwise ``"RGB"``."""
    rows = np.unique(np.linspace(0, len(files) - 1, MODE_SAMPLE).astype(int))
    grey = sum(read_image(files[row].path, lambda image: is_grey(image.mode)) for row in rows)
    return "L" if 2 * grey > len(rows) else "RGB"


def labels_of(files: Sequence[ImageFile]) -> np.ndarray:
    """Labels of files, int64 (N,)."""
    return np.array([file.label for file in files], np.int64)
