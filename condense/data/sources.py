"""Reads real data from the DATA argument of a user.

DATA is a registered name, an image folder, an ``.npz`` or ``.h5`` file of arrays, a ``.csv`` file that lists images, a
data set of the Hugging Face Hub (``hf:OWNER/NAME``), or Python objects (arrays, tensors, torch datasets).
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from condense.data.arrays import read_array_file, read_mapping, read_torch_datasets
from condense.data.folders import list_folder, split_role
from condense.data.hub import HUB_PREFIX, load_hub
from condense.data.image_cache import read_folder
from condense.data.loaded import DataOptions, LoadedData
from condense.data.registered import DATASETS, apply_registered, datasets, read_registered
from condense.data.tables import TABLE_SUFFIXES, list_table
from condense.errors import CondenseError, did_you_mean
from condense.files import check_name
from condense.formatting import shorten

_log = logging.getLogger(__name__)


def read_data(data: str, options: DataOptions, *, download: bool = False) -> LoadedData:
    """Reads DATA of the command line: a registered name, a folder, an ``.npz``, ``.h5`` or ``.csv`` file, or
    ``hf:OWNER/NAME``.

    Each may be preceded by ``NAME=``, which names the data in records. A registered name takes precedence over a folder
    with that name; ``./cifar10`` means the folder. A folder or file with the name of a registered data set, the same
    number of classes and the same image shape takes its mean, std and mirror setting (:func:`apply_registered`).

    Raises:
        CondenseError: the data do not exist or are invalid.
    """
    name, equals, rest = data.partition("=")
    if equals and not os.path.exists(data):
        if "=" in rest and not os.path.exists(rest):
            raise CondenseError(f"data '{shorten(data, 200)}': write NAME=PATH with one name")
        check_name(name)
        loaded = read_data(rest, options, download=download)
        return apply_registered(replace(loaded, name=name, source=f"{name}={loaded.source}"), options)
    if data in DATASETS:
        return read_registered(DATASETS.get(data), options, download)
    if data.startswith(HUB_PREFIX):
        loaded = read_objects(load_hub(data, download), options)
        return apply_registered(replace(loaded, name=_data_name(Path(data).name), source=data), options)
    path = Path(data).expanduser().absolute()
    try:
        if path.is_dir() or (path.suffix.lower() in TABLE_SUFFIXES and path.is_file()):
            listing = list_folder(path, options) if path.is_dir() else list_table(path, options)
            if listing.unused:
                _log.warning("data '%s': not used: %s", path, listing.unused)
            loaded = read_folder(listing, options)
            name = path.resolve().name if path.is_dir() else path.stem
        elif path.suffix.lower() in (".npz", ".h5", ".hdf5") and path.is_file():
            loaded = read_mapping(read_array_file(path), f"'{path}'", options)
            name = path.stem
        elif path.exists():
            raise CondenseError(f"data '{data}': give a folder of images, an .npz or .h5 file, or a .csv of file,label")
        else:
            looks_like_a_path = os.sep in data or "." in data
            meant = did_you_mean(data, datasets())
            hint = "" if looks_like_a_path else f", and no registered name{meant}; --data {data}=PATH says where it is"
            raise CondenseError(f"data '{data}': no such file or folder{hint}")
    except OSError as error:
        raise CondenseError(f"data '{data}': {error.strerror or error}: {error.filename or path}") from error
    if loaded.note:
        _log.warning("data '%s': %s", path, loaded.note)
    return apply_registered(replace(loaded, name=_data_name(name), source=str(path)), options)


def _data_name(text: str) -> str:
    """A name of data in records, made of the name of a file or folder."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._") or "data"


def read_objects(data: Any, options: DataOptions) -> LoadedData:
    """Reads Python objects.

    Args:
        data: ``(train_images, train_labels, test_images, test_labels)`` of arrays or tensors, a mapping with these
            names, ``(train_dataset, test_dataset)`` of map-style torch datasets or Hugging Face datasets, or only the
            train part of these; or a mapping of parts to datasets (``DatasetDict``).
        options: how images are read.

    Raises:
        CondenseError: the objects are invalid.
    """
    loaded = _read_objects(data, options)
    if loaded.note:
        _log.warning("data: %s", loaded.note)
    return loaded


def _read_objects(data: Any, options: DataOptions) -> LoadedData:
    if isinstance(data, Mapping):
        roles = {role[0]: data[key] for key in data if (role := split_role(str(key))) is not None and role[1] == ()}
        if "train" in roles and not hasattr(roles["train"], "dtype"):  # of datasets, e.g. a DatasetDict
            test = roles.get("test", roles.get("val"))
            return read_torch_datasets([roles["train"]] if test is None else [roles["train"], test], options)
        return read_mapping(data, "data", options)
    parts = data if isinstance(data, (tuple, list)) else (data,)
    if len(parts) == 4 or (len(parts) == 2 and hasattr(parts[0], "dtype")):
        keys = ("train_images", "train_labels", "test_images", "test_labels")
        return read_mapping(dict(zip(keys, parts)), "data", options)
    if 1 <= len(parts) <= 2 and all(hasattr(part, "__getitem__") and hasattr(part, "__len__") for part in parts):
        return read_torch_datasets(parts, options)
    raise CondenseError(
        f"data of type {type(data).__name__} cannot be used: give (train_images, train_labels, test_images, "
        "test_labels), a dict of these, or one or two map-style torch datasets (train, test)"
    )
