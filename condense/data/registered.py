"""TODO-DOC."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from condense.data.arrays import _array, _images
from condense.data.folders import _list_folder, _read_folder
from condense.data.loaded import DataOptions, Loaded, Split, _cut, _finish, _stratified, data_root
from condense.errors import CondenseError
from condense.registry import Registry


@dataclass(frozen=True)
class Named:
    """A registered data set."""

    name: str
    description: str
    read: Callable[[DataOptions, bool], Loaded]
    """``read(options, download)``."""
    mean: tuple[float, ...] | None = None
    """Published per-channel mean, used in place of the computed one; so is ``std``."""
    std: tuple[float, ...] | None = None
    mirror: bool = True


def datasets() -> dict[str, str]:
    """The registered names, each with a line that describes it."""
    return {name: DATASETS.get(name).description for name in DATASETS.names()}


# --- Registered data sets ---------------------------------------------------------------------------------------------


def _read_named(entry: Named, options: DataOptions, download: bool) -> Loaded:
    """Loads a registered set; its published mean and deviation hold unless ``grey`` changed its channels."""
    try:
        loaded = replace(entry.read(options, download), name=entry.name, source=entry.name, mirror=entry.mirror)
    except OSError as error:
        reason = f"{error.strerror or error}: {error.filename or data_root()}"
        raise CondenseError(f"data '{entry.name}': {reason}") from error
    if entry.mean is None or len(entry.mean) != len(loaded.mean):
        return loaded
    return replace(loaded, mean=np.array(entry.mean), std=np.array(entry.std))


def _read_digits(options: DataOptions, download: bool) -> Loaded:
    from sklearn.datasets import load_digits

    found = load_digits()
    images = np.rint(found.images[:, None] * (255 / 16)).astype(np.uint8)
    labels = found.target.astype(np.int64)
    classes = [str(digit) for digit in range(10)]
    return _finish(classes, *_cut(images, labels, _stratified(labels, classes, "digits", "digits")), options)


def _torchvision(name: str, class_name: str, folder: str) -> Callable[[DataOptions, bool], Loaded]:
    """A reader for a set that torchvision reads and can fetch; its files lie in ``folder`` below the data root."""

    def read(options: DataOptions, download: bool) -> Loaded:
        import torchvision.datasets

        make = getattr(torchvision.datasets, class_name)
        root = data_root() / folder
        if download:
            root.mkdir(parents=True, exist_ok=True)
        parts = []
        for part in ("train", "test"):
            which = {"split": part} if class_name == "SVHN" else {"train": part == "train"}
            try:
                with contextlib.redirect_stdout(sys.stderr):
                    parts.append(make(str(root), download=download, **which))
            except Exception as error:
                if download:
                    reason = str(getattr(error, "reason", error)).split("\n")[0]
                    raise CondenseError(f"data '{name}' could not be downloaded to {root}: {reason}") from error
                if isinstance(error, (RuntimeError, OSError)):  # what torchvision raises for absent or damaged files
                    raise CondenseError(
                        f"data '{name}' is not, or not whole, in {root} (CONDENSE_DATA sets the place); "
                        "--download fetches it"
                    ) from error
                raise
        images = _images([part.data for part in parts], f"data '{name}'")
        labels = [_array(part.labels if class_name == "SVHN" else part.targets).astype(np.int64) for part in parts]
        classes = getattr(parts[0], "classes", None) or [str(digit) for digit in range(10)]
        return _finish(classes, Split(images[0], labels[0]), Split(images[1], labels[1]), options)

    return read


def _read_tiny_imagenet(options: DataOptions, download: bool) -> Loaded:
    folder = data_root() / "tiny-imagenet-200"
    if not (folder / "wnids.txt").is_file():
        raise CondenseError(
            f"data 'tiny-imagenet' is not in {folder} (CONDENSE_DATA sets the place); fetch tiny-imagenet-200.zip from "
            f"http://cs231n.stanford.edu/tiny-imagenet-200.zip and unzip it into {data_root()}"
        )
    listing = _list_folder(folder)
    if set(listing.classes) != set((folder / "wnids.txt").read_text().split()):
        raise CondenseError(f"data 'tiny-imagenet': the classes in {folder / 'train'} are not those of wnids.txt")
    return _read_folder(listing, options)


DATASETS: Registry[Named] = Registry("data set")

for _entry in (
    Named("digits", "scikit-learn's 1,797 handwritten digits, 1x8x8, embedded", _read_digits, mirror=False),
    Named(
        "mnist",
        "70,000 handwritten digits, 1x28x28",
        _torchvision("mnist", "MNIST", "."),
        (0.1307,),
        (0.3081,),
        mirror=False,
    ),
    Named(
        "fashion-mnist",
        "70,000 pieces of clothing in 10 classes, 1x28x28",
        _torchvision("fashion-mnist", "FashionMNIST", "."),
        (0.2861,),
        (0.3530,),
    ),
    Named(
        "svhn",
        "99,289 house-number digits (without the extra ones), 3x32x32",
        _torchvision("svhn", "SVHN", "svhn"),
        (0.4377, 0.4438, 0.4728),
        (0.1980, 0.2010, 0.1970),
        mirror=False,
    ),
    Named(
        "cifar10",
        "60,000 photographs in 10 classes, 3x32x32",
        _torchvision("cifar10", "CIFAR10", "."),
        (0.4914, 0.4822, 0.4465),
        (0.2023, 0.1994, 0.2010),
    ),
    Named(
        "cifar100",
        "60,000 photographs in 100 classes, 3x32x32",
        _torchvision("cifar100", "CIFAR100", "."),
        (0.5071, 0.4866, 0.4409),
        (0.2673, 0.2564, 0.2762),
    ),
    Named(
        "tiny-imagenet",
        "110,000 photographs in 200 classes, 3x64x64; the official validation images are the test split",
        _read_tiny_imagenet,
        (0.485, 0.456, 0.406),
        (0.229, 0.224, 0.225),
    ),
):
    DATASETS.add(_entry.name, _entry)
