"""Imports third-party distilled sets. Files are untrusted and checked against the real data."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from condense import networks, rng
from condense.data import ZCA, DataOptions, Standardise, Task, load_task, transform_from_arrays
from condense.errors import CondenseError, did_you_mean
from condense.exchange.reading import (
    ImportedFiles,
    file_digest,
    read_dc,
    read_image_folder,
    read_mtt,
    read_step_size,
    read_tensors,
)
from condense.exchange.shared import folder_name, given_standardise
from condense.files import check_name
from condense.formatting import by
from condense.judge import get_protocol
from condense.labels import HardLabels, Labels, RegressionLabels, SoftLabels
from condense.sets import DistilledSet, Formation
from condense.version import __version__

FORMS = ("dc", "mtt", "tensors", "imagefolder")
"""Formats of ``condense import --from``."""

DEFAULT_IMPORT_NETWORK = "convnet-d3-w128-in"
"""Architecture of nearly all published sets of small images."""

_log = logging.getLogger(__name__)


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
    factor: int = 1,
    label_values: str = "",
    method: str | None = None,
    network: str = DEFAULT_IMPORT_NETWORK,
    protocol: str | None = None,
) -> DistilledSet:
    """Imports a third-party set as a :class:`DistilledSet` sorted by class.

    Float images are assumed to be in training space, uint8 images in pixel space. The transform is given by ``mean``
    and ``std``, otherwise by the file, otherwise by the data (ZCA with the option ``zca``).

    Args:
        source: the file, or the folder (imagefolder, mtt).
        form: dc (``{"data": [[images, labels], ...]}``), mtt (``images_best.pt``, ``labels_best.pt``, ``lr_best.pt``),
            tensors (class-sorted images, ``.pt`` or ``.safetensors``), imagefolder (``<class>/*`` or
            ``train/<class>/*``).
        data: the real data that the set was made from: a :class:`Task`, or the ``data`` argument of ``condense.task``.
        options: options of the data, if it is not a task.
        download: fetch a registered dataset that is not on disk.
        labels: ``.pt`` file of labels: int (N,), or float (N, classes) probabilities or logits.
        lr: learned step size for students: a number or a ``.pt`` file with one.
        index: experiment of a dc file; by default the last one.
        mean: mean that was subtracted from each channel of pixels in [0,1].
        std: std that they were divided by.
        factor: side of the grid of training images in each stored image, for sets of IDC, IDM, DREAM and DANCE.
        label_values: what float labels (N, classes) are that are no probabilities: logits or regression (targets of the
            mean squared error); required for tensors, otherwise logits unless every row sums to 0.
        method: method in the name of the set; by default ``form``.
        network: architecture that the set was made with.
        protocol: protocol to evaluate it under; by default dc-v1 for hard labels.

    Raises:
        CondenseError: the file is damaged, holds code, or does not fit the data.
    """
    if form not in FORMS:
        raise CondenseError(f"--from {form}: unknown{did_you_mean(form, FORMS)}")
    source, method = Path(source), check_name(method or form)
    options = data.options if isinstance(data, Task) else options or DataOptions()
    networks.check_network(network)
    if protocol is not None:
        get_protocol(protocol)
    if not 1 <= factor <= 16:
        raise CondenseError(f"--factor {factor}: must be 1 to 16")
    if label_values not in ("", "logits", "regression"):
        raise CondenseError(f"--label-values {label_values}: must be logits or regression")
    standardise = given_standardise(mean, std)
    if standardise is not None and options.zca:
        raise CondenseError("zca=true: whitened images have no --mean and --std; leave either out")
    for flag, value, forms in (("--labels", labels, ("mtt", "tensors")), ("--index", index, ("dc",))):
        if value is not None and form not in forms:
            raise CondenseError(f"{flag} {value}: does not go with --from {form}; leave it out")
    if form == "dc":
        files = read_dc(source, index)
    elif form == "imagefolder":
        files = read_image_folder(source, options)
    else:
        labels_file = None if labels is None else Path(labels)
        files = read_mtt(source, labels_file) if form == "mtt" else read_tensors(source, labels_file)
    if lr is not None:
        files.lr = read_step_size(lr, files.paths)
    task = load_task(data, None if isinstance(data, Task) else options, download=download)
    with rng.seeded("check"):  # reports here, not in `evaluate`, that the network does not fit the images
        networks.build_network(network, task.shape, task.num_classes)
    return _to_distilled(
        source,
        form,
        files,
        task,
        standardise,
        method=method,
        network=network,
        protocol=protocol,
        label_values=label_values,
        factor=factor,
    )


def _to_distilled(
    source: Path,
    form: str,
    files: ImportedFiles,
    task: Task,
    standardise: Standardise | None,
    *,
    method: str,
    network: str,
    protocol: str | None,
    label_values: str,
    factor: int,
) -> DistilledSet:
    """Checks the content of the files against the data, and adds the manifest."""
    files.images = _channels_first(files.images, task)
    images = _check_images(files.images, source, task)
    if form == "imagefolder":
        numbers = torch.tensor(_folder_numbers(files.classes, source, task))
        files.labels = numbers[files.labels]
    elif files.classes and tuple(files.classes) != task.classes:
        raise CondenseError(
            f"{source}: was made for the classes {', '.join(files.classes[:3])}, ... ({len(files.classes)}), "
            f"{task.name} has others; give the --data that it was made from"
        )
    must_ask = form == "tensors" and not label_values  # the files of mtt have logits
    provider, order = _check_labels(files, len(images), task, source, label_values, must_ask)
    transform, normalised = _transform(files, standardise, task, source, form)
    ipc = len(images) // task.num_classes
    if provider.is_hard:  # classes may have different numbers
        ipc = int(provider.targets(torch.arange(len(images))).bincount().max())
    manifest = {
        "name": f"{task.name}/{method}-ipc{ipc}",
        "dataset": task.name,
        "classes": list(task.classes),
        "ipc": ipc,
        "space": "pixel" if images.dtype == torch.uint8 else "training",
        "decode": [Formation(factor, 0.5 if images.dtype == torch.uint8 else 0.0).describe()] if factor > 1 else [],
        "distill_decode": [],
        "mirror": task.mirror,
        "method": method,
        "settings": {},
        "network": network,
        "data": {"fingerprint": task.fingerprint, "options": task.options.to_dict()},
        "code_version": __version__,
        "cost": {},  # unknown
        "imported": {
            "from": form,
            "sha256": {path.name: file_digest(path) for path in files.paths},
            "transform": normalised,
            "labels": "by class order" if files.labels is None else files.labels_file.name,
            **files.facts,
        },
    }
    if protocol or provider.is_hard:  # otherwise that of the label track
        manifest["protocol"] = protocol or "dc-v1"
    if files.lr is not None:
        manifest["learned_lr"] = files.lr
    return DistilledSet(images[order].contiguous(), provider, transform, manifest)


def _channels_first(images: Tensor, task: Task) -> Tensor:
    """Images (N,C,H,W) of images (N,H,W,C), which JAX and TensorFlow use."""
    last = images.ndim == 4 and tuple(images.shape[1:]) != task.shape
    if last and (images.shape[3], *images.shape[1:3]) == task.shape:
        return images.permute(0, 3, 1, 2).contiguous()
    return images


def _check_images(images: Tensor, source: Path, task: Task) -> Tensor:
    """Checks shape, type and range of the images; returns uint8, float16 or float32."""
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
        raise CondenseError(f"{source}: some pixels are not finite; ask the author for an intact file")
    return images


def _check_labels(
    files: ImportedFiles, count: int, task: Task, source: Path, values: str, must_ask: bool
) -> tuple[Labels, Tensor]:
    """Checks the labels. Returns them, and the order (N,) that sorts the images by class.

    Soft labels are sorted by their most probable class if every class then has the same number; otherwise the file is
    assumed to be sorted.
    """
    classes, labels, where = task.num_classes, files.labels, files.labels_file
    if labels is not None and labels.is_floating_point() and labels.numel() == count:
        labels = labels.flatten()
        if bool((labels == labels.round()).all()):  # class numbers, saved as floats
            labels = labels.long()
    elif labels is not None and tuple(labels.shape) == (count, 1):
        labels = labels.flatten()
    soft = labels is not None and labels.is_floating_point()
    if (labels is None or soft) and count % classes:
        raise CondenseError(
            f"{source}: {count} images are not equally many of each of {classes} classes of {task.name}"
            + ("" if soft else "; state their classes with --labels FILE")
        )
    if labels is None:
        labels = torch.arange(classes).repeat_interleave(count // classes)
    shape = (count, classes) if soft else (count,)
    if tuple(labels.shape) != shape or labels.dtype == torch.bool or labels.is_complex():
        raise CondenseError(
            f"{where}: {count} images but labels {labels.dtype} {by(labels.shape)}; "
            f"give integers ({count},) or floats ({count}, {classes})"
        )
    if soft:
        if not bool(labels.isfinite().all()):
            raise CondenseError(f"{where}: some labels are not finite; ask the author for an intact file")
        likeliest = labels.argmax(1)
        even = bool((likeliest.bincount(minlength=classes) == count // classes).all())
        order = likeliest.argsort(stable=True) if even else torch.arange(count)
        labels = labels.float()[order]
        if values == "regression":
            return RegressionLabels(labels), order
        if values == "" and not files.logits and _may_be_regression(labels):
            raise CondenseError(
                f"{where}: every row of its labels sums to 0, as targets of kernel regression do; give "
                "--label-values regression, or --label-values logits"
            )
        if must_ask and not files.logits and not _are_distributions(labels):
            raise CondenseError(
                f"{where}: its labels are neither class numbers nor probabilities; give --label-values logits, or "
                "--label-values regression (targets of the squared error, as of kernel methods)"
            )
        return SoftLabels(labels.clone() if files.logits or values == "logits" else _logits(labels)), order
    labels = labels.long()
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise CondenseError(
            f"{where}: labels run from {low} to {high}, but {task.name} has the classes 0 to {classes - 1}"
        )
    counts = labels.bincount(minlength=classes)
    if not int(counts.min()):
        raise CondenseError(
            f"{where}: class '{task.classes[int(counts.argmin())]}' has 0 images; give some of each class"
        )
    order = labels.argsort(stable=True)
    return HardLabels(labels[order], classes), order


def _may_be_regression(labels: Tensor) -> bool:
    """Whether every row sums to 0, up to rounding: a one-hot vector minus its mean, such as 0.9 and -0.1."""
    return bool((labels.sum(1).abs() <= 1e-3 * labels.abs().sum(1)).all()) and bool(labels.any())


def _are_distributions(labels: Tensor) -> bool:
    """Whether every row has probabilities that sum to 1."""
    return bool((labels >= 0).all()) and bool(((labels.sum(1) - 1).abs() < 1e-3).all())


def _logits(labels: Tensor) -> Tensor:
    """Converts soft labels (N, classes) to logits; rows that are not all distributions are logits already."""
    if _are_distributions(labels):
        return labels.clamp_min(torch.finfo(torch.float32).tiny).log()
    return labels.clone()


def _transform(
    files: ImportedFiles, standardise: Standardise | None, task: Task, source: Path, form: str
) -> tuple[Standardise | ZCA, str]:
    """The map to training space, and a text that names its origin in the manifest."""
    if standardise is not None:
        if len(standardise.mean) != task.shape[0]:
            raise CondenseError(
                f"--mean, --std: {len(standardise.mean)} numbers for images of {task.shape[0]} channels"
            )
        return standardise, "the mean and std given"
    if files.transform:
        kind = "zca" if "matrix" in files.transform else "standardise"
        if task.options.zca and kind != "zca":
            raise CondenseError(f"zca=true: {source} states a mean and std of its own; leave zca=true out")
        try:
            restored = transform_from_arrays(kind, files.transform, task.shape)
        except CondenseError as fault:
            raise CondenseError(f"{source}: {fault}") from fault
        return restored, f"the {'ZCA' if kind == 'zca' else 'mean and std'} of the file"
    if files.images.is_floating_point() and files.images.min() >= 0 and files.images.max() <= 1:
        ones, zeros = (",".join([digit] * task.shape[0]) for digit in "10")
        raise CondenseError(
            f"{source}: its pixels lie in [0,1], so they are not in the training space of {task.name}; save them as "
            f"uint8, or state that they were not normalised: --mean {zeros} --std {ones}"
        )
    if task.options.zca:
        return task.transform, f"ZCA fitted on {task.name}"
    if files.images.dtype == torch.uint8:
        return task.transform, f"mean and std of {task.name}"
    _refuse_whitened(files.images, task, source)
    return _find_normalisation(files.images, task, source, form)


MADE_FOR = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
"""Mean and std in the scripts of DC, MTT and their successors, for CIFAR-10 and CIFAR-100 alike."""

MIN_CORRELATION = 0.15, 0.65
"""Whitened images have at least the first correlation of neighbouring pixels (noise has less), and less than the second
share of that of real images. Measured: whitened published sets 0.3 to 0.5, standardised ones 0.78 to 0.92."""


def _refuse_whitened(images: Tensor, task: Task, source: Path) -> None:
    """Refuses images that look ZCA-whitened, because students would be tested on images of another space.

    Raises:
        CondenseError: neighbouring pixels correlate much less than in the real images.
    """
    sample = task.pixels(torch.arange(0, len(task.train), max(1, len(task.train) // 256)))
    own, real = _correlation(images.float()), _correlation(sample.cpu())
    if MIN_CORRELATION[0] < own < MIN_CORRELATION[1] * real:
        raise CondenseError(
            f"{source}: its images look whitened (neighbouring pixels correlate by {own:.2f}, those of {task.name} by "
            f"{real:.2f}); give zca=true, or state --mean and --std if they are not"
        )


def _correlation(images: Tensor) -> float:
    """Correlation of horizontally neighbouring pixels, about the mean of each channel of each image."""
    centred = images - images.mean((2, 3), keepdim=True)
    left, right = centred[..., :-1], centred[..., 1:]
    scale = float((left.square().sum() * right.square().sum()).sqrt())
    return float((left * right).sum()) / scale if scale else 1.0


def _find_normalisation(images: Tensor, task: Task, source: Path, form: str) -> tuple[Standardise | ZCA, str]:
    """The mean and std that the pixels were normalised by, and a text that says how they were found.

    Pixels that were clamped to [0, 1] before end at (0 - mean) / std and (1 - mean) / std in each channel. Otherwise
    files of the scripts of DC and MTT on CIFAR images have the constants of these scripts; others, those of the data.
    """
    own = task.transform
    assert isinstance(own, Standardise)
    candidates = {f"mean and std of {task.name}": own}
    if task.shape == (3, 32, 32):
        mean, std = map(torch.tensor, MADE_FOR)
        candidates["the mean and std of the scripts of DC and MTT"] = Standardise(mean, std)
    for text, transform in candidates.items():
        ends = [transform(torch.full((task.shape[0], 1, 1), end)).flatten() for end in (0.0, 1.0)]
        reached = images.float().amin((0, 2, 3)), images.float().amax((0, 2, 3))
        if all(torch.allclose(a, b, atol=2e-3) for a, b in zip(ends, reached)):
            return transform, f"{text}, at whose ends the pixels are clamped"
    names = list(candidates)
    text = names[-1] if form in ("dc", "mtt") and task.name in ("cifar10", "cifar100") else names[0]
    transform = candidates[text]
    pixels = transform.inverse(images.float())
    outside = float(((pixels < -0.5) | (pixels > 1.5)).float().mean())
    if outside > 0.05:
        _log.warning(
            "condense: %s: %.0f %% of its pixels lie far outside [0, 1] after %s; were they normalised by others "
            "(--mean, --std)?",
            source,
            100 * outside,
            text,
        )
    return transform, text


def _folder_numbers(folders: Sequence[str], source: Path, task: Task) -> list[int]:
    """Class number of each folder: by class name, or 0..C-1 as in ``00007`` and ``new007`` (SRe2L's family)."""
    numbers = {folder_name(name): number for number, name in enumerate(task.classes)}
    matches = [re.fullmatch(r"(?:new)?(\d+)", name) for name in folders]
    indices = [int(match[1]) for match in matches if match]
    if set(folders) != set(numbers) and sorted(indices) == list(range(task.num_classes)) and all(matches):
        return indices
    for where, names, others in ((source, set(folders), set(numbers)), (task.name, set(numbers), set(folders))):
        extra = sorted(names - others)
        if extra:
            raise CondenseError(
                f"{source}: its folders are not the classes of {task.name}: {where} alone has '{extra[0]}'"
                + (f" and {len(extra) - 1} more" if len(extra) > 1 else "")
                + "; rename them, or give the --data that it was made from"
            )
    return [numbers[name] for name in folders]
