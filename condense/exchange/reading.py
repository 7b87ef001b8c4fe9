"""Reads the files of third-party distilled sets.

Files are untrusted: nothing in them is executed, and the sizes that they claim are checked against the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from condense.config import whole_number
from condense.data import DataOptions, read_images
from condense.device import check_host_memory
from condense.errors import CondenseError
from condense.exchange.shared import library
from condense.files import check_data_file

ALIASES = {"images": ("image", "x", "data", "X"), "labels": ("label", "y", "targets", "Y")}
"""Other names of the images and labels in files."""

TRANSFORM_ARRAYS = ("mean", "std", "matrix", "inverse")
"""Names of the arrays of a transform in our exports."""


@dataclass
class ImportedFiles:
    """The content of the files, of which only the size has been checked."""

    images: Tensor
    labels: Tensor | None
    """Integers (N,) or floats (N, classes); None: images are sorted by class."""
    paths: list[Path]
    """All files that were read, images first."""
    labels_file: Path
    """File of the labels."""
    logits: bool = False
    """Whether the float labels are known to be logits."""
    lr: float | None = None
    """Learned step size."""
    classes: Sequence[str] = ()
    """Class names in the file; for an image folder, the names of the folders that the labels number."""
    transform: dict[str, np.ndarray] = field(default_factory=dict)
    """Arrays of the transform in the file, as in our exports."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Further entries of ``imported`` in the manifest."""


def read_dc(source: Path, index: int | None) -> ImportedFiles:
    """Reads one experiment of a file of the DC scripts: ``{"data": [[images, labels], ...]}``."""
    content = _load(source)
    data = content.get("data") if isinstance(content, dict) else None
    pairs = isinstance(data, list) and all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in data)
    if not data or not pairs:
        raise CondenseError(
            f"{source}: holds no list 'data' of [images, labels]; a file of images alone goes with --from tensors"
        )
    number = len(data) - 1 if index is None else whole_number(index, "--index")
    if not 0 <= number < len(data):
        raise CondenseError(f"--index {number}: {source} holds {len(data)} experiments; give 0 to {len(data) - 1}")
    images, labels = (_tensor(part, source, what) for part, what in zip(data[number], ("images", "labels")))
    files = ImportedFiles(images, labels, [source], source, facts={"experiment": number, "experiments": len(data)})
    _add_export_fields(files, content, source)
    return files


def read_mtt(source: Path, labels: Path | None) -> ImportedFiles:
    """Reads a folder or an image file of the MTT scripts, with the files of labels and learning rate next to it."""
    path = source
    if source.is_dir():
        matches = [(re.fullmatch(r"images_(\d+)\.pt", path.name), path) for path in source.glob("images_*.pt")]
        numbered = sorted(((int(match[1]), path) for match, path in matches if match), reverse=True)
        names = [source / "images_best.pt", source / "images.pt", *(path for _, path in numbered)]
        existing = [name for name in names if name.is_file()]
        if not existing:
            raise CondenseError(f"{source}: holds no images_best.pt, images.pt or images_N.pt; name the file")
        path = existing[0]
    if path.name.startswith("images_zca"):
        raise CondenseError(
            f"{path}: holds pictures for viewing, with the whitening undone; give {path.name.replace('_zca', '', 1)}"
        )
    files = ImportedFiles(_tensor(_load(path), path, "images"), None, [path], path, facts={"file": path.name})
    labels_path, lr_path = (path.with_name(path.name.replace("images", kind, 1)) for kind in ("labels", "lr"))
    if labels or (labels_path != path and labels_path.is_file()):
        _read_labels(files, labels or labels_path)
    if lr_path != path and lr_path.is_file():
        files.lr = read_step_size(str(lr_path), files.paths)
    return files


