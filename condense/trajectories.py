"""Expert trajectories: networks trained on the real data, their weights before training and after each epoch, in one
file.

The file is HDF5: ``parameters`` (experts, epochs + 1, P), float16 or float32, lies in one piece, so that it can be
mapped into memory; ``digests`` (experts, epochs + 1, 32) holds the SHA-256 of each snapshot, so that only what is read
is verified; the manifest says what network, data and training they are of. An expert is known by its number: experts
that are added later are those that would have been trained at once (on a CPU bit for bit; a GPU trains groups together,
whose sizes change the rounding).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from condense import container, networks, rng
from condense.banks import (
    Same,
    agreed_plan,
    expected,
    groups,
    parts_of,
    seconds_per_step,
    taught,
    transform_digests,
)
from condense.container import AGAIN
from condense.distilled import check_writable, replacing
from condense.errors import CondenseError, did_you_mean
from condense.run import Run, device_name
from condense.students import (
    STUDENT_VERSION,
    Recipe,
    Student,
    TaskSource,
    Update,
    accuracy,
    pick_together,
    train,
)
from condense.tasks import Task, cache_dir
from condense.units import by
from condense.version import __version__

_log = logging.getLogger(__name__)

DTYPES = {"float16": torch.float16, "float32": torch.float32}
GROUP = 10
"""Most experts that a GPU trains together."""
PREFETCHED = 64
"""Most snapshots on their way to a GPU."""
FORMAT = container.Format(
    "condense.trajectories", 1, maker="condense experts",
    required={
        "network": str, "layout": list, "classes": list, "image_shape": list, "fingerprint": str, "transform": list,
        "epochs": int, "dtype": str, "experts": list, "content": str,
    },
)  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """Names and shapes of a network's parameters, in module order, as they lie in a flat vector of P numbers."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, net: nn.Module) -> Layout:
        """The layout of a network; buffers are not in it."""
        named = list(net.named_parameters())
        return cls(tuple(name for name, _ in named), tuple(tuple(value.shape) for _, value in named))

    @classmethod
    def read(cls, described: Sequence[Any]) -> Layout:
        """From what :meth:`describe` gave."""
        return cls(tuple(str(name) for name, _ in described), tuple(tuple(map(int, shape)) for _, shape in described))

    @property
    def sizes(self) -> list[int]:
        """Numbers of each parameter."""
        return [math.prod(shape) for shape in self.shapes]

    @property
    def size(self) -> int:
        """P."""
        return sum(self.sizes)

    def flatten(self, state: Mapping[str, Tensor] | nn.Module) -> Tensor:
        """The parameters of a network or of a mapping of names as a new vector (P,), where they are."""
        found = dict(state.named_parameters()) if isinstance(state, nn.Module) else state
        return torch.cat([found[name].detach().reshape(-1) for name in self.names])  # cat copies, also a single one

    def unflatten(self, theta: Tensor) -> dict[str, Tensor]:
        """Views of a flat vector (..., P), through which gradients flow, for ``torch.func.functional_call``."""
        parts = theta.split(self.sizes, -1)
        return {name: part.view(*theta.shape[:-1], *shape) for name, part, shape in zip(self.names, parts, self.shapes)}

    def describe(self) -> list[list[Any]]:
        """For the manifest: name and shape of each parameter."""
        return [[name, list(shape)] for name, shape in zip(self.names, self.shapes)]


@dataclass(frozen=True)
class Training:
    """How a method wants its experts trained."""

    recipe: Recipe
    """Of SGD; its number of steps is replaced."""
    update: Update | None = None
    """What gradients SGD steps along; see ``students.train``."""
    precision: str | None = None
    """fp32 or bf16; None is the run's."""
    held_out: float = 0.0
    """Share of each class's training images that experts do not see and are judged on; 0 for none."""


