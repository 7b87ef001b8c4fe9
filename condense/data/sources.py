"""Finding, decoding and caching real images: what a user calls DATA in, checked arrays out.

DATA is a registered name, an image folder, an ``.npz`` or ``.h5`` of arrays, or Python objects (arrays, tensors, torch
datasets). Importing this module pulls in neither torch nor PIL, so that names can be listed quickly.

Decoded folders are kept under :func:`cache_dir` as uint8 ``.npy`` files and memory-mapped on reuse. They are found by
the names, sizes and modification times of the files, and known by their content (:attr:`Loaded.fingerprint`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from condense.data.arrays import _read_arrays, _read_datasets, _read_mapping
from condense.data.folders import _list_folder, _read_folder
from condense.data.loaded import DataOptions, Loaded, check_name
from condense.data.registered import DATASETS, _read_named, datasets
from condense.errors import CondenseError, did_you_mean


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