def read_tensors(source: Path, labels: Path | None) -> ImportedFiles:
    """Reads a ``.pt``, ``.safetensors``, ``.npz`` or ``.npy`` file of images, with anything that our exports add.

    The content is a tensor of images, a list ``[images, labels]``, or a dict with ``images`` and perhaps ``labels``.
    Labels of an ``.npy`` file may be in ``labels.npy`` beside ``images.npy``.
    """
    content = _load_safetensors(source) if source.suffix == ".safetensors" else _load(source)
    if isinstance(content, list | tuple) and len(content) == 2:
        content = {"images": content[0], "labels": content[1]}
    if not isinstance(content, dict):
        content = {"images": content}
    for name, aliases in ALIASES.items():
        present = [alias for alias in aliases if content.get(alias) is not None]
        if name not in content and present:  # labels of another type are refused below, not left out
            tensors = [alias for alias in present if isinstance(content[alias], Tensor)]
            content = {**content, name: content[(tensors or present)[0]]}
    beside = source.with_name(source.name.replace("images", "labels", 1))
    if source.suffix == ".npy" and labels is None and beside != source and beside.is_file():
        labels = beside
    if "images" not in content:
        raise CondenseError(f"{source}: holds {', '.join(map(str, content)) or 'nothing'}, but no 'images'")
    stored_labels = content.get("labels")
    files = ImportedFiles(
        _tensor(content["images"], source, "images"),
        None if stored_labels is None else _tensor(stored_labels, source, "labels"),
        [source],
        source,
    )
    _add_export_fields(files, content, source)
    if labels is not None:
        _read_labels(files, labels)
    return files


def _read_labels(files: ImportedFiles, path: Path) -> None:
    files.labels, files.labels_file, files.logits = _tensor(_load(path), path, "labels"), path, False
    files.paths.append(path)


def read_image_folder(source: Path, options: DataOptions) -> ImportedFiles:
    """Reads ``<class>/*`` or ``train/<class>/*``; ``classes`` are the names of the folders."""
    classes, split = read_images(source, options)
    images, labels = torch.from_numpy(split.images), torch.from_numpy(split.labels)
    return ImportedFiles(images, labels, [source], source, classes=classes)


def _add_export_fields(files: ImportedFiles, content: Mapping[Any, Any], source: Path) -> None:
    """Adds the fields that our exports store in addition to images and labels."""
    names = [name for name in (*TRANSFORM_ARRAYS, "logits", "lr") if isinstance(content.get(name), Tensor)]
    tensors = {name: _tensor(content[name], source, name) for name in names}
    files.transform = {name: tensors[name].float().numpy() for name in TRANSFORM_ARRAYS if name in tensors}
    if "logits" in tensors and tensors["logits"].is_floating_point():
        files.labels, files.logits = tensors["logits"], True
    if "lr" in tensors:
        files.lr = _positive(tensors["lr"], f"{source}: its learned lr")
    classes = content.get("classes")
    if isinstance(classes, list) and all(isinstance(name, str) for name in classes):
        files.classes = classes


