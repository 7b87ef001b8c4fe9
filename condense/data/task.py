"""Task: the real images that a method distils and that students are tested on, and batches of them."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from condense.data.loaded import DataOptions, LoadedData, Split, check_class_names, class_numbers, selected_fingerprint
from condense.data.registered import apply_normalisation
from condense.data.sources import read_data, read_objects
from condense.data.transform import ZCA, Standardise
from condense.device import check_host_memory, free_memory, upload, upload_indices
from condense.errors import CondenseError
from condense.files import check_name
from condense.formatting import by
from condense.rng import Draws, hash64, key

CHUNK = 256
"""Images that are normalised at once on the CPU."""

ORIGINALS_AHEAD = 32
"""Images at their own size that are decoded at once."""


class Task:
    """Real train and test images, with the facts that a method needs.

    ``ids`` are row numbers of a split, int64 on the CPU. Images are stored as uint8, or as float32 in [0,1], and
    normalised per batch. On an accelerator, a split is kept in device memory if it fits in a quarter of the memory that
    is free at its first use; otherwise its rows are gathered on the host and copied. On the CPU the (memory-mapped)
    array is read in place. The placement does not change any value.
    """

    MAX_HASHES = 2**22
    """Maximum number of hashes computed at once, of 8 bytes each plus a few temporaries of that size."""

    name: str
    """Name in records and set names."""
    classes: tuple[str, ...]
    train: Split
    test: Split
    mirror: bool
    """Whether a mirror image keeps its class; if not, augmentations do not flip."""
    fingerprint: str
    """SHA-256 hex of class names, train and test pixels and labels, in order (content, not file names)."""
    transform: Standardise | ZCA
    """Map from pixels in [0,1] to the space that networks are trained in."""
    source: str | None
    """DATA argument that loads it again (with ``options``), with absolute paths; None for data from memory."""
    options: DataOptions
    """Options it was loaded with."""
    device: torch.device
    """Device of the batches."""

    def __init__(
        self,
        name: str,
        classes: tuple[str, ...],
        train: Split,
        test: Split,
        *,
        mirror: bool,
        fingerprint: str,
        transform: Standardise | ZCA,
        source: str | None = None,
        options: DataOptions | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.name = name
        self.classes = check_class_names(classes, name)
        self.train = train
        self.test = test
        self.mirror = mirror
        self.fingerprint = fingerprint
        self.source = source
        self.options = options or DataOptions()
        self.device = torch.device(device)
        self.transform = transform.to(self.device)
        self._train_rows = Rows(train, self.device)
        self._test_rows = Rows(test, self.device)
        self._by_class = np.argsort(train.labels, kind="stable")
        self._starts = np.concatenate([[0], np.cumsum(self.counts)])

    def __repr__(self) -> str:
        size = by(self.shape)
        return f"Task({self.name}: {self.num_classes} classes, {len(self.train)} train + {len(self.test)} test, {size})"

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def counts(self) -> np.ndarray:
        """Number of train images of each class, int64 (num_classes,)."""
        return np.bincount(self.train.labels, minlength=self.num_classes).astype(np.int64)

    def to(self, device: torch.device | str, transform: Standardise | ZCA | None = None) -> Task:
        """Returns the same task with batches on ``device``, and in another training space if ``transform`` is given."""
        return self._with(self.train, self.test, device=device, transform=transform)

    def _with(
        self,
        train: Split,
        test: Split,
        device: torch.device | str | None = None,
        transform: Standardise | ZCA | None = None,
    ) -> Task:
        return Task(
            self.name,
            self.classes,
            train,
            test,
            mirror=self.mirror,
            fingerprint=self.fingerprint,
            transform=transform or self.transform,
            source=self.source,
            options=self.options,
            device=device or self.device,
        )

    def select_classes(self, names: Sequence[str]) -> Task:
        """Returns the task of some classes, in the order of ``names``. Images are not copied.

        Raises:
            CondenseError: a name is no class of the task, or fewer than two are given.
        """
        numbers = class_numbers(names, self.classes, self.name)
        table = np.full(self.num_classes, -1)
        table[numbers] = np.arange(len(numbers))

        def select(split: Split) -> Split:
            kept = split.at(np.flatnonzero(table[split.labels] >= 0))
            return dataclasses.replace(kept, labels=table[kept.labels])

        return Task(
            self.name,
            tuple(names),
            select(self.train),
            select(self.test),
            mirror=self.mirror,
            fingerprint=selected_fingerprint(self.fingerprint, names),
            transform=self.transform,
            options=self.options,
            device=self.device,
        )

    def batch(self, ids: Tensor) -> Tensor:
        """Train images in the training space, float32 (len(ids), C, H, W) on the device."""
        return self._normalised(self._train_rows, ids)

    def pixels(self, ids: Tensor) -> Tensor:
        """Train images as pixels in [0,1], float32 (len(ids), C, H, W) on the device."""
        return to_unit_range(self._train_rows.take(ids))

    def raw(self, ids: Tensor) -> Tensor:
        """Train images as stored, uint8 (or float32 in [0,1]) (len(ids), C, H, W) on the CPU."""
        return self._train_rows.stored(ids)

    @property
    def has_originals(self) -> bool:
        """Whether the train images were scaled and cropped, and :meth:`originals` has them as they were before."""
        return self.train.original is not None and self.transform.kind == "standardise"

    def originals(self, ids: Tensor) -> Iterator[Tensor]:
        """Yields train images in the training space as they were before they were scaled and cropped, float32 (C,H,W)
        of any height and width on the device. Only if ``has_originals``.

        Raises:
            CondenseError: a file cannot be read any more.
        """
        assert self.train.original is not None
        rows = ids if self.train.rows is None else torch.from_numpy(self.train.rows)[ids]
        with ThreadPoolExecutor() as pool:
            for part in rows.split(ORIGINALS_AHEAD):
                for image in pool.map(self.train.original, part.tolist()):
                    yield self.transform(to_unit_range(torch.tensor(image).to(self.device)))

    def test_batch(self, ids: Tensor) -> Tensor:
        """Test images in the training space, float32 (len(ids), C, H, W) on the device."""
        return self._normalised(self._test_rows, ids)

    def test_pixels(self, ids: Tensor) -> Tensor:
        """Test images as pixels in [0,1], float32 (len(ids), C, H, W) on the device."""
        return to_unit_range(self._test_rows.take(ids))

    def _normalised(self, rows: Rows, ids: Tensor) -> Tensor:
        if self.device.type != "cpu" or len(ids) <= CHUNK:
            return self.transform(to_unit_range(rows.take(ids)))
        # Small temporaries are reused by the allocator: 2,560 images 3x32x32 take 15 ms instead of 51.
        out = torch.empty((len(ids), *self.shape))
        for start in range(0, len(ids), CHUNK):
            out[start : start + CHUNK] = self.transform(to_unit_range(rows.take(ids[start : start + CHUNK])))
        return out

    def per_class(
        self, n: int, parts: tuple[int | str, ...], classes: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draws n random train images of each class without replacement (all images of a smaller class).

        Args:
            n: images of each class.
            parts: key of the draw, e.g. ``(seed, "real", step)``. Class c is drawn from ``Draws(*parts, c)``, so its
                images do not depend on the other classes.
            classes: class numbers, in this order; by default all.

        Returns:
            Images in the training space, float32 (M,C,H,W), and labels, int64 (M,), on the device, ordered by class.
        """
        ids = self.sample_ids(n, parts, classes)
        labels = upload_indices(torch.from_numpy(self.train.labels[ids.numpy()]), self.device)
        return self.batch(ids), labels

    def sample_ids(self, n: int, parts: tuple[int | str, ...], classes: Sequence[int] | None = None) -> Tensor:
        """Returns the ids that :meth:`per_class` draws, int64 (M,) on the CPU.

        Those of class c are ``Draws(*parts, c).sample(count, n)``. The function hashes all classes in one call and
        picks the n smallest hashes of each: 0.4 ms for 256 of the 5,000 images of each
        of 10 classes, where the full sorts of ``sample`` take 2.9 ms (two cores).
        """
        chosen = list(range(self.num_classes)) if classes is None else [int(c) for c in classes]
        if not chosen or n < 1:
            return torch.empty(0, dtype=torch.int64)
        starts, ends = self._starts[:-1][chosen], self._starts[1:][chosen]
        largest = int((ends - starts).max())
        if len(chosen) > 1 and len(chosen) * largest > self.MAX_HASHES:  # the table has the width of the largest class
            return torch.cat([self.sample_ids(n, parts, [c]) for c in chosen])
        counts = torch.from_numpy(ends - starts).unsqueeze(1)
        streams = torch.tensor([key(*parts, c) for c in chosen]).unsqueeze(1)
        column = torch.arange(largest)
        # Draws.bits of every class at once: one stream per row
        bits = (hash64(column, streams) >> 1) & (2**63 - 1)  # type: ignore[arg-type]
        bits.masked_fill_(column >= counts, 2**63 - 1)
        taken = min(n, largest)
        picked = bits.topk(taken, dim=1, largest=False, sorted=True).indices + torch.from_numpy(starts).unsqueeze(1)
        return torch.from_numpy(self._by_class)[picked[torch.arange(taken) < counts]]

    def class_ids(self, c: int) -> np.ndarray:
        """Ids of all train images of class ``c``, int64, ascending."""
        return self._by_class[self._starts[c] : self._starts[c + 1]]

    def repeat_small(self, count: int) -> Task:
        """Returns a task in which the train images of classes with fewer than ``count`` images are repeated.

        Each image of such a class occurs as often as the others or once more, up to ``count`` images. The task is this
        one if no class is small or the option ``repeat_small`` is off. Otherwise its fingerprint differs, because
        methods train on other images.
        """
        if not self.options.repeat_small or count <= self.counts.min():
            return self
        rows = [np.resize(ids, max(count, len(ids))) for ids in map(self.class_ids, range(self.num_classes))]
        repeated = self._with(self.train.at(np.concatenate(rows)), self.test)
        repeated.fingerprint = hashlib.sha256(f"{self.fingerprint} repeated to {count}".encode()).hexdigest()
        return repeated

    def keep(self, ids: np.ndarray, reason: str) -> Task:
        """Returns a task with only some of the train images, which are not copied. Its fingerprint is another one.

        Args:
            ids: of the train images to keep, ascending.
            reason: part of the fingerprint.
        """
        kept = self._with(self.train.at(ids), self.test)
        digest = hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()
        kept.fingerprint = hashlib.sha256(f"{self.fingerprint} {reason} {digest}".encode()).hexdigest()
        return kept

    def hold_out(self, share: float, parts: tuple[int | str, ...]) -> Task:
        """Returns a task that tests on a random ``share`` of the train images of each class and trains on the others.

        The test images of this task are not part of it. Images are not copied. The image of a class with only one is a
        train image.

        Args:
            share: share of each class, rounded, at least one image.
            parts: key of the draw.
        """
        held = []
        for c in range(self.num_classes):
            ids = self.class_ids(c)
            count = min(max(1, round(share * len(ids))), len(ids) - 1)
            held.append(ids[Draws(*parts, c).sample(len(ids), max(count, 0)).numpy()])
        test = np.sort(np.concatenate(held))
        return self._with(self.train.at(np.setdiff1d(np.arange(len(self.train)), test)), self.train.at(test))


