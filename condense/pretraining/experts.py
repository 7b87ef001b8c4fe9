"""Experts of a method: loads or trains them, and returns their weights at each epoch."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from condense import networks, rng
from condense.data import cache_dir
from condense.device import free_host_memory
from condense.engine import Run
from condense.errors import CondenseError
from condense.networks import Layout, layout_of, mean_of_flat_networks
from condense.pretraining.budget import TrainingPlan
from condense.pretraining.pipeline import MemoryStore, NetworkKey, load_or_train, split_training_data
from condense.pretraining.store import ContentGuard, FileStore, check_same, transform_digests
from condense.pretraining.trajectories import (
    ExpertRecord,
    ExpertTraining,
    TrajectoryFile,
    expert_cache_file,
    read_trajectory_file,
    recorded_expert_training,
    trajectory_store,
)

_log = logging.getLogger(__name__)

MAX_PREFETCHED = 64
"""Maximum number of snapshots that are copied to a GPU ahead of their use."""


def choose_placement(size: int, device: torch.device) -> str:
    """Returns where ``size`` bytes of snapshots are kept while a method runs.

    On CUDA: ``device`` where they fit in half of its free memory; else ``pinned`` host memory, from which they are
    copied ahead, where they fit in half of the free host memory; else ``mapped`` from the file. Elsewhere: ``memory``
    where they fit in half of the free host memory, else ``mapped``. Ranks of one machine share its host memory.
    """
    cuda = device.type == "cuda"
    if cuda and size <= torch.cuda.mem_get_info(device)[0] // 2:
        return "device"
    if size <= free_host_memory() // 2 // int(os.environ.get("LOCAL_WORLD_SIZE", "1")):
        return "pinned" if cuda else "memory"
    return "mapped"


class Experts:
    """Snapshots of experts, returned as float32 on the device. :func:`choose_placement` decides where they are kept.

    Attributes:
        count: number of experts.
        epochs: of their training; there is one snapshot more.
        layout: of the P numbers of a snapshot.
        placement: device, pinned, memory or mapped.
    """

    def __init__(
        self,
        layout: Layout,
        values: Tensor,
        device: torch.device,
        *,
        placement: str = "memory",
        epochs: int,
        first: int = 0,
        file: TrajectoryFile | None = None,
    ) -> None:
        """``values`` (count, snapshots, P) begin at epoch ``first``; other epochs are read from ``file``."""
        self.layout, self.values, self.device, self.placement = layout, values, device, placement
        self.count, self.epochs = len(values), epochs
        self._first, self._file = first, file
        self._coming: dict[tuple[int, int], Tensor] = {}
        self._stream: Any = None

    def params_at(self, k: int, t: int) -> Tensor:
        """A new vector (P,), float32 on the device: expert ``k`` after ``t`` epochs; t = -1 is after the last one."""
        t = self.epochs if t == -1 else t
        if not (0 <= k < self.count and 0 <= t <= self.epochs):
            raise IndexError(f"expert {k} after epoch {t}: there are {self.count} of {self.epochs} epochs")
        coming = self._coming.pop((k, t), None)
        if coming is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self._stream)
            coming.record_stream(current)
            return coming.to(torch.float32, copy=True)
        return self._stored(k, t).to(self.device).to(torch.float32, copy=True)

    def _stored(self, k: int, t: int) -> Tensor:
        if 0 <= t - self._first < self.values.shape[1]:
            return self.values[k, t - self._first]
        assert self._file is not None
        self._file.verify([k], [t])
        return _readonly_tensor(self._file.values[k, t])

    def prefetch(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Starts to copy the snapshots (k, t) to the GPU for :meth:`params_at`, where they are in pinned memory."""
        if self.placement != "pinned":
            return
        self._stream = self._stream or torch.cuda.Stream(self.device)
        with torch.cuda.stream(self._stream):
            for k, t in pairs:
                if (k, t) not in self._coming and 0 <= t - self._first < self.values.shape[1]:
                    self._coming[k, t] = self._stored(k, t).to(self.device, non_blocking=True)
        while len(self._coming) > MAX_PREFETCHED:  # copied, but never used
            del self._coming[next(iter(self._coming))]

    def seconds(self, numbers: Iterable[int]) -> float:
        """Training seconds of these experts, from the file; 0 without a file."""
        return self._file.seconds(numbers, self.epochs) if self._file is not None else 0.0

    def describe(self) -> dict[str, Any]:
        """For the manifest of a set: path (None in the cache), content key, number and size of the snapshots."""
        if self._file is None:
            return {"path": None, "content": None, "count": self.count, "epochs": self.epochs, "bytes": 0}
        path = self._file.path.absolute()
        return {
            "path": None if path.is_relative_to(cache_dir().absolute()) else str(path),
            "content": self._file.content_key(self.count, self.epochs),
            "count": self.count,
            "epochs": self.epochs,
            "bytes": path.stat().st_size,
            "seconds": round(self.seconds(range(self.count)), 2),
        }


