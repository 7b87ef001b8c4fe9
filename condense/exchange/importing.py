"""Import: distilled sets in the files that others keep them in. ``condense.exports`` writes such files.

A file from a stranger is data: nothing in it is executed, and what it claims is checked against its size."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
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

from condense import networks, rng
from condense.data import ZCA, DataOptions, Standardise, Task, check_name, load, read_images, transform_from_arrays
from condense.errors import CondenseError, did_you_mean, need
from condense.formatting import by
from condense.judge import get_protocol
from condense.labels import HardLabels, Labels, SoftLabels
from condense.sets import DistilledSet
from condense.version import __version__

FORMS = ("dc", "mtt", "tensors", "imagefolder")
"""What ``condense import --from`` reads."""

NETWORK = "convnet-d3-w128-in"
"""The network that nearly all published sets of small images were made with."""

TRANSFORM = ("mean", "std", "matrix", "inverse")
"""Arrays of a transform, as our own exports call them."""


@dataclass
class _Found:
    """What was read, unchecked but for its size."""

    images: Tensor
    labels: Tensor | None
    """Integers (N,) or floats (N, classes); None: images are sorted by class."""
    files: list[Path]
    """Everything that was read, images first."""
    labels_file: Path
    logits: bool = False
    """The float labels are known to be logits."""
    lr: float | None = None
    classes: Sequence[str] = ()
    """Class names that the file states; of an image folder, those that the labels count."""
    transform: dict[str, np.ndarray] = field(default_factory=dict)
    """Arrays of the transform that the file states, as our own exports do."""
    facts: dict[str, Any] = field(default_factory=dict)


def import_set(
    source: str | Path,
    form: str,
    data: Task | Any,
    *,
    options: DataOptions | None = None,
    download: bool = False,
    labels: str | Path | None = None,
    lr: str | float | None = None,
    index: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    method: str | None = None,
    network: str = NETWORK,
    protocol: str | None = None,
) -> DistilledSet:
    """A set that others made, as a :class:`DistilledSet` sorted by class.

    Float images are taken to be in training space, uint8 ones in pixel space. The transform is the ``mean`` and ``std``
    given, else the one that the file states, else that of the data (ZCA where its options say ``zca``).

    Args:
        source: the file, or the folder (imagefolder, mtt).
        form: dc (``{"data": [[images, labels], ...]}``), mtt (``images_best.pt``, ``labels_best.pt``, ``lr_best.pt``),
            tensors (class-sorted images, ``.pt`` or ``.safetensors``), imagefolder (``<class>/*`` or
            ``train/<class>/*``).
        data: the real data that the set was made from: a :class:`Task`, or what ``condense.task`` takes.
        options: of the data, where it is no task yet.
        download: fetch a registered dataset that is not on disk.
        labels: ``.pt`` file of labels: int (N,), or float (N, classes) probabilities or logits.
        lr: learned step size for students: a number or a ``.pt`` file with one.
        index: which experiment of a dc file; the last one when None.
        mean: what the maker subtracted from each channel of pixels in [0,1].
        std: what the maker divided by.
        method: what the set's name calls its maker; ``form`` when None.
        network: that the set was made with.
        protocol: for judging it; dc-v1 for hard labels when None.

    Raises:
        CondenseError: the file cannot be used, holds code, or does not fit the data; one line that says why.
    """
    if form not in FORMS:
        raise CondenseError(f"--from {form}: unknown{did_you_mean(form, FORMS)}")
    source, method = Path(source), check_name(method or form)
    options = data.options if isinstance(data, Task) else options or DataOptions()
    networks.check(network)
    if protocol is not None:
        get_protocol(protocol)
    stated = _stated(mean, std, options)
    for flag, value, forms in (("--labels", labels, ("mtt", "tensors")), ("--index", index, ("dc",))):
        if value is not None and form not in forms:
            raise CondenseError(f"{flag} {value}: does not go with --from {form}; leave it out")
    if form == "dc":
        found = _read_dc(source, index)
    elif form == "imagefolder":
        found = _read_folder(source, options)
    else:
        stated_labels = None if labels is None else Path(labels)
        found = _read_mtt(source, stated_labels) if form == "mtt" else _read_tensors(source, stated_labels)
    if lr is not None:
        found.lr = _step_size(lr, found.files)
    task = load(data, None if isinstance(data, Task) else options, download=download)
    with rng.seeded("check"):  # one that does not fit the images is refused now, not by `evaluate`
        networks.build(network, task.shape, task.num_classes)
    return _adopted(source, form, found, task, stated, method=method, network=network, protocol=protocol)


def _stated(mean: Sequence[float] | None, std: Sequence[float] | None, options: DataOptions) -> Standardise | None:
    if mean is None and std is None:
        return None
    if mean is None or std is None:
        raise CondenseError(f"--{'std' if mean is None else 'mean'}: --mean and --std go together; give both")
    if options.zca:
        raise CondenseError("zca=true: whitened images have no --mean and --std; leave either out")
    try:
        if not all(math.isfinite(value) for value in (*mean, *std)):
            raise ValueError("not finite")
        return Standardise(torch.tensor(mean), torch.tensor(std))
    except ValueError as fault:
        words = f"--mean {','.join(map(str, mean))} --std {','.join(map(str, std))}"
        raise CondenseError(f"{words}: give one number per channel each, joined by commas, std above 0") from fault


def _adopted(
    source: Path, form: str, found: _Found, task: Task, stated: Standardise | None, *,
    method: str, network: str, protocol: str | None,
) -> DistilledSet:  # fmt: skip
    """What was found, checked against the data and with its manifest."""
    images = _checked_images(found.images, source, task)
    if form == "imagefolder":
        numbers = torch.tensor(_folder_numbers(found.classes, source, task))
        found.labels = numbers[found.labels]
    elif found.classes and tuple(found.classes) != task.classes:
        raise CondenseError(
            f"{source}: was made for the classes {', '.join(found.classes[:3])}, ... ({len(found.classes)}), "
            f"{task.name} has others; give the --data that it was made from"
        )
    provider, order = _checked_labels(found, len(images), task, source)
    transform, normalised = _transform(found, stated, task, source)
    ipc = len(images) // task.num_classes
    manifest = {
        "name": f"{task.name}/{method}-ipc{ipc}",
        "dataset": task.name,
        "classes": list(task.classes),
        "ipc": ipc,
        "space": "pixel" if images.dtype == torch.uint8 else "training",
        "decode": [],
        "distill_decode": [],
        "mirror": task.mirror,
        "method": method,
        "settings": {},
        "network": network,
        "data": {"fingerprint": task.fingerprint, "options": dataclasses.asdict(task.options)},
        "code_version": __version__,
        "cost": {},  # unknown
        "imported": {
            "from": form,
            "sha256": {path.name: _digest(path) for path in found.files},
            "transform": normalised,
            "labels": "by class order" if found.labels is None else found.labels_file.name,
            **found.facts,
        },
    }
    if protocol or provider.kind == "hard":  # otherwise that of the label track
        manifest["protocol"] = protocol or "dc-v1"
    if found.lr is not None:
        manifest["learned_lr"] = found.lr
    return DistilledSet(images[order].contiguous(), provider, transform, manifest)


def _checked_images(images: Tensor, source: Path, task: Task) -> Tensor:
    """Images uint8, float16 or float32 with the shape of the data's, finite."""
    if images.ndim != 4 or tuple(images.shape[1:]) != task.shape or not len(images):
        raise CondenseError(
            f"{source}: its images are {by(images.shape)}, those of {task.name} Nx{by(task.shape)}; "
            "give the --data that it was made from, or resize="
        )
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise CondenseError(f"{source}: its pixels are {images.dtype}; give floats in training space, or uint8")
    images = images if images.dtype == torch.float16 else images.float()
    if not bool(images.isfinite().all()):
        raise CondenseError(f"{source}: some pixels are not finite; ask its maker for a whole file")
    return images


def _checked_labels(found: _Found, count: int, task: Task, source: Path) -> tuple[Labels, Tensor]:
    """The label provider, and the order (N,) that sorts images by class.

    Soft labels sort by their likeliest class where that comes out even; else the file is taken to be sorted.
    """
    classes, labels, where = task.num_classes, found.labels, found.labels_file
    soft = labels is not None and labels.is_floating_point()
    if (labels is None or soft) and count % classes:
        raise CondenseError(
            f"{source}: {count} images are not equally many of each of {classes} classes of {task.name}"
            + ("" if soft else "; state their classes with --labels FILE")
        )
    if labels is None:
        labels = torch.arange(classes).repeat_interleave(count // classes)
    wanted = (count, classes) if soft else (count,)
    if tuple(labels.shape) != wanted or labels.dtype == torch.bool or labels.is_complex():
        raise CondenseError(
            f"{where}: {count} images but labels {labels.dtype} {by(labels.shape)}; "
            f"give integers ({count},) or floats ({count}, {classes})"
        )
    if soft:
        if not bool(labels.isfinite().all()):
            raise CondenseError(f"{where}: some labels are not finite; ask its maker for a whole file")
        guesses = labels.argmax(1)
        even = bool((guesses.bincount(minlength=classes) == count // classes).all())
        order = guesses.argsort(stable=True) if even else torch.arange(count)
        labels = labels.float()[order]
        return SoftLabels(labels.clone() if found.logits else _logits(labels)), order
    labels = labels.long()
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise CondenseError(
            f"{where}: labels run from {low} to {high}, but {task.name} has the classes 0 to {classes - 1}"
        )
    counts = labels.bincount(minlength=classes)
    few, many = int(counts.argmin()), int(counts.argmax())
    if counts[few] != counts[many]:
        raise CondenseError(
            f"{where}: class '{task.classes[few]}' has {counts[few]} images but '{task.classes[many]}' {counts[many]}; "
            "give equally many of each class"
        )
    order = labels.argsort(stable=True)
    return HardLabels(labels[order], classes), order


def _logits(labels: Tensor) -> Tensor:
    """Soft labels (N, classes) as logits: the logarithm where every row is a distribution, else they are logits."""
    if bool((labels >= 0).all()) and bool(((labels.sum(1) - 1).abs() < 1e-3).all()):
        return labels.clamp_min(torch.finfo(torch.float32).tiny).log()
    return labels.clone()


def _transform(found: _Found, stated: Standardise | None, task: Task, source: Path) -> tuple[Standardise | ZCA, str]:
    """The set's map to training space, and whose it is."""
    if stated is not None:
        if len(stated.mean) != task.shape[0]:
            raise CondenseError(f"--mean, --std: {len(stated.mean)} numbers for images of {task.shape[0]} channels")
        return stated, "the mean and std given"
    if found.transform:
        kind = "zca" if "matrix" in found.transform else "standardise"
        if task.options.zca and kind != "zca":
            raise CondenseError(f"zca=true: {source} states a mean and std of its own; leave zca=true out")
        try:
            restored = transform_from_arrays(kind, found.transform, task.shape)
        except CondenseError as fault:
            raise CondenseError(f"{source}: {fault}") from fault
        return restored, f"the {'ZCA' if kind == 'zca' else 'mean and std'} of the file"
    if found.images.is_floating_point() and found.images.min() >= 0 and found.images.max() <= 1:
        one, zero = (",".join([digit] * task.shape[0]) for digit in "10")
        raise CondenseError(
            f"{source}: its pixels lie in [0,1], so they are not in the training space of {task.name}; save them as "
            f"uint8, or state that they were not normalised: --mean {zero} --std {one}"
        )
    return task.transform, f"ZCA fitted on {task.name}" if task.options.zca else f"mean and std of {task.name}"


def _folder_numbers(folders: Sequence[str], source: Path, task: Task) -> list[int]:
    """Class number of each folder: by class name, or 0..C-1 as in ``00007`` and ``new007`` (SRe2L's family)."""
    numbers = {folder_name(name): number for number, name in enumerate(task.classes)}
    counted = [re.fullmatch(r"(?:new)?(\d+)", name) for name in folders]
    places = [int(match[1]) for match in counted if match]
    if set(folders) != set(numbers) and sorted(places) == list(range(task.num_classes)) and all(counted):
        return places
    for where, one, other in ((source, set(folders), set(numbers)), (task.name, set(numbers), set(folders))):
        alone = sorted(one - other)
        if alone:
            raise CondenseError(
                f"{source}: its folders are not the classes of {task.name}: {where} alone has '{alone[0]}'"
                + (f" and {len(alone) - 1} more" if len(alone) > 1 else "")
                + "; rename them, or give the --data that it was made from"
            )
    return [numbers[name] for name in folders]


# -- reading files ----------------------------------------------------------------------------------------------------


def _read_dc(source: Path, index: int | None) -> _Found:
    content = _load(source)
    data = content.get("data") if isinstance(content, dict) else None
    pairs = isinstance(data, list) and all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in data)
    if not data or not pairs:
        raise CondenseError(
            f"{source}: holds no list 'data' of [images, labels]; a file of images alone goes with --from tensors"
        )
    number = len(data) - 1 if index is None else index
    if not 0 <= number < len(data):
        raise CondenseError(f"--index {number}: {source} holds {len(data)} experiments; give 0 to {len(data) - 1}")
    images, labels = (_tensor(part, source, what) for part, what in zip(data[number], ("images", "labels")))
    found = _Found(images, labels, [source], source, facts={"experiment": number, "experiments": len(data)})
    return _with_statements(found, content, source)


def _read_mtt(source: Path, labels: Path | None) -> _Found:
    path = source
    if source.is_dir():
        matches = [(re.fullmatch(r"images_(\d+)\.pt", path.name), path) for path in source.glob("images_*.pt")]
        numbered = sorted(((int(match[1]), path) for match, path in matches if match), reverse=True)
        names = [source / "images_best.pt", source / "images.pt", *(path for _, path in numbered)]
        held = [name for name in names if name.is_file()]
        if not held:
            raise CondenseError(f"{source}: holds no images_best.pt, images.pt or images_N.pt; name the file")
        path = held[0]
    if path.name.startswith("images_zca"):
        raise CondenseError(
            f"{path}: holds pictures for viewing, with the whitening undone; give {path.name.replace('_zca', '', 1)}"
        )
    found = _Found(_tensor(_load(path), path, "images"), None, [path], path, facts={"file": path.name})
    beside = {what: path.with_name(path.name.replace("images", what, 1)) for what in ("labels", "lr")}
    held = [other for other in beside.values() if other != path and other.is_file()]
    if labels or beside["labels"] in held:
        _read_labels(found, labels or beside["labels"])
    if beside["lr"] in held:
        found.lr = _step_size(str(beside["lr"]), found.files)
    return found


def _read_tensors(source: Path, labels: Path | None) -> _Found:
    content = _load_safetensors(source) if source.suffix == ".safetensors" else _load(source)
    if not isinstance(content, dict):
        content = {"images": content}
    if "images" not in content:
        raise CondenseError(f"{source}: holds {', '.join(map(str, content)) or 'nothing'}, but no 'images'")
    own = content.get("labels")
    found = _Found(
        _tensor(content["images"], source, "images"),
        None if own is None else _tensor(own, source, "labels"),
        [source],
        source,
    )
    found = _with_statements(found, content, source)
    if labels is not None:
        _read_labels(found, labels)
    return found


def _read_labels(found: _Found, path: Path) -> None:
    found.labels, found.labels_file, found.logits = _tensor(_load(path), path, "labels"), path, False
    found.files.append(path)


def _read_folder(source: Path, options: DataOptions) -> _Found:
    classes, split = read_images(source, options)
    images, labels = torch.from_numpy(split.images), torch.from_numpy(split.labels)
    return _Found(images, labels, [source], source, classes=classes)


def _with_statements(found: _Found, content: Mapping[Any, Any], source: Path) -> _Found:
    """``found`` with what our own exports state beside images and labels."""
    known = {name: content[name] for name in (*TRANSFORM, "logits", "lr") if isinstance(content.get(name), Tensor)}
    tensors = {name: _tensor(value, source, name) for name, value in known.items()}
    found.transform = {name: tensors[name].float().numpy() for name in TRANSFORM if name in tensors}
    if "logits" in tensors and tensors["logits"].is_floating_point():
        found.labels, found.logits = tensors["logits"], True
    if "lr" in tensors:
        found.lr = _positive(tensors["lr"], f"{source}: its learned lr")
    classes = content.get("classes")
    if isinstance(classes, list) and all(isinstance(name, str) for name in classes):
        found.classes = classes
    return found


class _Inert:
    """Takes the place of numpy's scalars, which the DC scripts save beside their sets: accepts anything, does
    nothing. So no function of numpy runs either."""

    def __init__(self, *state: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


_NUMPY = [(_Inert, name) for name in ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype")]


def _load(path: Path) -> Any:
    """What a ``.pt`` file holds: tensors, numbers, text, lists and dicts of them. Tensors may lie in the mapped file.

    Raises:
        CondenseError: no such file, damaged, compressed, or with anything that would have to be executed.
    """
    if not path.is_file():
        what = (
            "is a folder; name the file in it" if path.is_dir() else "no such file; give the .pt that its maker wrote"
        )
        raise CondenseError(f"{path}: {what}")
    try:
        packed = zipfile.is_zipfile(path)
        if packed and any(entry.compress_type != zipfile.ZIP_STORED for entry in zipfile.ZipFile(path).infolist()):
            raise CondenseError(f"{path}: a compressed archive, which torch never writes; unpack it")
        with torch.serialization.safe_globals(_NUMPY), warnings.catch_warnings():  # type: ignore[arg-type]
            warnings.simplefilter("ignore")  # of newer pickles, sparse tensors: refused below
            # Mapped, so that a tensor larger than its bytes in the file is refused in every version of torch.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=packed)
    except pickle.UnpicklingError as fault:
        named = re.search(r"GLOBAL (\S+)", str(fault))
        what = f"would run '{named[1]}'" if named else "is no list of tensors"
        raise CondenseError(f"{path}: not read, because it {what}; ask for a file that holds tensors alone") from fault
    except CondenseError:
        raise
    except Exception as fault:  # a broken file raises anything
        reason = (str(fault).splitlines() or [""])[0] or type(fault).__name__
        raise CondenseError(f"{path}: cannot be read as a .pt file ({reason}); copy it again") from fault


def _load_safetensors(path: Path) -> dict[str, Any]:
    """The tensors of a file, and ``classes`` where its metadata state them; the only tensor goes as ``images``."""
    safetensors = library("safetensors", f"{path}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:  # compares every claim with the file's size
            content: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            stated = json.loads((file.metadata() or {}).get("classes", "null"))
    except Exception as fault:
        reason = (str(fault).splitlines() or [""])[0]
        raise CondenseError(f"{path}: cannot be read as a .safetensors file ({reason}); copy it again") from fault
    if len(content) == 1:
        content = {"images": next(iter(content.values()))}
    return {**content, "classes": stated}


def _tensor(value: Any, path: Path, what: str) -> Tensor:
    """``value`` where it is a plain tensor that the file has room for."""
    plain = isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"
    if not plain or value.is_quantized:
        raise CondenseError(f"{path}: expected a tensor of {what}, found {type(value).__name__}; see --from")
    nbytes = value.numel() * value.element_size()
    if nbytes > path.stat().st_size:
        raise CondenseError(f"{path}: its {what} claim {nbytes} bytes, more than the file holds")
    return value.detach()


def _step_size(given: str | float, files: list[Path]) -> float:
    """The number given, or the one in the ``.pt`` file given, which joins ``files``."""
    try:
        return _positive(float(given), f"--lr {given}")
    except ValueError:
        path = Path(given)  # type: ignore[arg-type]
    files.append(path)
    return _positive(_load(path), f"--lr {given}")


def _positive(value: Any, where: str) -> float:
    single = isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1)
    if not single or not 0 < float(value) < math.inf:
        shown = f"found {float(value):g}" if single else "found something else"
        raise CondenseError(f"{where}: must be one number above 0, or a .pt file with one ({shown})")
    return float(value)


def _digest(path: Path) -> str:
    """SHA-256 of a file, or of the names and bytes of all files in a folder."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if path.is_dir():
            digest.update(f"{file.relative_to(path).as_posix()}\0".encode(errors="surrogateescape"))
        if file.is_file():
            digest.update(file.read_bytes())
    return digest.hexdigest()


# -- shared with the exports -----------------------------------------------------------------------------------------


def folder_name(name: str) -> str:
    """A class name as a folder name: what some file system forbids becomes %XX."""
    return re.sub(r'[/\\:*?"<>|%\x00-\x1f]|^\.|[. ]$', lambda match: f"%{ord(match[0]):02X}", name) or "%"


def library(name: str, purpose: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as fault:
        raise need(name.partition(".")[0], "hub", purpose) from fault
