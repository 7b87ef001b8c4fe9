"""expert trajectories, served to a method."""

from __future__ import annotations

import contextlib
import logging
import os
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
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
from condense.formatting import by
from condense.networks import Layout, layout_of
from condense.networks.ensemble import mean_logits_of_flat
from condense.pretraining.budget import agreed_plan, groups, seconds_per_step, taught
from condense.pretraining.store import Same, transform_digests
from condense.pretraining.trajectories import GROUP, Recorded, Training, _student, _train, cache_file, read, record
from condense.training import pick_together

_log = logging.getLogger(__name__)

PREFETCHED = 64
"""Most snapshots on their way to a GPU."""

# -- what a method sees -----------------------------------------------------------------------------------------------


def residency(size: int, device: torch.device) -> str:
    """Where ``size`` bytes of snapshots lie while a method runs.

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
    """Snapshots of experts, served as float32 on the device. Where they lie is decided by :func:`residency`.

    Attributes:
        count: experts.
        epochs: of their training; there is one snapshot more.
        layout: what the P numbers of a snapshot are.
        place: device, pinned, memory or mapped.
    """

    def __init__(
        self,
        layout: Layout,
        values: Tensor,
        device: torch.device,
        *,
        place: str = "memory",
        epochs: int,
        first: int = 0,
        file: Recorded | None = None,
    ) -> None:
        """``values`` (count, snapshots, P) begin at epoch ``first``; other epochs are read from ``file``."""
        self.layout, self.values, self.device, self.place = layout, values, device, place
        self.count, self.epochs = len(values), epochs
        self._first, self._file = first, file
        self._coming: dict[tuple[int, int], Tensor] = {}
        self._stream: Any = None

    def at(self, k: int, t: int) -> Tensor:
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
        return _tensor(self._file.values[k, t])

    def prefetch(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Starts to copy what :meth:`at` will be asked for, as (k, t); does nothing where there is nothing to gain."""
        if self.place != "pinned":
            return
        self._stream = self._stream or torch.cuda.Stream(self.device)
        with torch.cuda.stream(self._stream):
            for k, t in pairs:
                if (k, t) not in self._coming and 0 <= t - self._first < self.values.shape[1]:
                    self._coming[k, t] = self._stored(k, t).to(self.device, non_blocking=True)
        while len(self._coming) > PREFETCHED:  # what nobody asked for
            del self._coming[next(iter(self._coming))]

    def seconds(self, numbers: Iterable[int]) -> float:
        """Seconds that the training of these experts took, as the file tells; 0 where there is none."""
        return self._file.seconds(numbers, self.epochs) if self._file is not None else 0.0

    def describe(self) -> dict[str, Any]:
        """For the manifest of a set: the file (no path if it is the cache's), key and number of its snapshots."""
        if self._file is None:
            return {"path": None, "content": None, "count": self.count, "epochs": self.epochs, "bytes": 0}
        path = self._file.path.absolute()
        return {
            "path": None if path.is_relative_to(cache_dir().absolute()) else str(path),
            "content": self._file.content(self.count, self.epochs),
            "count": self.count, "epochs": self.epochs, "bytes": path.stat().st_size,
            "seconds": round(self.seconds(range(self.count)), 2),
        }  # fmt: skip