def _readonly_tensor(array: np.ndarray) -> Tensor:
    """Returns a tensor that shares the array's memory, which is never written to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable")
        return torch.from_numpy(array)


def load_experts(
    file: TrajectoryFile, device: torch.device, *, count: int, epochs: int, first: int, last: int
) -> Experts:
    """Loads the first experts of a file up to ``epochs``; those of ``first`` to ``last`` stay in memory.

    Raises:
        CondenseError: one of their snapshots is damaged.
    """
    first, last = min(first, epochs), min(last, epochs)
    file.verify(range(count), sorted({*range(first, last + 1), epochs}))
    needed = _readonly_tensor(file.values[:count, first : last + 1])
    placement = choose_placement(needed.nbytes, device)
    if placement != "mapped":
        where = device if placement == "device" else torch.device("cpu")
        values = torch.empty(needed.shape, dtype=needed.dtype, device=where, pin_memory=placement == "pinned")
        for k in range(count):
            values[k].copy_(needed[k])
        needed = values
    return Experts(file.layout, needed, device, placement=placement, epochs=epochs, first=first, file=file)


def load_or_train_experts(
    run: Run,
    training: ExpertTraining,
    *,
    file: str = "",
    count: int,
    epochs: int,
    first: int = 0,
    last: int,
    min_epochs: int = 1,
    dtype: str = "float16",
) -> Experts:
    """Returns the experts of a method's run: those of a named file, else of the cache, where missing ones are trained.

    Of a time limit the training takes a third at most: as many whole epochs for all experts as fit, or ``min_epochs``
    for fewer of them. Experts of a named file cost nothing. The note ``trajectories`` in the manifest describes them.

    Args:
        run: of the method.
        training: of the experts, unless a file is named.
        file: path of a file, or nothing.
        count: maximum number of experts.
        epochs: of their training.
        first: first epoch that the method uses.
        last: last epoch that the method uses, besides the very last one.
        min_epochs: minimum number of useful epochs.
        dtype: float16 or float32, of the stored weights.

    Raises:
        Interrupted: SIGINT or SIGTERM; finished experts stay in the cache.
        CondenseError: the run cannot use the file, an expert diverged, or the cache cannot be written.
    """
    layout = layout_of(run.network, run.task)
    if file:
        named = read_trajectory_file(Path(file))
        check_expert_file(named, run, layout, last)
        count = min(count, named.count)
        run.register_state("experts", ContentGuard(named.content_key(count, named.epochs), named.path, "experts"))
        experts = load_experts(named, run.device, count=count, epochs=named.epochs, first=first, last=last)
        run.note("trajectories", experts.describe())
        return experts
    source, steps_per_epoch = split_training_data(run, training.recipe.batch, training.held_out)

    def load(file: TrajectoryFile, plan: TrainingPlan) -> Experts:
        return load_experts(file, run.device, count=plan.networks, epochs=plan.units, first=first, last=last)

    def open_cache(plan: TrainingPlan, keys: Sequence[NetworkKey]) -> FoundExperts | FileStore[TrajectoryFile, Any]:
        path = expert_cache_file(run, training, plan.units, dtype)
        longer = _find_cached(path, plan, lambda file: load(file, plan))
        return FoundExperts(keys, longer) if longer else trajectory_store(run, training, path, plan, dtype, True)

    store, plan = load_or_train(
        run,
        recorded_expert_training(run, training, source, dtype),
        [(run.network, number) for number in range(count)],
        open_cache,
        units=epochs,
        unit_steps=steps_per_epoch,
        min_units=min_epochs,
    )
    if isinstance(store, FoundExperts):
        experts = store.experts
    elif isinstance(store, MemoryStore):
        values = torch.stack([snapshots for _, snapshots in store.records.values()])
        experts = Experts(layout, values, run.device, epochs=values.shape[1] - 1)
    else:
        experts = load(read_trajectory_file(store.path), plan)
    run.note("trajectories", experts.describe())
    return experts


class FoundExperts(MemoryStore[ExpertRecord]):
    """Experts of a file in the cache whose training was at least as long."""

    def __init__(self, keys: Sequence[NetworkKey], experts: Experts) -> None:
        super().__init__(keys)
        self.experts = experts

    def find(self) -> dict[NetworkKey, float]:
        return {key: self.experts.seconds([key[1]]) for key in self.keys}


def _find_cached(path: Path, plan: TrainingPlan, load: Callable[[TrajectoryFile], Experts]) -> Experts | None:
    """Loads experts of ``path`` or of a longer file of the same cache key; None if all have too few or damaged ones."""
    stem = path.stem.rpartition("-e")[0]
    lengths = sorted(int(other.stem.rpartition("-e")[2]) for other in path.parent.glob(f"{stem}-e*.h5"))
    for length in lengths:
        if length >= plan.units:
            try:
                file = read_trajectory_file(path.with_name(f"{stem}-e{length}.h5"))
                if file.count >= plan.networks:
                    return load(file)
            except CondenseError as fault:
                _log.warning("condense: %s", fault)
    return None


def check_expert_file(file: TrajectoryFile, run: Run, layout: Layout, last: int) -> None:
    """Checks before any work that a run can use a file.

    Raises:
        CondenseError: it is of another network, data or normalisation, or too short.
    """
    manifest, task = file.manifest, run.task
    name = networks.network_name(run.network)
    properties = {
        "network": (manifest["network"], name),
        "image size": (manifest["image_shape"], list(task.shape)),
        "classes": (manifest["classes"], list(task.classes)),
    }
    check_same(file.path, "experts", properties, {"network": f"; give --network {manifest['network']}"})
    if file.layout != layout:
        raise CondenseError(f"{file.path}: its experts are of another version of {name}; make them again")
    if manifest["fingerprint"] != task.fingerprint:
        name = manifest.get("data", "?")
        data = f"{name}, not {task.name}" if name != task.name else f"{name} with other images or labels"
        raise CondenseError(f"{file.path}: its experts were trained on other data ({data})")
    if manifest["transform"] != transform_digests(task):
        raise CondenseError(f"{file.path}: its experts saw the data under another normalisation (zca=true or not?)")
    if file.epochs < last:
        raise CondenseError(
            f"{file.path}: its experts have {file.epochs} epochs, but {last} are asked for; make longer ones with "
            f"--epochs {last}, take what is there with buffer_epochs={file.epochs}, or lower max_start_epoch or "
            "expert_epochs"
        )


# -- experts as teachers ----------------------------------------------------------------------------------------------


def find_experts(described: Mapping[str, Any]) -> Path | None:
    """Returns the file of the described experts, also if it was moved to the cache; None if it is not found."""
    if not described.get("content"):
        return None
    named, cache = described.get("path"), cache_dir() / "trajectories"
    for path in (*([Path(named)] if named else []), *sorted(cache.glob("*.h5"))):
        with contextlib.suppress(CondenseError):
            file = read_trajectory_file(path)
            if file.content_key(described["count"], described["epochs"]) == described["content"]:
                return path
    return None


def load_expert_ensemble(
    path: Path,
    device: torch.device,
    shape: Sequence[int] | None = None,
    classes: int | None = None,
    *,
    count: int | None = None,
    epoch: int = -1,
) -> nn.Module:
    """Returns a network, in eval mode on the device, that computes the mean logits of the experts of a file.

    Args:
        path: of the file.
        device: where it computes.
        shape: (C,H,W) that its images must have, where given.
        classes: number of classes that it must have, where given.
        count: only the first so many experts.
        epoch: after so many epochs of training; -1: after the last.

    Raises:
        CondenseError: the file is damaged or of other images or classes, or its network keeps more than weights.
    """
    file = read_trajectory_file(path)
    manifest = file.manifest
    properties = {
        "image size": (manifest["image_shape"], list(shape) if shape else None),
        "number of classes": (len(manifest["classes"]), classes),
    }
    check_same(path, "experts", properties)
    channels, height, width = manifest["image_shape"]
    described = manifest["network"], (channels, height, width), len(manifest["classes"])
    outline = networks.build_outline(*described)
    if outline is not None and Layout.of(outline) != file.layout:
        raise CondenseError(f"{path}: its experts are of another version of {manifest['network']}; make them again")
    with rng.seeded("layout"):
        net = networks.build_network(*described)
    if networks.uses_batch_statistics(net):
        raise CondenseError(
            f"{path}: experts of {manifest['network']} are no teachers: batch norm's statistics are not kept"
        )
    if Layout.of(net) != file.layout:
        raise CondenseError(f"{path}: its experts are of another version of {manifest['network']}; make them again")
    count = min(count or file.count, file.count)
    epoch = file.epochs if epoch == -1 else min(epoch, file.epochs)
    file.verify(range(count), [epoch])
    return (
        mean_of_flat_networks(net, file.layout, torch.from_numpy(np.array(file.values[:count, epoch])))
        .to(device)
        .eval()
    )
