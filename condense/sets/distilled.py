"""DistilledSet, the result of every method: one HDF5 file, which is checked on load and contains no pickle."""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from condense import hdf5, rng
from condense.data import (
    ZCA,
    Standardise,
    Task,
    class_numbers,
    selected_fingerprint,
    to_unit_range,
    transform_from_arrays,
)
from condense.errors import CondenseError
from condense.files import check_writable
from condense.formatting import by, shorten
from condense.hdf5 import RESTORE_HINT
from condense.labels import LABEL_KINDS, HardLabels, Labels, stated_image_shape
from condense.sets.array_file import checksums, read_arrays, write_arrays
from condense.sets.schema import SET_SCHEMA
from condense.sets.stages import Compensated, Stage, check_stages, decode, stages_from

IMAGE_TYPES = (np.uint8, np.float16, np.float32)

ARRAY_TYPES = (*IMAGE_TYPES, np.int8, np.uint16, np.uint32, np.int64)

DISTILLED_FORMAT = hdf5.Format("condense.distilled", 1, SET_SCHEMA, "condense distill")


@dataclass(frozen=True)
class Resampling:
    """Sampling of new real images in each epoch of an evaluation (RS2)."""

    share: float
    """Share of the real training images that an epoch draws."""
    counts: list[int]
    """Real training images of each class."""

    def size(self, images: int) -> int:
        """Returns the number of images that an epoch draws from ``images``."""
        return max(1, round(self.share * images))