def _tensor(array: np.ndarray) -> Tensor:
    """The array as a tensor that shares its memory, which is never written to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable")
        return torch.from_numpy(array)


def load(file: Recorded, device: torch.device, *, count: int, epochs: int, first: int, last: int) -> Experts:
    """The first experts of a file up to ``epochs``, those of ``first`` to ``last`` at hand.

    Raises:
        CondenseError: one of their snapshots is damaged.
    """
    first, last = min(first, epochs), min(last, epochs)
    file.verify(range(count), sorted({*range(first, last + 1), epochs}))
    needed = _tensor(file.values[:count, first : last + 1])
    place = residency(needed.nbytes, device)
    if place != "mapped":
        where = device if place == "device" else torch.device("cpu")
        values = torch.empty(needed.shape, dtype=needed.dtype, device=where, pin_memory=place == "pinned")
        for k in range(count):
            values[k].copy_(needed[k])
        needed = values
    return Experts(file.layout, needed, device, place=place, epochs=epochs, first=first, file=file)


def provide(
    run: Run,
    training: Training,
    *,
    file: str = "",
    count: int,
    epochs: int,
    first: int = 0,
    last: int,
    least: int = 1,
    dtype: str = "float16",
) -> Experts:
    """The experts of a method's run: those of a file that was named, else of the cache, where missing ones are trained.

    Experts of the cache count as the run's own work, whenever they were trained; ``preparation`` in
    the manifest states them. Of a
    time limit they take a third at most: as many whole epochs for all as fit, or ``least`` epochs for fewer of them.
    A file that was named is free.

    Args:
        run: of the method.
        training: of the experts, where they are not of a named file.
        file: path of a file, or nothing.
        count: experts, at most.
        epochs: of their training.
        first: the first epoch that is asked for.
        last: the last epoch that is asked for, but for the last of all.
        least: fewest epochs of use.
        dtype: float16 or float32, of the stored weights.

    Raises:
        Interrupted: SIGINT or SIGTERM; experts that are done stay in the cache.
        CondenseError: the file does not suit the run, an expert diverged, or the cache cannot be written.
    """
    layout = layout_of(run.network, run.task)
    if file:
        named = read(Path(file))
        check_suits(named, run, layout, last)
        count, long = min(count, named.count), named.epochs
        run.keep("experts", Same(named.content(count, long), named.path, "experts"))
        experts = load(named, run.device, count=count, epochs=long, first=first, last=last)
        run.note("trajectories", experts.describe())
        return experts
    source, unit = taught(run, training.recipe.batch, training.held_out)

    def seconds() -> float:
        together = min(count, GROUP) if pick_together(run.device) else 1
        students, precision = [_student(run, source, k) for k in range(together)], training.precision or run.precision
        return seconds_per_step(run, students, training.recipe, precision, training.update)

    if run.ranks.leads:
        run.begin()
    plan = agreed_plan(run, seconds, networks=count, units=epochs, unit_steps=unit, least=least)
    again = f"stopped while training its experts; go on with: condense resume {run.directory}"
    began, trained = time.monotonic(), list(range(plan.networks))
    if run.dry_run or not isinstance(run.network, str):  # nothing is kept that a name does not describe
        shots = [
            snapshots
            for group, report in groups(run, trained, plan.steps, f"{plan.networks} experts", again, GROUP)
            for snapshots, _ in _train(run, training, source, layout, group, plan.units, plan.unit_steps, dtype, report)
        ]
        experts = Experts(layout, torch.stack(shots), run.device, epochs=plan.units)
    else:
        need: dict[str, int] = {"count": plan.networks, "epochs": plan.units}
        path = cache_file(run, training, plan.units, dtype)
        found = _cached(path, run.device, **need, first=first, last=last)
        if found is not None:
            experts, trained = found, []
        else:
            made = record(run, training, path, **need, dtype=dtype, again=again, force=True)
            experts, trained = load(made.file, run.device, **need, first=first, last=last), made.trained
    credited = experts.seconds(k for k in range(plan.networks) if k not in trained)
    run.credit(credited)
    run.note("trajectories", experts.describe())
    run.note("preparation", {
        "networks": plan.networks, "networks_wanted": count, "steps_each": plan.steps,
        "steps_each_wanted": epochs * unit, "epochs": plan.units, "epochs_wanted": epochs,
        "from_cache": plan.networks - len(trained),
        "seconds": round(credited + (time.monotonic() - began if trained else 0.0), 2),
    })  # fmt: skip
    return experts


def _cached(path: Path, device: torch.device, *, count: int, epochs: int, first: int, last: int) -> Experts | None:
    """The experts of ``path`` in the cache, or of a longer file of the same key; None where none has enough that are
    sound."""
    stem = path.stem.rpartition("-e")[0]
    lengths = sorted(int(place.stem.rpartition("-e")[2]) for place in path.parent.glob(f"{stem}-e*.h5"))
    for length in lengths:
        if length < epochs:
            continue
        try:
            file = read(path.with_name(f"{stem}-e{length}.h5"))
            if file.count >= count:
                return load(file, device, count=count, epochs=epochs, first=first, last=last)
        except CondenseError as fault:
            _log.warning("condense: %s", fault)
    return None


def check_suits(file: Recorded, run: Run, layout: Layout, last: int) -> None:
    """Finds before any work that a file cannot serve a run.

    Raises:
        CondenseError: it is of another network, data or normalisation, or too short.
    """
    known, task = file.manifest, run.task
    name = networks.name_of(run.network)
    for what, has, wants, mend in (
        ("network", known["network"], name, f"; give --network {known['network']}"),
        ("image size", by(known["image_shape"]), by(task.shape), ""),
        ("classes", _named(known["classes"]), _named(list(task.classes)), ""),
    ):
        if has != wants:
            raise CondenseError(f"{file.path}: its experts are of another {what} ({has}, not {wants}){mend}")
    if file.layout != layout:
        raise CondenseError(f"{file.path}: its experts are of another version of {name}; make them again")
    if known["fingerprint"] != task.fingerprint:
        name = known.get("data", "?")
        data = f"{name}, not {task.name}" if name != task.name else f"{name} with other images or labels"
        raise CondenseError(f"{file.path}: its experts were trained on other data ({data})")
    if known["transform"] != transform_digests(task):
        raise CondenseError(f"{file.path}: its experts saw the data under another normalisation (zca=true or not?)")
    if file.epochs < last:
        raise CondenseError(
            f"{file.path}: its experts have {file.epochs} epochs, but {last} are asked for; make longer ones with "
            f"--epochs {last}, take what is there with buffer_epochs={file.epochs}, or lower max_start_epoch or "
            "expert_epochs"
        )


def _named(classes: Sequence[str]) -> str:
    return f"{len(classes)} of {', '.join(classes[:3])}" + ", ..." * (len(classes) > 3)


# -- experts as teachers ----------------------------------------------------------------------------------------------


def find(described: Mapping[str, Any]) -> Path | None:
    """The file whose experts ``Experts.describe()`` told of, where they lay or in the cache; None where it is gone."""
    if not described.get("content"):
        return None
    named, cached = described.get("path"), cache_dir() / "trajectories"
    for path in (*([Path(named)] if named else []), *(sorted(cached.glob("*.h5")) if cached.exists() else ())):
        with contextlib.suppress(CondenseError):
            file = read(path)
            if file.content(described["count"], described["epochs"]) == described["content"]:
                return path
    return None


def teacher(
    path: Path,
    device: torch.device,
    shape: Sequence[int] | None = None,
    classes: int | None = None,
    *,
    count: int | None = None,
    epoch: int = -1,
) -> nn.Module:
    """A network, in eval mode on the device, that gives the mean logits of the experts of a file.

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
    file = read(path)
    known, wanted = file.manifest, (list(shape) if shape else None, classes)
    found = known["image_shape"], len(known["classes"])
    for what, has, wants in zip(("image size", "number of classes"), found, wanted):
        if wants is not None and has != wants:
            raise CondenseError(f"{path}: its experts are of another {what} ({has}, not {wants})")
    channels, height, width = known["image_shape"]
    with rng.seeded("layout"):
        net = networks.build(known["network"], (channels, height, width), len(known["classes"]))
    if networks.uses_batch_statistics(net):
        raise CondenseError(
            f"{path}: experts of {known['network']} are no teachers: batch norm's statistics are not kept"
        )
    if Layout.of(net) != file.layout:
        raise CondenseError(f"{path}: its experts are of another version of {known['network']}; make them again")
    count = min(count or file.count, file.count)
    epoch = file.epochs if epoch == -1 else min(epoch, file.epochs)
    file.verify(range(count), [epoch])
    return (
        mean_logits_of_flat(net, file.layout, torch.from_numpy(np.array(file.values[:count, epoch]))).to(device).eval()
    )