# -- the file ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Recorded:
    """A file of trajectories, open for reading. Its snapshots are verified by whoever takes them."""

    path: Path
    manifest: dict[str, Any]
    values: np.ndarray
    """(experts, epochs + 1, P), mapped into memory."""
    digests: np.ndarray
    """(experts, epochs + 1, 32) uint8."""

    @property
    def count(self) -> int:
        """Experts."""
        return len(self.values)

    @property
    def epochs(self) -> int:
        """Of each expert's training; there is one snapshot more."""
        return self.values.shape[1] - 1

    @property
    def layout(self) -> Layout:
        """What the P numbers of a snapshot are."""
        return Layout.read(self.manifest["layout"])

    def content(self, count: int, epochs: int) -> str:
        """Key of the snapshots of the first experts up to an epoch, however long the file is."""
        return hashlib.sha256(np.ascontiguousarray(self.digests[:count, : epochs + 1]).tobytes()).hexdigest()

    def seconds(self, numbers: Iterable[int], epochs: int) -> float:
        """Seconds that the training of these experts took up to an epoch."""
        return sum(self.manifest["experts"][k]["seconds"] for k in numbers) * epochs / self.epochs

    def sound(self, k: int, t: int) -> bool:
        """Whether a snapshot is what was written."""
        return _digest(self.values[k, t]) == self.digests[k, t].tobytes()

    def verify(self, numbers: Iterable[int], epochs: Sequence[int]) -> None:
        """Reads and verifies snapshots.

        Raises:
            CondenseError: one is damaged.
        """
        for k in numbers:
            for t in epochs:
                if not self.sound(k, t):
                    raise CondenseError(
                        f"{self.path}: expert {k} after epoch {t} is damaged (its checksum differs); {AGAIN}"
                    )


def _digest(snapshot: np.ndarray) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(snapshot).view(np.uint8).data).digest()


def read(path: Path) -> Recorded:
    """Opens a file of trajectories from anywhere: types, sizes and links are checked, no snapshot is read.

    Raises:
        CondenseError: one line: no such file, not our format, newer version, truncated or damaged.
    """
    with container.opened(path, FORMAT) as (file, manifest):
        if manifest["dtype"] not in DTYPES or manifest["epochs"] < 1 or not manifest["experts"]:
            raise CondenseError(f"{path}: the manifest is not one of trajectories; it was not written by this toolkit")
        shape = (len(manifest["experts"]), manifest["epochs"] + 1, Layout.read(manifest["layout"]).size)
        dtype = np.dtype(manifest["dtype"])
        offset = _offset(path, file, "parameters", shape, dtype)
        _offset(path, file, "digests", (*shape[:2], 32), np.dtype(np.uint8))
        digests = file["digests"][()]
    if hashlib.sha256(digests.tobytes()).hexdigest() != manifest["content"]:
        raise CondenseError(f"{path}: the array 'digests' is damaged (its checksum differs); {AGAIN}")
    return Recorded(path, manifest, np.memmap(path, dtype, "r", offset, shape), digests)