class Rows:
    """Rows of one split on a device; see :class:`Task` for where they are kept.

    Args:
        split: the split.
        device: device of the rows.
        max_bytes: maximum size of a split that is kept on an accelerator; by default a quarter of the free memory.
    """

    def __init__(self, split: Split, device: torch.device, max_bytes: int | None = None) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*not writable")  # of a memory map, which is only read
            self.host = torch.from_numpy(split.images)
        self.placed: Tensor | None = self.host if device.type == "cpu" else None
        self._indices = None if split.rows is None else torch.from_numpy(split.rows)
        self._device = device
        self._max_bytes = max_bytes

    def stored(self, ids: Tensor) -> Tensor:
        """Rows ``ids`` as stored, on the CPU."""
        return self.host.index_select(0, self._index(ids.cpu()))

    def _index(self, ids: Tensor) -> Tensor:
        return ids if self._indices is None else self._indices[ids.cpu()]

    def take(self, ids: Tensor) -> Tensor:
        """Rows ``ids`` as stored, on the device."""
        ids = self._index(ids)
        if self.placed is None:
            max_bytes = free_memory(self._device) // 4 if self._max_bytes is None else self._max_bytes
            self.placed = self.host.to(self._device) if self.host.nbytes <= max_bytes else self.host
        if self.placed is not self.host or self._device.type == "cpu":
            return self.placed.index_select(0, upload(ids, self.placed.device))
        # copies from pinned memory overlap with work on the device
        pinned = self._device.type == "cuda"
        rows = torch.empty((len(ids), *self.host.shape[1:]), dtype=self.host.dtype, pin_memory=pinned)
        torch.index_select(self.host, 0, ids.cpu(), out=rows)
        return rows.to(self._device, non_blocking=True)