class DistilledSet(Dataset[tuple[Tensor, Tensor | int]]):
    """A distilled set: stored images, labels, the map to training space and the manifest.

    As a ``torch.utils.data.Dataset`` it yields decoded images in pixel space, float32 in about [0,1] (learned pixels
    are neither clamped nor rounded), and their targets. ``set.transform`` maps pixel space to training space, for these
    images and for real test images::

        distilled = condense.load("set.h5")
        images, targets = next(iter(DataLoader(distilled, batch_size=256, shuffle=True)))
        loss = distilled.loss(network(distilled.transform(images)), targets)

    Attributes:
        stored: Images as in the file, (N,C,H,W) uint8, float16 or float32, in the space ``manifest["space"]``.
        indices: Rows of the real training images that the file holds instead of images, uint32 (N,); usually None.
        labels: Label provider, indexed by stored image.
        transform: Map from pixel space to training space.
        manifest: Name, origin, settings and cost of the set.
    """

    def __init__(
        self,
        stored: Tensor | None,
        labels: Labels,
        transform: Standardise | ZCA,
        manifest: Mapping[str, Any],
        indices: np.ndarray | None = None,
    ) -> None:
        self._stored, self.labels, self.transform, self.indices = stored, labels, transform, indices
        self.manifest: dict[str, Any] = {
            **manifest,
            "label_kind": labels.kind,
            "transform": transform.kind,
            "image_shape": list(manifest["image_shape"] if stored is None else stored.shape[1:]),
        }
        self._decoded: tuple[Tensor, Tensor] | None = None
        self._pixels: Tensor | None = None

    def __repr__(self) -> str:
        about = f"{self.num_stored} images {by(self.shape)}, {len(self.classes)} classes, {self.labels.kind} labels"
        return f"DistilledSet({self.name}: {about})"

    # -- images by index --------------------------------------------------------------------------------------------

    @property
    def stored(self) -> Tensor:
        """Images as in the file.

        Raises:
            CondenseError: The file holds indices into real data, which were not given.
        """
        if self._stored is None:
            raise CondenseError(
                f"{self.name} holds indices into '{self.manifest['dataset']}' instead of images; give this data: "
                "--data DATA, or condense.load(FILE, data=DATA)"
            )
        return self._stored

    @stored.setter
    def stored(self, images: Tensor) -> None:
        self._stored, self.indices = images, None

    @property
    def num_stored(self) -> int:
        """Number of stored images, or of the indices in their place."""
        return len(self.stored) if self.indices is None else len(self.indices)

    def with_data(self, task: Task) -> DistilledSet:
        """Returns the set with the images that its indices refer to; a set that stores images is returned unchanged.

        Raises:
            CondenseError: The data are not those that the indices refer to.
        """
        if self.indices is None or self._stored is not None:
            return self
        own = str(self.manifest["data"]["fingerprint"])
        if task.fingerprint != own:
            raise CondenseError(
                f"--data {task.name}: has the fingerprint {task.fingerprint[:12]}, but {self.name} holds indices into "
                f"'{self.manifest['dataset']}' of {own[:12]}; give the data that it was made from"
            )
        if self.indices.max() >= len(task.train):
            raise CondenseError(
                f"{self.name}: index {self.indices.max()}, but {task.name} has {len(task.train)} training images"
            )
        images = task.raw(torch.from_numpy(self.indices.astype(np.int64)))
        return DistilledSet(images, self.labels, self.transform, self.manifest, self.indices)

    # -- properties -------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """``dataset/method-ipcN.tag``."""
        return self.manifest["name"]

    @property
    def file_name(self) -> str:
        """Default name of the file: ``dataset-method-ipcN.tag-seedS.h5``."""
        seed = self.manifest.get("seed")
        return f"{self.name.replace('/', '-')}{f'-seed{seed}' if seed else ''}.h5"

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; target c is ``classes[c]``."""
        return tuple(self.manifest["classes"])

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C,H,W) of a decoded image."""
        channels, height, width = self.manifest["image_shape"]
        return channels, height, width

    @property
    def stages(self) -> list[Stage]:
        """The decode stages applied when the set is used."""
        return stages_from(self.manifest.get("decode", []))

    @property
    def compensated(self) -> Compensated | None:
        """The INFER decode stage, if there is one; labels then belong to decoded images instead of stored ones."""
        return next((stage for stage in self.stages if isinstance(stage, Compensated)), None)

    @property
    def resampling(self) -> Resampling | None:
        """How an evaluation draws real images in each epoch instead of the stored ones; None for a fixed set, and for
        one that was given other labels since."""
        facts = self.manifest.get("resampling")
        return Resampling(**facts) if facts and self.labels.kind == "hard" else None

    def nbytes(self) -> dict[str, int]:
        """Returns the bytes of ``images``, ``labels``, ``auxiliary`` (the transform), ``external`` (needed for training
        in addition to the file) and their ``total``."""
        parts = {
            "images": self.stored.nbytes if self.indices is None else self.indices.nbytes,
            "labels": self.labels.nbytes(),
            "auxiliary": sum(array.nbytes for array in self.transform.arrays().values()),
            "external": self.labels.external_nbytes(),
        }
        if self.indices is not None:  # the images, of 8 bits a value
            parts["external"] += len(self.indices) * math.prod(self.shape)
        if self.resampling:  # all real images, with labels of whole bits
            images, bits = sum(self.resampling.counts), math.ceil(math.log2(len(self.classes)))
            parts["external"] += images * math.prod(self.shape) + math.ceil(images * bits / 8)
        return {**parts, "total": sum(parts.values())}

    def sha256(self) -> str:
        """Returns a digest of all arrays and of the fields that define their meaning (decode, space, classes ...)."""
        meaning = {key: self.manifest.get(key) for key in ("classes", "decode", "space", "transform", "label_kind")}
        meaning |= {} if self.indices is None else {"fingerprint": self.manifest["data"]["fingerprint"]}
        meaning |= {"resampling": self.manifest["resampling"]} if self.resampling else {}
        text = json.dumps([sorted(checksums(self.arrays()).items()), meaning], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def pictures(self, decoded: bool = False) -> tuple[Tensor, int]:
        """Returns images for a picture, (N,C,H,W) in pixel space and sorted by class, and their number per class.

        Args:
            decoded: Whether to return decoded images instead of stored ones.
        """
        if decoded or self.compensated:
            order = torch.argsort(self.training_images()[1], stable=True)
            return self.images[order], len(order) // len(self.classes)
        stored = to_unit_range(self.stored)
        pixels = stored if self.manifest["space"] == "pixel" else self.transform.inverse(stored)
        return pixels, self.manifest["ipc"]

    # -- images and targets -----------------------------------------------------------------------------------------

    def training_images(self) -> tuple[Tensor, Tensor]:
        """Returns what students train on: images (M,C,H,W), float32 in training space, and their stored indices
        (M,)."""
        if self._decoded is None:
            images, ids = decode(to_unit_range(self.stored), self.stages)
            images = self.transform(images) if self.manifest["space"] == "pixel" else images
            if not bool(images.isfinite().all()):
                raise CondenseError(f"{self.name}: some pixels are not finite; {RESTORE_HINT}")
            self._decoded = images, ids
        return self._decoded

    @property
    def images(self) -> Tensor:
        """Decoded images (M,C,H,W), float32 in pixel space; ``transform(images)`` is in training space."""
        if self._pixels is None:
            if self.transform.kind == "zca":
                warnings.warn(
                    f"{self.name} was made on ZCA-whitened images: feed networks `set.transform(images)`, and give the "
                    "same transform to real test images",
                    stacklevel=3,
                )
            self._pixels = self.transform.inverse(self.training_images()[0])
        return self._pixels

    def hard_labels(self) -> Tensor:
        """Returns the class of each labelled image, int64 (N,): its hard label, or its position, as images are sorted.

        Raises:
            CondenseError: The number of images per class varies, so that the position does not determine the class.
        """
        if self.labels.is_hard:
            return self.labels.targets(torch.arange(len(self.labels)))
        ipc, classes = self.manifest["ipc"], len(self.classes)
        if self.compensated:
            return torch.arange(classes).repeat_interleave(self.compensated.decoded)
        is_free = self.manifest.get("settings", {}).get("balance") == "free"  # a selection with new labels
        if len(self.stored) != ipc * classes or is_free:
            raise CondenseError(f"{self.name}: {len(self.stored)} images are not {ipc} of each of {classes} classes")
        return torch.arange(classes).repeat_interleave(ipc)

    def select_classes(self, names: Sequence[str]) -> DistilledSet:
        """Returns the set of some classes, in the order of ``names``.

        Raises:
            CondenseError: the labels are not hard, the classes share decode parameters, or a name is no class.
        """
        numbers = class_numbers(names, self.classes, self.name)
        if not self.labels.is_hard or self.compensated:
            raise CondenseError(f"{self.name}: classes can be selected only from a set with hard labels")
        own = self.hard_labels()
        rows = torch.cat([(own == number).nonzero().squeeze(1) for number in numbers])
        labels = torch.cat([torch.full((int((own == c).sum()),), i) for i, c in enumerate(numbers)])
        data = self.manifest.get("data", {})
        fingerprint = selected_fingerprint(str(data.get("fingerprint", "")), names)
        manifest = {**self.manifest, "classes": list(names), "data": {**data, "fingerprint": fingerprint}}
        if self.resampling:
            counts = [self.resampling.counts[number] for number in numbers]
            manifest["resampling"] = {"share": self.resampling.share, "counts": counts}
        return DistilledSet(self.stored[rows], HardLabels(labels, len(names)), self.transform, manifest)

    def __len__(self) -> int:
        return len(self.training_images()[0])

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor | int]:
        """Returns a decoded image (C,H,W) in pixel space and its target: the class as an int, as in the datasets of
        torchvision, or class probabilities (classes,).

        Raises:
            CondenseError: the labels belong to views.
        """
        target = self.labels.targets(self.training_images()[1][index])
        return self.images[index], int(target) if self.labels.is_hard else target

    def batches(self, epoch: int, batch_size: int, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields shuffled batches of one epoch: images (B,C,H,W) in pixel space and their targets.

        With per-view labels the images are already augmented and mixed; add no other augmentation. The views are
        computed in training space, as for the teacher, and mapped back, because whitening and cropping do not commute.

        Args:
            epoch: Number of the epoch, from 0; the same epoch gives the same batches.
            batch_size: Images per batch; the last batch may be smaller.
            seed: Seed of the order; unused if the labels belong to views that are mixed in batches of this size.
        """
        order = rng.Draws(seed, "batches", epoch).permutation(len(self))
        chunks = self.labels.mixed_batches(epoch, batch_size) or order.split(batch_size)
        pixels, (images, ids) = self.images, self.training_images()
        for chunk in chunks:
            if self.labels.per_view:
                views, targets = self.labels.training_batch(images, chunk, epoch)
                yield self.transform.inverse(views), targets
            else:
                yield pixels[chunk], self.labels.targets(ids[chunk])

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Returns the mean loss of logits (B, classes) for this set's targets."""
        return self.labels.loss(logits, targets)

    # -- the file ---------------------------------------------------------------------------------------------------

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns the arrays of the file by path."""
        arrays = {"images": self.stored.detach().cpu().numpy()} if self.indices is None else {"indices": self.indices}
        arrays |= {f"labels/{name}": array for name, array in self.labels.arrays().items()}
        arrays |= {f"transform/{name}": array for name, array in self.transform.arrays().items()}
        return arrays

    def save(self, path: str | Path, *, force: bool = False) -> Path:
        """Writes the file atomically: a kill leaves either the old file or the complete new one.

        Raises:
            CondenseError: The file exists and ``force`` is False, or it cannot be written.
        """
        path, arrays = Path(path), self.arrays()
        check_writable(path, force=force, size=self.nbytes()["total"])
        self.manifest |= {"bytes": self.nbytes(), "checksums": checksums(arrays)}
        write_arrays(path, DISTILLED_FORMAT, self.manifest, arrays, DistilledSet.load)
        return path

    @classmethod
    def load(cls, path: str | Path) -> DistilledSet:
        """Reads and verifies a file.

        Raises:
            CondenseError: One line: another format, a newer version, a truncated file, or the name of a damaged array.
        """
        path = Path(path)
        arrays, manifest = _read(path)
        labels = {name[7:]: array for name, array in arrays.items() if name.startswith("labels/")}
        transform = {name[10:]: array for name, array in arrays.items() if name.startswith("transform/")}
        try:
            indices = arrays.get("indices")
            shape = tuple(manifest["image_shape"] if indices is not None else arrays["images"].shape[1:])
            if stated_image_shape(labels) not in (None, shape):
                raise CondenseError(f"its images are {by(shape)}, but its labels belong to images of another shape")
            counts = manifest.get("resampling", {}).get("counts", manifest["classes"])
            if len(counts) != len(manifest["classes"]):
                raise CondenseError(f"{len(manifest['classes'])} classes, but resampling counts of {len(counts)}")
            provider = LABEL_KINDS.get(manifest["label_kind"]).from_arrays(labels, len(manifest["classes"]))
            restored = transform_from_arrays(manifest["transform"], transform, shape)
            stored = torch.from_numpy(arrays["images"]) if indices is None else None
            loaded = cls(stored, provider, restored, manifest, indices)
            images = len(arrays["images"] if indices is None else indices)
            if indices is not None and (loaded.stages or manifest["data"].get("fingerprint") is None):
                raise CondenseError("holds indices, but also decode stages, or no fingerprint of the data")
            check_stages(loaded.stages, (images, *shape))
            stage = loaded.compensated
            if provider.per_view and loaded.stages and not stage:
                raise CondenseError(f"{provider.kind} labels belong to stored images, which its decode stages cut up")
            if stage and stage.classes != len(loaded.classes):
                raise CondenseError(f"{len(loaded.classes)} classes, but its decode stage has {stage.classes}")
            if stage and images != stage.stored:
                raise CondenseError(f"{images} images, but its decode stage needs {stage.stored}")
            count = stage.decoded * len(loaded.classes) if stage else images
            if len(provider) != count:
                raise CondenseError(f"{count} images but {len(provider)} labels")
            views = getattr(provider, "views", None)
            if views is not None:
                views.check_fit(shape)
            options = manifest.get("data", {}).get("options", {})
            name = "resize" if options.get("crop") is None else "crop"
            side = options.get(name)
            if side not in (None, *shape[1:]):  # real data would be resized to it before their size is compared
                raise CondenseError(f"its data have the option {name}={side}, but its images are {by(shape)}")
        except KeyError as fault:
            raise CondenseError(
                f"{path}: the manifest or the file lacks {fault}; it was not written by this toolkit"
            ) from fault
        except CondenseError as fault:
            raise CondenseError(f"{path}: {fault}") from fault
        return loaded


def check_set(value: Any) -> DistilledSet:
    """Returns a set that a caller gave.

    Raises:
        CondenseError: it is something else.
    """
    if not isinstance(value, DistilledSet):
        raise CondenseError(
            f"{shorten(repr(value), 100)} is not a distilled set of images; condense.load(FILE) reads one"
        )
    return value


def packaged_sets() -> dict[str, Path]:
    """Returns the paths of the sets that are included in the package, by name."""
    folder = Path(__file__).parents[1] / "distilled_sets"
    if not folder.is_dir():  # in a source checkout
        folder = Path(__file__).parents[2] / "distilled_sets"
    return {str(path.relative_to(folder).with_suffix("")): path for path in sorted(folder.glob("*/*.h5"))}


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Reads all arrays and the manifest of an untrusted file, and checks the images."""
    arrays, manifest = read_arrays(path, DISTILLED_FORMAT, ARRAY_TYPES)
    if "indices" in arrays and "images" not in arrays:
        if arrays["indices"].dtype != np.uint32 or arrays["indices"].ndim != 1 or not arrays["indices"].size:
            raise CondenseError(f"{path}: the array 'indices' is not a list of numbers of images")
        return arrays, manifest
    if "images" not in arrays or arrays["images"].ndim != 4 or arrays["images"].dtype.type not in IMAGE_TYPES:
        raise CondenseError(f"{path}: no array 'images' of uint8, float16 or float32 with four dimensions")
    if not arrays["images"].size:
        raise CondenseError(f"{path}: the array 'images' is empty")
    if arrays["images"].dtype != np.uint8 and not np.isfinite(arrays["images"]).all():
        raise CondenseError(f"{path}: some pixels are not finite; {RESTORE_HINT}")
    return arrays, manifest