def _offset(path: Path, file: Any, name: str, shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Where an array begins in the file, in one piece and of this shape and type."""
    import h5py

    container.check_link(path, file, name)
    array = file[name]
    if not isinstance(array, h5py.Dataset) or array.is_virtual or array.external or array.chunks is not None:
        raise CondenseError(f"{path}: '{name}' is not an array stored in one piece in this file")
    offset = array.id.get_offset()
    if array.shape != shape or array.dtype != dtype or offset is None or offset % dtype.itemsize:
        raise CondenseError(f"{path}: the array '{name}' is not what the manifest says; {AGAIN}")
    if offset + math.prod(shape) * dtype.itemsize > path.stat().st_size:
        raise CondenseError(f"{path}: truncated or damaged; {AGAIN}")
    return int(offset)


def _write(path: Path, manifest: dict[str, Any], shape: tuple[int, int, int], experts: Iterable[np.ndarray]) -> None:
    """The file, atomically, from the snapshots (epochs + 1, P) of one expert after the other."""
    digests = np.empty((*shape[:2], 32), np.uint8)
    with replacing(path) as temporary, container.create(temporary) as file:
        parameters = file.create_dataset("parameters", shape, manifest["dtype"])
        for k, snapshots in enumerate(experts):
            parameters[k] = snapshots
            digests[k] = [np.frombuffer(_digest(snapshot), np.uint8) for snapshot in snapshots]
        file.create_dataset("digests", data=digests)
        container.sign(file, FORMAT, {**manifest, "content": hashlib.sha256(digests.tobytes()).hexdigest()})


def nbytes(count: int, epochs: int, layout: Layout, dtype: str = "float16") -> int:
    """Bytes of the snapshots of ``count`` experts."""
    return count * (epochs + 1) * layout.size * DTYPES[dtype].itemsize


def layout_of(network: str | Callable[..., nn.Module], task: Task) -> Layout:
    """The layout of a network for the images and classes of a task."""
    with rng.seeded("layout"):
        return Layout.of(networks.build(network, task.shape, task.num_classes))


# -- making it --------------------------------------------------------------------------------------------------------


def facts(run: Run, training: Training, epochs: int, dtype: str) -> dict[str, Any]:
    """All that decides the weights of an expert besides its number, as the manifest states it."""
    found = {
        "fingerprint": run.task.fingerprint, "transform": transform_digests(run.task),
        "network": networks.name_of(run.network), "library_version": networks.library_version(run.network),
        "recipe": str(dataclasses.replace(training.recipe, steps=0)), "update": str(training.update),
        "held_out": training.held_out, "seed": run.seed, "precision": training.precision or run.precision,
        "dtype": dtype, "device": device_name(run.device), "stacked": pick_together(run.device),
        "random_hash_version": rng.HASH_VERSION, "student_version": STUDENT_VERSION, "torch": torch.__version__,
    }  # fmt: skip
    # Without drops of the learning rate a shorter training is the beginning of a longer one.
    return {**found, "schedule_epochs": epochs} if training.recipe.drops else found


def cache_file(run: Run, training: Training, epochs: int, dtype: str = "float16") -> Path:
    """Where the cache keeps such experts, for every method that wants them."""
    text = json.dumps(facts(run, training, epochs, dtype), sort_keys=True)
    return cache_dir() / "trajectories" / f"{hashlib.sha256(text.encode()).hexdigest()}-e{epochs}.h5"


@dataclass(frozen=True, eq=False)
class Made:
    """What :func:`record` did."""

    file: Recorded
    trained: list[int]
    """Numbers of the experts that were not there."""
    seconds: float
    """That it took."""


def record(
    run: Run,
    training: Training,
    path: Path,
    *,
    count: int,
    epochs: int,
    dtype: str = "float16",
    again: str = "stopped while training experts; those that are done are kept: the same command goes on with the rest",
    force: bool = False,
) -> Made:
    """Trains experts of the run's architecture on its real data, and writes their trajectories to ``path``.

    Experts that the file holds stay, and finished ones of a call that was killed (below ``path`` + ``.parts``) count
    too: the same call goes on with what is missing, and a larger ``count`` adds to the file. Ranks train shares.

    Args:
        run: device, seed, data, network; stops it on a signal.
        training: how.
        path: file to write.
        count: experts that it shall hold, at least.
        epochs: passes over the training images; a snapshot is taken before the first and after each.
        dtype: float16 or float32, of the stored weights.
        again: what is said where a signal stops the training.
        force: replace what other data, networks or trainings left there, and what is damaged.

    Raises:
        Interrupted: SIGINT or SIGTERM.
        CondenseError: the place holds something else or cannot be written, or an expert diverged.
    """
    if dtype not in DTYPES:
        raise CondenseError(f"--dtype {dtype}: unknown{did_you_mean(dtype, DTYPES)}")
    began, ranks = time.monotonic(), run.ranks
    known, layout = facts(run, training, epochs, dtype), layout_of(run.network, run.task)
    source, unit = taught(run, training.recipe.batch, training.held_out)
    about = {
        **known, "data": run.task.name, "options": dataclasses.asdict(run.task.options), "layout": layout.describe(),
        "classes": list(run.task.classes), "image_shape": list(run.task.shape), "epochs": epochs,
        "steps_per_epoch": unit, "code_version": __version__,
    }  # fmt: skip
    if ranks.leads:
        check_writable(path, force=True)
    there, parts = expected(path, read, about, "experts", force, force), parts_of(path)
    have = {} if there is None else {k: (there, k) for k in range(there.count) if _whole(there, k, force)}
    for place in parts.glob("[0-9]*.h5"):
        part = expected(place, read, about, "experts", force, True)
        if part is not None and _whole(part, 0, True):
            have.setdefault(int(place.stem), (part, 0))
    numbers = range(max(count, 0 if there is None else there.count))
    missing = [k for k in numbers if k not in have]
    if missing and ranks.leads:
        check_writable(path, force=True, size=nbytes(len(numbers) + len(missing), epochs, layout, dtype))
    mine = [k for k in missing if k % ranks.world == ranks.rank]
    shape = (1, epochs + 1, layout.size)
    for group, report in groups(run, mine, epochs * unit, f"{len(missing)} experts of {epochs} epochs", again, GROUP):
        for snapshots, entry in _train(run, training, source, layout, group, epochs, unit, dtype, report):
            _write(parts / f"{entry['number']:04d}.h5", {**about, "experts": [entry]}, shape, [snapshots.numpy()])
    ranks.close()
    if ranks.leads:
        for k in missing:
            have[k] = read(parts / f"{k:04d}.h5"), 0
        used = [have[k] for k in numbers]
        if any(file is not there for file, _ in used):
            about["experts"] = [file.manifest["experts"][k] for file, k in used]
            _write(path, about, (len(numbers), *shape[1:]), (file.values[k] for file, k in used))
            shutil.rmtree(parts, ignore_errors=True)
    ranks.close()
    return Made(read(path), missing, time.monotonic() - began)


def _whole(file: Recorded, k: int, damaged: bool) -> bool:
    """Whether all of an expert's snapshots are sound; where they need be (not ``damaged``), an error if they are
    not."""
    sound = all(file.sound(k, t) for t in range(file.epochs + 1))
    if not sound and not damaged:
        raise CondenseError(f"{file.path}: expert {k} is damaged (its checksum differs); {AGAIN} with --force")
    return sound


def _train(
    run: Run,
    training: Training,
    source: Task,
    layout: Layout,
    group: Sequence[int],
    epochs: int,
    unit: int,
    dtype: str,
    report: Callable[[int], None],
) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Trains the experts of ``group``, together where that is faster.

    Yields:
        Of each its snapshots (epochs + 1, P) on the CPU, one every ``unit`` steps, and its entry of the manifest.

    Raises:
        CondenseError: experts diverged; the others were yielded before.
    """
    students = [_student(run, source, k) for k in group]
    precision = training.precision or run.precision
    taken = [{0: _shot(layout, student.network, dtype)} for student in students]
    lost: dict[int, int] = {}

    def watch(i: int, step: int, state: Mapping[str, Tensor]) -> None:
        shot = taken[i][step] = _shot(layout, state, dtype)
        if not bool(shot.isfinite().all()):
            lost.setdefault(group[i], step // unit)
            if len(lost) == len(group):
                raise _diverged(lost, training, dtype)

    recipe = dataclasses.replace(training.recipe, steps=epochs * unit)
    seconds = train(
        students, recipe, device=run.device, precision=precision, report=report, watch=watch, watch_every=unit,
        update=training.update,
    )  # fmt: skip
    for k, student, shots in zip(group, students, taken):
        entry: dict[str, Any] = {"number": k, "seconds": round(seconds / len(group), 3)}
        if training.held_out:
            entry["accuracy"] = accuracy(student.network, source, device=run.device, precision=precision)
        if k not in lost:
            yield torch.stack([shots[step] for step in sorted(shots)]), entry
    if lost:
        raise _diverged(lost, training, dtype)


def _student(run: Run, source: Task, k: int) -> Student:
    with rng.seeded(run.seed, "expert", k):
        net = networks.build(run.network, source.shape, source.num_classes)
    return Student(net, TaskSource(source, run.device), rng.key(run.seed, "expert", k))


def _shot(layout: Layout, state: Mapping[str, Tensor] | nn.Module, dtype: str) -> Tensor:
    return layout.flatten(state).to("cpu", DTYPES[dtype])


def _diverged(lost: Mapping[int, int], training: Training, dtype: str) -> CondenseError:
    """``lost``: numbers of experts, with the epoch after which their weights were no numbers that can be stored."""
    which = ", ".join(f"expert {k} in epoch {epoch}" for k, epoch in lost.items())
    return CondenseError(
        f"diverged: {which} (its weights are not finite in {dtype}); lower the experts' learning rate, now "
        f"{training.recipe.lr:g}; experts that are done are kept"
    )


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


def free_host_memory() -> int:
    """Bytes that can be had without swapping, within the limit of a container; 0 where the system does not tell."""
    try:
        (line,) = (line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable:"))
        free = int(line.split()[1]) * 1024
        with contextlib.suppress(OSError, ValueError):  # no cgroup v2, or no limit ("max")
            limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
            free = min(free, max(0, limit - used))
        return free
    except (OSError, ValueError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 0


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

    Experts of the cache count as the run's own work, whenever they were trained; ``run.preparation`` states them. Of a
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
        run.trajectories = experts.describe()
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
    if run.rehearses or not isinstance(run.network, str):  # nothing is kept that a name does not describe
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
    run.trajectories = experts.describe()
    run.preparation = {
        "networks": plan.networks, "networks_wanted": count, "steps_each": plan.steps,
        "steps_each_wanted": epochs * unit, "epochs": plan.units, "epochs_wanted": epochs,
        "from_cache": plan.networks - len(trained),
        "seconds": round(credited + (time.monotonic() - began if trained else 0.0), 2),
    }  # fmt: skip
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


class _Mean(nn.Module):
    """The mean logits of networks of one architecture with flat weights (K, P)."""

    def __init__(self, net: networks.Network, layout: Layout, thetas: Tensor) -> None:
        super().__init__()
        self.net, self.layout = net.requires_grad_(False), layout
        self.thetas: Tensor
        self.register_buffer("thetas", thetas)

    def forward(self, images: Tensor) -> Tensor:
        logits = [
            torch.func.functional_call(self.net, self.layout.unflatten(theta.float()), (images,)).float()
            for theta in self.thetas
        ]
        return torch.stack(logits).mean(0)


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
    return _Mean(net, file.layout, torch.from_numpy(np.array(file.values[:count, epoch]))).to(device).eval()
