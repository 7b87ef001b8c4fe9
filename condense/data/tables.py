"""Image files listed in a table: a ``.csv`` or ``.tsv`` file with the file and the class of each image."""

from __future__ import annotations

import csv
import os
import stat
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from condense.data.folders import FolderListing, ImageFile, split_role
from condense.data.loaded import DataOptions, format_some, stratified_rows
from condense.errors import CondenseError

TABLE_SUFFIXES = (".csv", ".tsv")

TABLE_LIMIT = 256 * 2**20
"""Maximum size of a table in bytes."""

COLUMNS: dict[str, Sequence[str]] = {
    "file": (
        "file",
        "filename",
        "file_name",
        "filepath",
        "file_path",
        "path",
        "image",
        "image_path",
        "image_name",
        "img",
    ),
    "label": ("label", "class", "category", "target", "class_name", "label_name"),
    "part": ("split", "part", "subset", "set"),
}
"""Usual names of the columns with the file, the class, and the part of the data (train, test, ...)."""


def list_table(path: Path, options: DataOptions) -> FolderListing:
    """Lists the images of a table.

    The first row names the columns (see ``COLUMNS``); a table with two columns may have any names, or none: file, then
    class. Files are relative to the folder of the table and must lie inside it. Classes are numbered in sorted order,
    numbers by value. Without a column for the part, a fifth of each class is the test split. If there is no test part,
    the validation part is the test split.

    Raises:
        CondenseError: the table cannot be read, lacks a column, or a row has no class, several classes or no file.
    """
    where = f"data '{path}'"
    rows, columns = _read_rows(path, where)
    label_of: dict[str, str] = {}
    parts: dict[str, list[tuple[str, str]]] = {}
    for number, row in rows:
        name, label = (row[columns[key]].strip() if columns[key] < len(row) else "" for key in ("file", "label"))
        if not name or not label:
            raise CondenseError(f"{where}: line {number} lacks the {'label' if name else 'file'}")
        if name in label_of:
            both = f"{label_of[name]} and {label}"
            fix = "remove one line" if label_of[name] == label else f"as {both}; multi-label data are not supported"
            raise CondenseError(f"{where}: '{name}' is listed twice; {fix}")
        label_of[name] = label
        parts.setdefault(_part(row, columns, where, number), []).append((name, label))
    train = parts.pop("train", [])
    if not train:
        raise CondenseError(f"{where}: has no train images")
    test = parts.pop("test", None) or parts.pop("val", [])
    labels = {label for _, label in train} | (set() if options.drop_empty else {label for _, label in test})
    _check_single_labels(labels, where)
    classes = _sorted_classes(labels)
    if len(classes) < 2:
        raise CondenseError(f"{where}: only one class, '{classes[0]}'; give at least two")
    absent = [label for label in classes if label not in {label for _, label in train}]
    if absent:
        raise CondenseError(
            f"{where}: no train images of class {format_some(absent)}; drop_empty=true leaves such classes out"
        )
    numbers = {label: number for number, label in enumerate(classes)}
    train_files, test_files = (
        sorted(
            (_image_file(path.parent, name, numbers[label], where) for name, label in rows if label in numbers),
            key=lambda file: (file.label, file.path),
        )
        for rows in (train, test)
    )
    parts["of other classes"] = [row for row in test if row[1] not in numbers]
    unused = ", ".join(f"{len(rows)} images ({part})" for part, rows in parts.items() if rows)
    if not test_files:
        picked = stratified_rows(np.array([file.label for file in train_files]), classes, where, "data")
        train_files, test_files = ([train_files[row] for row in part] for part in picked)
    return FolderListing(path.parent, classes, train_files, test_files, unused)


def _read_rows(path: Path, where: str) -> tuple[list[tuple[int, list[str]]], dict[str, int]]:
    """Rows with their line numbers, without the names of the columns, and the index of each column."""
    if path.stat().st_size > TABLE_LIMIT:
        raise CondenseError(f"{where}: larger than {TABLE_LIMIT >> 20} MiB")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            first = file.readline()
            file.seek(0)
            tab, semicolon = "\t" in first, ";" in first and "," not in first
            reader = csv.reader(file, delimiter="\t" if tab else ";" if semicolon else ",")
            rows = [(reader.line_num, row) for row in reader if any(field.strip() for field in row)]
    except (csv.Error, UnicodeDecodeError) as error:
        raise CondenseError(f"{where}: cannot be read as a table in UTF-8: {error}") from error
    if not rows:
        raise CondenseError(f"{where}: is empty; give lines with file,label")
    header = [field.strip().lower() for field in rows[0][1]]
    columns = {
        key: header.index(next(name for name in names if name in header))
        for key, names in COLUMNS.items()
        if any(name in header for name in names)
    }
    if len(header) == 2 and len(columns) < 2:
        has_header = _find(path.parent, rows[0][1][0].strip()) is None
        return rows[has_header:], {"file": 0, "label": 1}
    for key in ("file", "label"):
        if key not in columns:
            raise CondenseError(
                f"{where}: no column {key} (or {', '.join(COLUMNS[key][1:])}), one class per file; it has "
                f"{format_some(rows[0][1])}"
            )
    return rows[1:], columns


def _part(row: Sequence[str], columns: dict[str, int], where: str, number: int) -> str:
    """``train``, ``test`` or ``val``: the part of the data that a row belongs to."""
    if "part" not in columns:
        return "train"
    text = row[columns["part"]].strip() if columns["part"] < len(row) else ""
    role = split_role(text)
    if role is None:
        raise CondenseError(f"{where}: line {number}: unknown part '{text}'; write train, test or val")
    return role[0]


def _check_single_labels(labels: set[str], where: str) -> None:
    """Checks that no label is a list of others, such as ``a|b``.

    Raises:
        CondenseError: one is.
    """
    for label in sorted(labels):
        for separator in "|;,":
            pieces = [piece.strip() for piece in label.split(separator)]
            if len(pieces) > 1 and any(piece in labels for piece in pieces):
                raise CondenseError(
                    f"{where}: the label '{label}' names several classes; multi-label data are not supported, give one"
                )


def _sorted_classes(labels: set[str]) -> tuple[str, ...]:
    """The labels in sorted order, by value if all are whole numbers."""
    numeric = all(label.isascii() and label.isdigit() for label in labels)
    return tuple(sorted(labels, key=lambda label: (int(label), label) if numeric else label))


def _find(folder: Path, name: str) -> Path | None:
    """The file with a name of the table; None if there is none."""
    path = folder / name.replace("\\", "/")
    try:
        return path if path.exists() else None
    except (OSError, ValueError):
        return None


def _image_file(folder: Path, name: str, label: int, where: str) -> ImageFile:
    """An image file of the table.

    Raises:
        CondenseError: it lies outside the folder, does not exist, or is not a regular file.
    """
    inside = os.path.normpath(os.path.join(folder, name.replace("\\", "/")))
    if not inside.startswith(str(folder).rstrip(os.sep) + os.sep):
        raise CondenseError(f"{where}: '{name}' is outside the folder of the table; move the table to the images")
    if _find(folder, name) is None:
        raise CondenseError(f"{where}: '{name}': no such file")
    status = os.stat(inside)
    if not stat.S_ISREG(status.st_mode):
        raise CondenseError(f"{where}: '{name}' is not a regular file")
    return ImageFile(inside, label, status.st_size, (status.st_mtime_ns, status.st_ctime_ns))