def to_unit_range(images: Tensor) -> Tensor:
    """Converts stored images, uint8 or floats, to float32; uint8 values are scaled to [0,1]."""
    return images.float() if images.is_floating_point() else images.float().div_(255)


def load_task(
    data: Any, options: DataOptions | None = None, *, download: bool = False, name: str | None = None
) -> Task:
    """Loads real data as a :class:`Task` on the CPU.

    Args:
        data: a registered name (see :func:`datasets`); the path of an image folder, ``.csv``, ``.npz`` or ``.h5``;
            ``hf:OWNER/NAME`` of the Hugging Face Hub; any of these as ``NAME=DATA``; ``(train_images, train_labels,
            test_images, test_labels)`` of arrays or tensors, or a mapping with these names; ``(train_dataset,
            test_dataset)`` of map-style torch or Hugging Face datasets, or a ``DatasetDict``; only the train part of
            these, a fifth of each class of which becomes the test split; or a Task, which is returned unchanged.
        options: see :class:`DataOptions`.
        download: fetch a registered data set that is not on disk.
        name: name in records; by default the registered name, the name of the folder or file, or "data".

    Raises:
        CondenseError: the data do not exist or are invalid.
    """
    if isinstance(data, Task):
        if options not in (None, data.options) or name not in (None, data.name):
            raise CondenseError("this data is loaded already: give its options and its name where it is loaded")
        return data
    options = options or DataOptions()
    if isinstance(data, (str, os.PathLike)):
        loaded = read_data(os.fspath(data), options, download=download)
    else:
        loaded = read_objects(data, options)
    loaded = apply_normalisation(loaded, options)
    return Task(
        loaded.name if name is None else check_name(name),
        loaded.classes,
        loaded.train,
        loaded.test,
        mirror=loaded.mirror if options.mirror is None else options.mirror,
        fingerprint=loaded.fingerprint,
        transform=_transform(loaded, options.zca),
        source=loaded.source,
        options=options,
    )


def _transform(loaded: LoadedData, zca: bool) -> Standardise | ZCA:
    if zca:
        shape = loaded.train.images.shape[1:]
        values = math.prod(shape)
        needed = 64 * values**2 + 8 * len(loaded.train) * values  # see ZCA.fit
        what = f"zca=true: the whitening matrices of {by(shape)} images"
        check_host_memory(needed, what, "leave zca out, or give a smaller resize=")
        return ZCA.fit(to_unit_range(Rows(loaded.train, torch.device("cpu")).host))
    return Standardise(torch.from_numpy(loaded.mean), torch.from_numpy(loaded.std))
