"""Data sets that are registered by name, e.g. ``cifar10``."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from condense.data.arrays import check_images, to_array
from condense.data.folders import list_folder
from condense.data.image_cache import read_folder
from condense.data.loaded import (
    DataOptions,
    LoadedData,
    Split,
    data_root,
    from_splits,
    parse_channels,
    stratified_splits,
)
from condense.errors import CondenseError, did_you_mean
from condense.registry import Registry


@dataclass(frozen=True)
class RegisteredDataset:
    """A registered data set."""

    name: str
    description: str
    read: Callable[[DataOptions, bool], LoadedData]
    """``read(options, download)``."""
    shape: tuple[int, int, int]
    """(C,H,W) of its images."""
    num_classes: int
    mean: tuple[float, ...] | None = None
    """Published per-channel mean, which replaces the computed one."""
    std: tuple[float, ...] | None = None
    """Published per-channel std, which replaces the computed one."""
    mirror: bool = True
    """Whether a mirror image keeps its class."""


def datasets() -> dict[str, str]:
    """Registered names, each with a one-line description."""
    return {name: DATASETS.get(name).description for name in DATASETS.names()}


def read_registered(entry: RegisteredDataset, options: DataOptions, download: bool) -> LoadedData:
    """Loads a registered data set. Its published mean and std apply unless ``grey`` changed the number of channels.

    Raises:
        CondenseError: the data set is not on disk, or cannot be downloaded.
    """
    try:
        loaded = replace(entry.read(options, download), name=entry.name, source=entry.name, mirror=entry.mirror)
    except OSError as error:
        reason = f"{error.strerror or error}: {error.filename or data_root()}"
        raise CondenseError(f"data '{entry.name}': {reason}") from error
    if entry.mean is None or len(entry.mean) != len(loaded.mean):
        return loaded
    return replace(loaded, mean=np.array(entry.mean), std=np.array(entry.std))


def apply_registered(loaded: LoadedData, options: DataOptions) -> LoadedData:
    """Returns data that have a registered name, e.g. a folder ``cifar10``, with the registered mean, std and mirror.

    Published numbers depend on them: the std of CIFAR-10's pixels is 1.23 times the std that most papers divide by.
    Data with another name, number of classes or image shape are returned as they are.
    """
    if loaded.name not in DATASETS:
        return loaded
    entry = DATASETS.get(loaded.name)
    shape = loaded.train.images.shape[1:]
    if len(loaded.classes) != entry.num_classes or shape[0] != entry.shape[0]:
        return loaded
    if options.resizing("train") is None and shape != entry.shape:
        return loaded
    loaded = replace(loaded, mirror=entry.mirror)
    if entry.mean is None:
        return loaded
    return replace(loaded, mean=np.array(entry.mean), std=np.array(entry.std))


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def apply_normalisation(loaded: LoadedData, options: DataOptions) -> LoadedData:
    """Returns data with the mean and std of ``options``: those given as numbers, or those of a name.

    Raises:
        CondenseError: the name is unknown, or the numbers are not those of as many channels.
    """
    if options.normalise is None and options.mean is None:
        return loaded
    if options.mean is not None and options.std is not None:
        text, mean, std = (
            f"mean={options.mean}",
            parse_channels("mean", options.mean),
            parse_channels("std", options.std),
        )
    else:
        entries = map(DATASETS.get, DATASETS.names())
        known = {entry.name: (entry.mean, entry.std) for entry in entries if entry.mean and entry.std}
        known["imagenet"] = (IMAGENET_MEAN, IMAGENET_STD)
        text = f"normalise={options.normalise}"
        if options.normalise not in known:
            raise CondenseError(f"{text}: unknown{did_you_mean(str(options.normalise), known)}")
        mean, std = known[options.normalise]
    if len(mean) != len(loaded.mean):
        raise CondenseError(f"{text}: has {len(mean)} channel(s), the images have {len(loaded.mean)}")
    return replace(loaded, mean=np.array(mean), std=np.array(std))


def _read_digits(options: DataOptions, download: bool) -> LoadedData:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images[:, None] * (255 / 16)).astype(np.uint8)
    labels = digits.target.astype(np.int64)
    classes = [str(digit) for digit in range(10)]
    return from_splits(classes, *stratified_splits(images, labels, classes, "digits", "digits"), options)


def _torchvision(name: str, class_name: str, folder: str) -> Callable[[DataOptions, bool], LoadedData]:
    """Returns a reader for a data set of torchvision, whose files are in ``folder`` below the data root."""

    def read(options: DataOptions, download: bool) -> LoadedData:
        import torchvision.datasets

        dataset_class = getattr(torchvision.datasets, class_name)
        root = data_root() / folder
        if download:
            root.mkdir(parents=True, exist_ok=True)
        parts = []
        for part in ("train", "test"):
            part_argument = {"split": part} if class_name == "SVHN" else {"train": part == "train"}
            try:
                with contextlib.redirect_stdout(sys.stderr):
                    parts.append(dataset_class(str(root), download=download, **part_argument))
            except Exception as error:
                if download:
                    reason = str(getattr(error, "reason", error)).split("\n")[0]
                    raise CondenseError(f"data '{name}' could not be downloaded to {root}: {reason}") from error
                if isinstance(error, (RuntimeError, OSError)):  # torchvision's errors for missing or damaged files
                    raise CondenseError(
                        f"data '{name}' is not, or not whole, in {root} (CONDENSE_DATA sets the place); "
                        "--download fetches it"
                    ) from error
                raise
        images = check_images([part.data for part in parts], f"data '{name}'")
        labels = [to_array(part.labels if class_name == "SVHN" else part.targets).astype(np.int64) for part in parts]
        classes = getattr(parts[0], "classes", None) or [str(digit) for digit in range(10)]
        return from_splits(classes, Split(images[0], labels[0]), Split(images[1], labels[1]), options)

    return read


def _read_tiny_imagenet(options: DataOptions, download: bool) -> LoadedData:
    folder = data_root() / "tiny-imagenet-200"
    if not (folder / "wnids.txt").is_file():
        raise CondenseError(
            f"data 'tiny-imagenet' is not in {folder} (CONDENSE_DATA sets the place); fetch tiny-imagenet-200.zip from "
            f"http://cs231n.stanford.edu/tiny-imagenet-200.zip and unzip it into {data_root()}"
        )
    listing = list_folder(folder, options)
    if set(listing.classes) != set((folder / "wnids.txt").read_text().split()):
        raise CondenseError(f"data 'tiny-imagenet': the classes in {folder / 'train'} are not those of wnids.txt")
    return read_folder(listing, options)


DATASETS: Registry[RegisteredDataset] = Registry("data set")

for _entry in (
    RegisteredDataset(
        "digits", "scikit-learn's 1,797 handwritten digits, 1x8x8, embedded", _read_digits, (1, 8, 8), 10, mirror=False
    ),
    RegisteredDataset(
        "mnist",
        "70,000 handwritten digits, 1x28x28",
        _torchvision("mnist", "MNIST", "."),
        (1, 28, 28),
        10,
        (0.1307,),
        (0.3081,),
        mirror=False,
    ),
    RegisteredDataset(
        "fashion-mnist",
        "70,000 pieces of clothing in 10 classes, 1x28x28",
        _torchvision("fashion-mnist", "FashionMNIST", "."),
        (1, 28, 28),
        10,
        (0.2861,),
        (0.3530,),
    ),
    RegisteredDataset(
        "svhn",
        "99,289 house-number digits (without the extra ones), 3x32x32",
        _torchvision("svhn", "SVHN", "svhn"),
        (3, 32, 32),
        10,
        (0.4377, 0.4438, 0.4728),
        (0.1980, 0.2010, 0.1970),
        mirror=False,
    ),
    RegisteredDataset(
        "cifar10",
        "60,000 photographs in 10 classes, 3x32x32",
        _torchvision("cifar10", "CIFAR10", "."),
        (3, 32, 32),
        10,
        (0.4914, 0.4822, 0.4465),
        (0.2023, 0.1994, 0.2010),
    ),
    RegisteredDataset(
        "cifar100",
        "60,000 photographs in 100 classes, 3x32x32",
        _torchvision("cifar100", "CIFAR100", "."),
        (3, 32, 32),
        100,
        (0.5071, 0.4866, 0.4409),
        (0.2673, 0.2564, 0.2762),
    ),
    RegisteredDataset(
        "tiny-imagenet",
        "110,000 photographs in 200 classes, 3x64x64; the official validation images are the test split",
        _read_tiny_imagenet,
        (3, 64, 64),
        200,
        IMAGENET_MEAN,
        IMAGENET_STD,
    ),
):
    DATASETS.add(_entry.name, _entry)