class _Inert:
    """Replaces numpy's scalars, which the DC scripts save with their sets, so that no function of numpy is called."""

    def __init__(self, *state: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


_NUMPY = [(_Inert, name) for name in ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype")]


def _load(path: Path) -> Any:
    """Loads a ``.pt`` file of tensors, numbers, text, and lists and dicts of these. Tensors may be memory-mapped.

    Raises:
        CondenseError: no such file, or it is damaged, compressed, or holds code.
    """
    if not path.is_file():
        if path.is_dir():
            raise CondenseError(f"{path}: is a folder; name the file in it")
        raise CondenseError(f"{path}: no such file; give the .pt file of the set")
    check_data_file(path)
    if path.suffix in (".npz", ".npy"):
        return _load_numpy(path)
    try:
        packed = zipfile.is_zipfile(path)
        if packed and any(entry.compress_type != zipfile.ZIP_STORED for entry in zipfile.ZipFile(path).infolist()):
            raise CondenseError(f"{path}: a compressed archive, which torch never writes; unpack it")
        with torch.serialization.safe_globals(_NUMPY), warnings.catch_warnings():  # type: ignore[arg-type]
            warnings.simplefilter("ignore")  # about newer pickles and sparse tensors, which are rejected below
            # In a mapped file, every version of torch rejects tensors that are larger than their bytes.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=packed)
    except pickle.UnpicklingError as fault:
        function = re.search(r"GLOBAL (\S+)", str(fault))
        what = f"would run '{function[1]}'" if function else "is no list of tensors"
        raise CondenseError(f"{path}: not read, because it {what}; ask for a file that holds tensors alone") from fault
    except CondenseError:
        raise
    except Exception as fault:  # a damaged file raises errors of many types
        reason = (str(fault).splitlines() or [""])[0] or type(fault).__name__
        raise CondenseError(f"{path}: cannot be read as a .pt file ({reason}); copy it again") from fault


def _load_numpy(path: Path) -> Any:
    """Loads the arrays of a ``.npz`` file, or the array of an ``.npy`` file, as tensors.

    Raises:
        CondenseError: it is damaged, holds Python objects, or is larger than memory.
    """
    size = path.stat().st_size
    if path.suffix == ".npz":
        with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
    check_host_memory(2 * size, f"{path}: the arrays", "take a smaller file")
    try:
        content = np.load(path, allow_pickle=False)
        arrays = {name: content[name] for name in content.files} if path.suffix == ".npz" else content
        if isinstance(arrays, np.ndarray):
            return torch.from_numpy(np.ascontiguousarray(arrays))
        names = {name for key, aliases in ALIASES.items() for name in (key, *aliases)}
        return {
            name: torch.from_numpy(np.ascontiguousarray(array)) if array.dtype.kind in "fiub" else array
            for name, array in arrays.items()
            if array.dtype.kind in "fiub" or name in names
        }
    except Exception as fault:  # a damaged file raises errors of many types
        reason = (str(fault).splitlines() or [""])[0] or type(fault).__name__
        raise CondenseError(f"{path}: cannot be read as a {path.suffix} file ({reason}); copy it again") from fault


def _load_safetensors(path: Path) -> dict[str, Any]:
    """Loads the tensors of a file, and ``classes`` of its metadata. A single tensor is called ``images``."""
    safetensors = library("safetensors", f"{path}")
    if path.is_file():
        check_data_file(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:  # checks all sizes against the file
            content: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            classes = json.loads((file.metadata() or {}).get("classes", "null"))
    except Exception as fault:
        reason = (str(fault).splitlines() or [""])[0]
        raise CondenseError(f"{path}: cannot be read as a .safetensors file ({reason}); copy it again") from fault
    if len(content) == 1:
        content = {"images": next(iter(content.values()))}
    return {**content, "classes": classes}


def _tensor(value: Any, path: Path, what: str) -> Tensor:
    """Checks that ``value`` is a plain tensor not larger than the file (an ``.npz`` file may be compressed), and
    detaches it."""
    plain = isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"
    if not plain or value.is_quantized:
        raise CondenseError(f"{path}: expected a tensor of {what}, found {_kind(value)}; check --from")
    nbytes = value.numel() * value.element_size()
    if nbytes > path.stat().st_size and path.suffix != ".npz":
        raise CondenseError(f"{path}: its {what} claim {nbytes} bytes, more than the file holds")
    return value.detach()


def _kind(value: Any) -> str:
    """The type of a value, and of an array that of its elements, for messages."""
    return f"an array of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__


def read_step_size(value: str | float, paths: list[Path]) -> float:
    """Returns a number, or reads it from a ``.pt`` file, which is appended to ``paths``."""
    try:
        return _positive(float(value), f"--lr {value}")
    except ValueError:
        path = Path(value)  # type: ignore[arg-type]
    paths.append(path)
    return _positive(_load(path), f"--lr {value}")


def _positive(value: Any, where: str) -> float:
    """Checks that ``value`` is one finite number above 0."""
    single = isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1)
    if not single or not 0 < float(value) < math.inf:
        description = f"found {float(value):g}" if single else "found something else"
        raise CondenseError(f"{where}: must be one number above 0, or a .pt file with one ({description})")
    return float(value)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, or of the names and bytes of all files in a folder."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if path.is_dir():
            digest.update(f"{file.relative_to(path).as_posix()}\0".encode(errors="surrogateescape"))
        if file.is_file():
            digest.update(file.read_bytes())
    return digest.hexdigest()
