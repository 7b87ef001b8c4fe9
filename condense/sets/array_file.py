"""Files of arrays with a manifest that has a checksum of each array: the part that files of sets share."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from condense import hdf5
from condense.errors import CondenseError
from condense.files import atomic_write
from condense.hdf5 import RESTORE_HINT


def checksums(arrays: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Returns the SHA-256 of each array's dtype, shape and bytes."""
    return {name: _digest(array) for name, array in arrays.items()}


def write_arrays(
    path: Path,
    form: hdf5.Format,
    manifest: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
    load: Callable[[Path], Any],
) -> None:
    """Writes a file atomically: a kill leaves either the old file or the complete new one.

    Args:
        path: the file, which may exist.
        form: its format.
        manifest: with the ``checksums`` of the arrays.
        arrays: by path in the file.
        load: reads such a file; it is called on the new one before this takes its place.

    Raises:
        CondenseError: the file cannot be written, or not be read back.
    """
    with atomic_write(path) as temporary:
        with hdf5.create_hdf5(temporary, form) as file:
            hdf5.write_manifest(file, form, manifest)
            for name, array in arrays.items():
                file.create_dataset(name, data=array)
        try:  # before the file takes its place: what cannot be loaded is not reported as made
            load(temporary)
        except CondenseError as fault:
            reason = str(fault).removeprefix(f"{temporary}: ")
            raise CondenseError(f"{path}: not written, because it could not be read back ({reason})") from fault


def read_arrays(path: Path, form: hdf5.Format, types: Sequence[type]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Reads all arrays and the manifest of an untrusted file; types, sizes and links are checked before reading.

    Raises:
        CondenseError: another format, a truncated or damaged file, or an array that is not of ``types``.
    """
    with hdf5.open_hdf5(path, form) as (file, manifest):
        names, size = sorted(manifest["checksums"]), path.stat().st_size
        total = sum(_claimed_nbytes(path, file, name, types) for name in names)
        if total > size:  # several names may refer to one array
            raise CondenseError(f"{path}: its arrays claim {total} bytes, more than the file holds")
        arrays = {}
        for name in names:
            arrays[name] = file[name][()]
            if _digest(arrays[name]) != manifest["checksums"][name]:
                raise CondenseError(f"{path}: the array '{name}' is damaged (its checksum differs); {RESTORE_HINT}")
            arrays[name] = arrays[name].astype(arrays[name].dtype.newbyteorder("="), copy=False)
    return arrays, manifest


def _digest(array: np.ndarray) -> str:
    digest = hashlib.sha256(f"{array.dtype.str}{array.shape}".encode())
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)  # without a copy: labels may be large
    return digest.hexdigest()


def _claimed_nbytes(path: Path, file: Any, name: str, types: Sequence[type]) -> int:
    """Returns the bytes of an array. Raises an error if it is a link, has an unknown type, or claims more bytes than
    the file holds."""
    import h5py

    hdf5.check_link(path, file, name)
    array = file[name]
    if not isinstance(array, h5py.Dataset) or array.is_virtual or array.external or array.shape is None:
        raise CondenseError(f"{path}: '{name}' is not an array stored in this file")
    if array.dtype.type not in types:
        raise CondenseError(f"{path}: the array '{name}' has the type {array.dtype}, which no distilled set uses")
    nbytes = math.prod(array.shape) * array.dtype.itemsize
    if nbytes > path.stat().st_size:
        raise CondenseError(f"{path}: the array '{name}' claims {nbytes} bytes, more than the file holds")
    return nbytes
