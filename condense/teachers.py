"""Teachers: networks trained on the real data and kept whole, weights and buffers, that methods ask for labels and for
the statistics of their BatchNorm layers.

The file is HDF5: every entry of a member's state, under its own name, is an array ``/members/K/NAME``; the manifest
says of each member its network, number, accuracy, seconds and SHA-256, and of all of them which data and training they
are of. A member is known by its network and number: those that are added later are those that would have been trained
at once (on a CPU bit for bit; a GPU trains groups together, whose sizes change the rounding).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import shutil
import statistics
import sys
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
from condense.augment import Transform, dsa
from condense.banks import (
    Same,
    agreed_plan,
    digests,
    expected,
    groups,
    parts_of,
    seconds_per_step,
    taught,
    transform_digests,
)
from condense.config import require
from condense.container import AGAIN
from condense.distilled import check_writable, replacing
from condense.errors import CondenseError, did_you_mean, need
from condense.labels import MeanLogits, content
from condense.run import Run, device_name
from condense.students import (
    STUDENT_VERSION,
    TEST_CHUNK,
    Recipe,
    Student,
    TaskSource,
    accuracy,
    check_rule,
    pick_together,
    train,
)
from condense.tasks import Task, cache_dir
from condense.units import by
from condense.version import __version__

_log = logging.getLogger(__name__)

Architecture = str | Callable[..., nn.Module]
NETWORK = "convnet-d3-w128-bn"
"""What is trained where neither a network nor a method is named."""
GROUP = 10
"""Most teachers that a GPU trains together."""
GLANCE = 1000
"""Most test images on which teachers of others are judged."""
LIBRARIES = ("torchvision", "timm")
CHECKPOINTS = (".pt", ".pth")
FORMAT = container.Format(
    "condense.teachers", 1, maker="condense teachers",
    required={
        "classes": list, "image_shape": list, "fingerprint": str, "transform": list, "members": list, "recipe": str,
        "epochs": int, "content": str,
    },
)  # fmt: skip
DTYPES = (np.float16, np.float32, np.float64, np.int32, np.int64, np.uint8, np.bool_)
"""What arrays of a file may be of."""
State = dict[str, Tensor]
Key = tuple[str, int]
"""A member's network and number."""


@dataclass(frozen=True)
class Squeezing:
    """How teachers are trained."""

    recipe: Recipe
    """Its number of steps is replaced."""
    epochs: int
    """Passes over the training images."""
    precision: str | None = None
    """fp32 or bf16; None is the run's."""
    held_out: float = 0.0
    """Share of each class's training images that teachers do not see and are judged on; 0: the real test images."""


@dataclass(frozen=True)
class TeacherOptions:
    """Settings of teachers, mixed into the settings of methods that have some."""

    teachers: str = ""
    """A file of `condense teachers`, a torch checkpoint (.pt, .pth) of the run's network, or torchvision:NAME or
    timm:NAME for public weights, of several joined by commas; by default the cache is searched, and what it lacks is
    trained."""
    committee: str = ""
    """Architectures of the teachers, joined by commas; the run's network by default."""
    num_teachers: int = 1
    """Teachers of each architecture."""
    teacher_epochs: int = 50
    """Passes over the real training images; longer-trained teachers are better ones but harder to recover images
    from."""
    teacher_lr: float = 0.1
    """Learning rate at the start of a teacher's training; it falls to 0 along a cosine."""
    teacher_optimizer: str = "sgd"
    """sgd (momentum 0.9) or adamw."""
    teacher_decay: float = 5e-4
    """Weight decay of a teacher's training; adamw spares biases and norms."""
    teacher_batch: int = 128
    """Real images per step of a teacher's training."""
    teacher_augment: str = "crop_flip"
    """Operations joined by _, drawn per image: flip and colour act in every step, and one of the others."""
    teacher_cutmix: float = 0.0
    """Probability of CutMix in a step of a teacher's training."""

    def check_teachers(self) -> None:
        """For ``__post_init__``: refuses settings out of range, and words that are none."""
        largest = sys.float_info.max
        require(
            self, num_teachers=(1, math.inf), teacher_epochs=(1, math.inf), teacher_lr=(0, largest),
            teacher_decay=(0, largest), teacher_batch=(1, math.inf), teacher_cutmix=(0, 1),
        )  # fmt: skip
        check_rule(self.teacher_optimizer, "cosine", prefix="teacher_")
        try:
            dsa(self.teacher_augment, variant="flip-always")
        except CondenseError as fault:
            raise CondenseError(f"teacher_augment={self.teacher_augment}: {fault}") from fault
        for name in self._named():
            try:
                networks.check(name)
            except CondenseError as fault:
                raise CondenseError(f"committee={self.committee}: {fault}") from fault
        if is_public(self.teachers):
            for name in self.teachers.split(","):
                networks.check(name)
            if self.committee:
                raise CondenseError(f"teachers={self.teachers}: says what the committee is; leave out committee")

    def _named(self) -> list[str]:
        return [name.strip() for name in self.committee.split(",")] if self.committee else []

    def squeezing(self, task: Task) -> Squeezing:
        """How they are trained: SGD with momentum 0.9 or AdamW along a cosine, with augmentation and CutMix."""
        recipe = Recipe(
            steps=0, batch=self.teacher_batch, lr=self.teacher_lr, momentum=0.9, weight_decay=self.teacher_decay,
            drops=(), augment=dsa(self.teacher_augment, variant="flip-always", mirror=task.mirror),
            cutmix=self.teacher_cutmix, optimizer=self.teacher_optimizer, schedule="cosine",
        )  # fmt: skip
        return Squeezing(recipe, self.teacher_epochs)

    def wanted(self, own: Architecture) -> int:
        """Number of teachers that are asked for."""
        public = is_public(self.teachers)
        return len(self.teachers.split(",")) if public else len(self.architectures(own)) * self.num_teachers

    def architectures(self, own: Architecture) -> list[Architecture]:
        """What teachers are to be had: the committee, or ``own``, the run's network."""
        return list(dict.fromkeys(self._named())) or [own]


# -- what a method sees -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Member:
    """One teacher."""

    network: networks.Network
    """Frozen, in eval mode, on the device; takes images in training space."""
    name: str
    """Of its architecture."""
    accuracy: float
    """Fraction of images that it gets right; of which, the committee says."""
    seconds: float = 0.0
    """That its training took; 0 where that is not known."""
    number: int = 0
    """Among the teachers of its architecture."""
    sha256: str = ""
    """Of its state."""


@dataclass(frozen=True, eq=False)
class Committee:
    """Teachers: the first one of each architecture, then the second ones, and so on."""

    members: tuple[Member, ...]
    source: str = ""
    """Where they are from: path of a file, or the name of public weights; empty for those of the cache."""
    judged_on: str = "test images"
    """What their accuracies are of."""

    @property
    def content(self) -> str:
        """Key of the members' states."""
        return _key(member.sha256 for member in self.members)

    def bytes(self) -> int:
        """Of all members' states."""
        return sum(_nbytes(member.network) for member in self.members)

    def mean(self, weights: Sequence[float] | None = None) -> nn.Module:
        """A frozen network in eval mode that takes images (B,C,H,W) in training space to the members' mean logits,
        float32 (B,classes). It shares the members' networks, and its state holds all of theirs.

        Args:
            weights: of the members, in their order, scaled to a sum of 1; None: all alike.

        Raises:
            CondenseError: not one weight of at least 0 for each member, or all are 0.
        """
        return MeanLogits([member.network for member in self.members], weights).requires_grad_(False).eval()

    def describe(self) -> dict[str, Any]:
        """For the manifest of a set: where they are (no path if in the cache), which, how good and how large."""
        return {
            "path": self.source or None, "content": self.content,
            "networks": [member.name for member in self.members],
            "numbers": [member.number for member in self.members],
            "sha256": [member.sha256 for member in self.members],
            "accuracies": [round(member.accuracy, 6) for member in self.members], "judged_on": self.judged_on,
            "bytes": self.bytes(), "seconds": round(sum(member.seconds for member in self.members), 2),
        }  # fmt: skip


def _nbytes(net: nn.Module) -> int:
    """Bytes of weights and buffers."""
    return sum(value.numel() * value.element_size() for value in net.state_dict().values())


def require_batch_norm(committee: Committee) -> None:
    """Refuses teachers without running statistics.

    Raises:
        CondenseError: a member has no BatchNorm.
    """
    for member in committee.members:
        _check_batch_norm(member.network, member.name)


def _check_batch_norm(net: nn.Module, name: str) -> None:
    if not networks.uses_batch_statistics(net):
        raise CondenseError(
            f"teacher {name} has no BatchNorm, whose statistics this method matches; take a network such as {NETWORK}"
        )


def provide(
    run: Run,
    squeezing: Squeezing,
    *,
    file: str = "",
    architectures: Sequence[Architecture],
    count: int = 1,
    batch_norm: bool = False,
) -> Committee:
    """The teachers of a method's run: named ones, else those of the cache, where missing ones are trained. Once a run.

    Teachers of the cache count as the run's own work, whenever they were trained; ``run.preparation`` states them. Of a
    time limit they take a third at most: as many whole epochs for all as fit, or one epoch for fewer of them. Named
    ones are free. ``run.teachers`` describes them.

    Args:
        run: of the method.
        squeezing: how they are trained, where they are not named.
        file: ``teachers`` of :class:`TeacherOptions`, or nothing.
        architectures: of the teachers.
        count: of each architecture.
        batch_norm: refuse teachers without BatchNorm, before any is trained.

    Raises:
        Interrupted: SIGINT or SIGTERM; teachers that are done stay in the cache.
        CondenseError: named teachers do not suit the run, one diverged, or the cache cannot be written.
    """
    if file:
        committee = _named(run, file, architectures, count)
        if batch_norm:
            require_batch_norm(committee)
        run.keep("teachers", Same(committee.content, file, "teachers"))
        run.teachers = committee.describe()
        return committee
    source, unit = taught(run, squeezing.recipe.batch, squeezing.held_out)
    precision = squeezing.precision or run.precision
    for one in architectures:
        with rng.seeded("layout"):
            net = networks.build(one, source.shape, source.num_classes)
        if batch_norm:
            _check_batch_norm(net, networks.name_of(one))
        _check_last_batch(net, networks.name_of(one), len(source.train), squeezing.recipe.batch)

    def seconds() -> float:
        together = min(count, GROUP) if pick_together(run.device) else 1
        paces = []
        for one in architectures:
            students = [_student(run, source, one, k) for k in range(together)]
            paces.append(seconds_per_step(run, students, squeezing.recipe, precision))
        return statistics.mean(paces)

    if run.ranks.leads:
        run.begin()
    wanted = [(one, k) for k in range(count) for one in architectures]
    plan = agreed_plan(run, seconds, networks=len(wanted), units=squeezing.epochs, unit_steps=unit)
    shorter = dataclasses.replace(squeezing, epochs=plan.units)
    again = f"stopped while training its teachers; go on with: condense resume {run.directory}"
    began, chosen = time.monotonic(), wanted[: plan.networks]
    if run.rehearses or not all(isinstance(one, str) for one in architectures):  # a name must say what is kept
        committee, from_cache = _unkept(run, shorter, source, chosen, plan.unit_steps, again), 0
        if run.rehearses:  # as large as wanted
            committee = _filled(committee, run, source, wanted)
        credited = 0.0
    else:
        keys = [(networks.name_of(one), k) for one, k in chosen]
        made = _record(run, shorter, cache_file(run, shorter), keys, again, force=True)
        committee = made.file.committee(keys, run.device, "")
        there = [member for member in committee.members if (member.name, member.number) not in made.trained]
        credited, from_cache = sum(member.seconds for member in there), len(there)
    run.credit(credited)
    run.teachers = committee.describe()
    trained = plan.networks - from_cache
    run.preparation = {
        "networks": plan.networks, "networks_wanted": len(wanted), "steps_each": plan.steps,
        "steps_each_wanted": squeezing.epochs * unit, "epochs": plan.units, "epochs_wanted": squeezing.epochs,
        "from_cache": from_cache,
        "seconds": round(credited + (time.monotonic() - began if trained else 0.0), 2),
    }  # fmt: skip
    return committee


# -- the file ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Recorded:
    """A file of teachers. Members are read and verified when they are asked for."""

    path: Path
    manifest: dict[str, Any]

    @property
    def entries(self) -> list[dict[str, Any]]:
        """What the manifest says of each member."""
        return self.manifest["members"]

    @property
    def keys(self) -> list[Key]:
        """Network and number of each member."""
        return [(entry["network"], entry["number"]) for entry in self.entries]

    def state(self, k: int) -> State:
        """Weights and buffers of member ``k`` by name, on the CPU.

        Raises:
            CondenseError: it is damaged.
        """
        with container.opened(self.path, FORMAT) as (file, _):
            group, names = file[f"members/{k}"], sorted(_arrays(self.path, file, k))
            found = {name: torch.from_numpy(np.asarray(group[name][()])) for name in names}
        if content(found) != self.entries[k]["sha256"]:
            raise CondenseError(f"{self.path}: {_title(self.entries[k])} is damaged (its checksum differs); {AGAIN}")
        return found

    def sound(self, k: int) -> bool:
        """Whether member ``k`` is what was written."""
        with contextlib.suppress(CondenseError):
            return bool(self.state(k))
        return False

    def member(self, k: int, device: torch.device) -> Member:
        """Member ``k``, verified.

        Raises:
            CondenseError: it is damaged, or its network is unknown here, or another one by now.
        """
        entry, known = self.entries[k], self.manifest
        channels, height, width = known["image_shape"]
        try:
            with rng.seeded("layout"):
                net = networks.build(entry["network"], (channels, height, width), len(known["classes"]))
        except CondenseError as fault:
            raise CondenseError(f"{self.path}: {fault}") from fault
        if misfit := _load(net, self.state(k)):
            raise CondenseError(
                f"{self.path}: {_title(entry)} is of another version of its network ({misfit}); make it again"
            )
        return Member(
            _frozen(net, device), entry["network"], float(entry["accuracy"]), float(entry["seconds"]), entry["number"],
            entry["sha256"],
        )  # fmt: skip

    def committee(self, keys: Sequence[Key], device: torch.device, source: str | None = None) -> Committee:
        """The members of these keys, in their order; ``source`` as in :class:`Committee`, by default this file."""
        places = {key: k for k, key in enumerate(self.keys)}
        members = tuple(self.member(places[key], device) for key in keys)
        source = str(self.path.absolute()) if source is None else source
        return Committee(members, source, str(self.manifest.get("judged_on", "")))


def _title(entry: Mapping[str, Any]) -> str:
    return f"teacher {entry['number']} of {entry['network']}"


def _key(digests: Iterable[str]) -> str:
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()


def read(path: Path) -> Recorded:
    """Opens a file of teachers from anywhere: types, sizes and links are checked, no member is read.

    Raises:
        CondenseError: one line: no such file, not our format, newer version, truncated or damaged.
    """
    with container.opened(path, FORMAT) as (file, manifest):
        fields = {"network": str, "number": int, "sha256": str, "accuracy": float, "seconds": float}
        sizes = manifest["image_shape"]
        if (
            not manifest["members"]
            or not all(isinstance(m, dict) and all(isinstance(m.get(f), t) for f, t in fields.items())
                       for m in manifest["members"])
            or len(sizes) != 3 or not all(isinstance(size, int) and size > 0 for size in sizes)
        ):  # fmt: skip
            raise CondenseError(f"{path}: the manifest is not one of teachers; it was not written by this toolkit")
        for k in range(len(manifest["members"])):
            _arrays(path, file, k)
    if _key(entry["sha256"] for entry in manifest["members"]) != manifest["content"]:
        raise CondenseError(f"{path}: the manifest is damaged (its members are not those of its key); {AGAIN}")
    return Recorded(path, manifest)


def _arrays(path: Path, file: Any, k: int) -> list[str]:
    """Names of the arrays of member ``k``: each in this file, of a known type, and together no larger than it."""
    import h5py

    container.check_link(path, file, f"members/{k}")
    group, total, size = file[f"members/{k}"], 0, path.stat().st_size
    if not isinstance(group, h5py.Group):
        raise CondenseError(f"{path}: 'members/{k}' is not what the manifest says; {AGAIN}")
    for name in group:
        container.check_link(path, file, f"members/{k}/{name}")
        array = group[name]
        if not isinstance(array, h5py.Dataset) or array.is_virtual or array.external or array.chunks is not None:
            raise CondenseError(f"{path}: 'members/{k}/{name}' is not an array stored in one piece in this file")
        if array.shape is None or array.dtype.type not in DTYPES:
            raise CondenseError(f"{path}: 'members/{k}/{name}' has the type {array.dtype}, which no teacher uses")
        total += math.prod(array.shape) * array.dtype.itemsize
        if total > size:
            raise CondenseError(f"{path}: teacher {k} claims {total} bytes, more than the file holds; {AGAIN}")
    return list(group)


def _write(path: Path, about: Mapping[str, Any], members: Iterable[tuple[Mapping[str, Any], State]]) -> None:
    """The file, atomically, from one member after the other: its entry of the manifest and its state."""
    entries = []
    with replacing(path) as temporary, container.create(temporary) as file:
        for k, (entry, state) in enumerate(members):
            group = file.create_group(f"members/{k}")
            for name, value in state.items():
                group.create_dataset(name, data=value.numpy())
            entries.append(dict(entry))
        key = _key(entry["sha256"] for entry in entries)
        container.sign(file, FORMAT, {**about, "members": entries, "content": key})


# -- making it --------------------------------------------------------------------------------------------------------


def facts(run: Run, squeezing: Squeezing) -> dict[str, Any]:
    """All that decides a teacher besides its network and number, as the manifest states it."""
    return {
        "fingerprint": run.task.fingerprint, "transform": transform_digests(run.task),
        "recipe": str(dataclasses.replace(squeezing.recipe, steps=0)), "epochs": squeezing.epochs,
        "held_out": squeezing.held_out, "seed": run.seed, "precision": squeezing.precision or run.precision,
        "device": device_name(run.device), "stacked": pick_together(run.device),
        "random_hash_version": rng.HASH_VERSION, "student_version": STUDENT_VERSION, "torch": torch.__version__,
    }  # fmt: skip


def cache_file(run: Run, squeezing: Squeezing) -> Path:
    """Where the cache keeps teachers of this training, of whatever network, for every method that wants them."""
    text = json.dumps(facts(run, squeezing), sort_keys=True)
    return cache_dir() / "teachers" / f"{hashlib.sha256(text.encode()).hexdigest()}.h5"


@dataclass(frozen=True, eq=False)
class Made:
    """What :func:`record` did."""

    file: Recorded
    trained: list[Key]
    """Network and number of the members that were not there."""
    seconds: float
    """That it took."""


def record(
    run: Run,
    squeezing: Squeezing,
    path: Path,
    *,
    architectures: Sequence[Architecture],
    count: int = 1,
    again: str = "stopped while training teachers; what is done is kept: the same command goes on with the rest",
    force: bool = False,
) -> Made:
    """Trains teachers on the run's real data and writes them to ``path``.

    Members that the file holds stay, whatever their network, and finished ones of a call that was killed (below
    ``path`` + ``.parts``) count too: the same call goes on with what is missing, in mid-training where its state was
    written. A larger ``count`` or another architecture adds to the file. Ranks train shares.

    Args:
        run: device, seed, data; stops it on a signal.
        squeezing: how.
        path: file to write.
        architectures: names of the networks.
        count: teachers of each that it shall hold, at least.
        again: what is said where a signal stops the training.
        force: replace what other data or trainings left there, and what is damaged.

    Raises:
        Interrupted: SIGINT or SIGTERM.
        CondenseError: the place holds something else or cannot be written, or a teacher diverged.
    """
    for one in architectures:
        if not isinstance(one, str):
            raise CondenseError(f"network {networks.name_of(one)}: teachers in files are of networks that have a name")
    keys = [(str(one), k) for k in range(count) for one in dict.fromkeys(architectures)]
    return _record(run, squeezing, path, keys, again, force)


def _record(run: Run, squeezing: Squeezing, path: Path, wanted: Sequence[Key], again: str, force: bool) -> Made:
    began, ranks = time.monotonic(), run.ranks
    source, unit = taught(run, squeezing.recipe.batch, squeezing.held_out)
    about = {
        **facts(run, squeezing), "data": run.task.name, "options": dataclasses.asdict(run.task.options),
        "classes": list(run.task.classes), "image_shape": list(run.task.shape), "steps_per_epoch": unit,
        "judged_on": "held-out images" if squeezing.held_out else "test images", "code_version": __version__,
        "normalisation": {name: array.tolist() for name, array in run.task.transform.arrays().items()}
        if run.task.transform.kind == "standardise" else None,
    }  # fmt: skip
    if ranks.leads:
        check_writable(path, force=True)
    have = _have(path, about, force)
    missing = [key for key in wanted if key not in have]
    room = path.stat().st_size if path.exists() else 0  # for a whole new file beside the old one and the parts
    for name, _ in missing:
        with rng.seeded("layout"):
            net = networks.build(name, source.shape, source.num_classes)
        _check_last_batch(net, name, len(source.train), squeezing.recipe.batch)
        room += 2 * _nbytes(net)
    if missing and ranks.leads:
        check_writable(path, force=True, size=room)
    ranks.close()  # all have seen what is there before any adds to it
    mine = [key for i, key in enumerate(wanted) if key in missing and i % ranks.world == ranks.rank]
    steps = squeezing.epochs * unit
    for name in dict.fromkeys(name for name, _ in mine):
        numbers = [k for other, k in mine if other == name]
        words = f"{len(numbers)} teachers {name}, {squeezing.epochs} epochs"
        for group, report in groups(run, numbers, steps, words, again, GROUP):
            place = parts_of(path) / _part(name, group[0])
            for entry, state in _train(run, squeezing, source, name, group, unit, report, place.with_suffix(".train")):
                _write(place.with_name(_part(name, entry["number"])), about, [(entry, state)])
    ranks.close()
    if ranks.leads:
        have = _have(path, about, force)  # another process may have added to the file in the meantime
        lost = [key for key in wanted if key not in have]
        if lost:
            raise CondenseError(f"{path}: teacher {lost[0][1]} of {lost[0][0]} is not found there; ranks need one disk")
        kept = [key for key, (file, _) in have.items() if file.path == path]
        if len(kept) < len(have):
            used = [have[key] for key in dict.fromkeys([*kept, *wanted, *have])]
            _write(path, about, ((file.entries[k], file.state(k)) for file, k in used))
        shutil.rmtree(parts_of(path), ignore_errors=True)
    ranks.close()
    return Made(read(path), missing, time.monotonic() - began)


def _part(name: str, number: int) -> str:
    """The file of one finished member; networks' names may hold what file names may not."""
    return f"{hashlib.sha256(name.encode()).hexdigest()[:16]}-{number:04d}.h5"


def _have(path: Path, about: Mapping[str, Any], force: bool) -> dict[Key, tuple[Recorded, int]]:
    """The sound members of the file and of its parts by key: each with its place in a file."""
    have: dict[Key, tuple[Recorded, int]] = {}
    for place in (path, *sorted(parts_of(path).glob("*.h5"))):
        file = expected(place, read, about, "teachers", force, force or place != path)
        for k, key in enumerate(file.keys if file is not None else ()):
            assert file is not None
            if key in have:
                continue
            stale = file.entries[k].get("library_version") != networks.library_version(key[0])
            if stale and not force:
                raise CondenseError(f"{place}: {_title(file.entries[k])} is of another version of its library; "
                                    "take another --out, or replace it with --force")  # fmt: skip
            sound = file.sound(k)
            if not sound and place == path and not force:
                raise CondenseError(f"{place}: {_title(file.entries[k])} is damaged (its checksum differs); {AGAIN} "
                                    "with --force")  # fmt: skip
            if sound and not stale:
                have[key] = file, k
    return have


def _check_last_batch(net: nn.Module, name: str, size: int, batch: int) -> None:
    """A single image has no variance where a map is one pixel large, and would spoil running statistics elsewhere."""
    if networks.uses_batch_statistics(net) and size % batch == 1:
        raise CondenseError(
            f"teacher_batch={batch}: the last batch of {size} images would hold one alone, which the BatchNorm of "
            f"{name} cannot take; give teacher_batch={batch + 1}"
        )


def _student(run: Run, source: Task, network: Architecture, k: int) -> Student:
    name = networks.name_of(network)
    with rng.seeded(run.seed, "teacher", name, k):
        net = networks.build(network, source.shape, source.num_classes)
    return Student(net, TaskSource(source, run.device), rng.key(run.seed, "teacher", name, k))


def _train(
    run: Run,
    squeezing: Squeezing,
    source: Task,
    network: Architecture,
    group: Sequence[int],
    unit: int,
    report: Callable[[int], None],
    checkpoint: Path | None,
) -> Iterator[tuple[dict[str, Any], State]]:
    """Trains the teachers of one architecture with the numbers of ``group``, together where that is faster.

    Args:
        unit: steps of an epoch.
        checkpoint: file for the state in mid-training, or None.

    Yields:
        Of each its entry of the manifest, and its state on the CPU.

    Raises:
        CondenseError: teachers diverged; the others were yielded before.
    """
    students = [_student(run, source, network, k) for k in group]
    precision = squeezing.precision or run.precision
    lost: dict[int, int] = {}

    def watch(i: int, step: int, state: Mapping[str, Tensor]) -> None:
        if not all(bool(value.isfinite().all()) for value in state.values() if value.is_floating_point()):
            lost.setdefault(group[i], step // unit)
            if len(lost) == len(group):
                raise _diverged(network, lost, squeezing)

    recipe = dataclasses.replace(squeezing.recipe, steps=squeezing.epochs * unit)
    seconds = train(
        students, recipe, device=run.device, precision=precision, report=report, checkpoint=checkpoint, watch=watch,
        watch_every=unit,
    )  # fmt: skip
    for k, student in zip(group, students):
        if k in lost:
            continue
        right = accuracy(student.network, source, device=run.device, precision=precision)
        state = {name: value.detach().to("cpu", copy=True) for name, value in student.network.state_dict().items()}
        entry = {
            "network": networks.name_of(network), "number": k, "accuracy": right,
            "seconds": round(seconds / len(group), 3), "sha256": _digest(state),
            "library_version": networks.library_version(network),
        }  # fmt: skip
        yield entry, state
    if lost:
        raise _diverged(network, lost, squeezing)


def _digest(state: Mapping[str, Tensor]) -> str:
    return content({name: state[name] for name in sorted(state)})


def _diverged(network: Architecture, lost: Mapping[int, int], squeezing: Squeezing) -> CondenseError:
    """``lost``: numbers of teachers, with the epoch after which their weights were not finite."""
    which = ", ".join(f"teacher {k} of {networks.name_of(network)} in epoch {epoch}" for k, epoch in lost.items())
    return CondenseError(
        f"diverged: {which} (its weights are not finite); lower teacher_lr, now {squeezing.recipe.lr:g}; teachers that "
        "are done are kept"
    )


def _unkept(
    run: Run, squeezing: Squeezing, source: Task, chosen: Sequence[tuple[Architecture, int]], unit: int, again: str
) -> Committee:
    """Teachers that no file keeps: a rehearsal's, and those of networks that were given in Python."""
    members: dict[tuple[Architecture, int], Member] = {}
    for one in dict.fromkeys(one for one, _ in chosen):
        numbers = [k for other, k in chosen if other is one]
        words = f"{len(numbers)} teachers {networks.name_of(one)}, {squeezing.epochs} epochs"
        for group, report in groups(run, numbers, squeezing.epochs * unit, words, again, GROUP):
            for entry, state in _train(run, squeezing, source, one, group, unit, report, None):
                with rng.seeded("layout"):
                    net = networks.build(one, source.shape, source.num_classes)
                net.load_state_dict(state)
                members[one, entry["number"]] = Member(
                    _frozen(net, run.device), entry["network"], entry["accuracy"], entry["seconds"], entry["number"],
                    entry["sha256"],
                )  # fmt: skip
    judged_on = "held-out images" if squeezing.held_out else "test images"
    return Committee(tuple(members[pair] for pair in chosen), "", judged_on)


def _filled(committee: Committee, run: Run, source: Task, wanted: Sequence[tuple[Architecture, int]]) -> Committee:
    """The committee with untrained members in the place of those that are wanting."""
    members = list(committee.members)
    for one, k in wanted[len(members) :]:
        with rng.seeded("layout"):
            net = networks.build(one, source.shape, source.num_classes)
        members.append(Member(_frozen(net, run.device), networks.name_of(one), 0.0, number=k))
    return dataclasses.replace(committee, members=tuple(members))


def _frozen(net: networks.Network, device: torch.device) -> networks.Network:
    return net.to(device).requires_grad_(False).eval()


# -- named teachers ---------------------------------------------------------------------------------------------------


def is_public(file: str) -> bool:
    """Whether ``file`` names public weights, ``torchvision:NAME`` or ``timm:NAME``, or several joined by commas."""
    return all(word.partition(":")[0] in LIBRARIES and ":" in word for word in file.split(","))


def _named(run: Run, file: str, architectures: Sequence[Architecture], count: int) -> Committee:
    """The teachers that ``file`` names, checked against the run."""
    task = run.task
    if is_public(file):
        nets = {one: _public(one, task.shape, task.num_classes, task.transform) for one in file.split(",")}
        judged = [_judged(run, net, one, one) for one, net in nets.items()]
        return Committee(tuple(one.members[0] for one in judged), file, judged[0].judged_on)
    path = Path(file)
    if path.suffix in CHECKPOINTS:
        if len(architectures) > 1 or count > 1:
            raise CondenseError(f"teachers={file}: a checkpoint is one network; leave out committee and num_teachers, "
                                "or give a file of `condense teachers`")  # fmt: skip
        net = _checkpoint(path, architectures[0], task.shape, task.num_classes)
        return _judged(run, net, networks.name_of(architectures[0]), str(path.absolute()))
    named = read(path)
    _check_suits(named, task)
    there: dict[str, int] = {}
    for name, _ in named.keys:
        there[name] = there.get(name, 0) + 1
    for name in map(networks.name_of, architectures):
        if name not in there:
            raise CondenseError(
                f"{file}: holds no teacher of {name}, only of {', '.join(there)}; give committee={','.join(there)}"
            )
        if there[name] < count:
            raise CondenseError(
                f"{file}: holds {there[name]} of the {count} teachers of {name}; add some with `condense teachers "
                f"--count {count}`, or give num_teachers={there[name]}"
            )
    firsts = {name: sorted(k for other, k in named.keys if other == name) for name in there}
    keys = [(networks.name_of(one), firsts[networks.name_of(one)][k]) for k in range(count) for one in architectures]
    return named.committee(keys, run.device)


def _check_suits(file: Recorded, task: Task) -> None:
    """Finds before any work that a file cannot serve the data.

    Raises:
        CondenseError: it is of other classes, image size or normalisation.
    """
    known = file.manifest
    for what, has, wants in (
        ("image size", by(known["image_shape"]), by(task.shape)),
        ("classes", _few(known["classes"]), _few(task.classes)),
    ):
        if has != wants:
            raise CondenseError(f"{file.path}: its teachers are of another {what} ({has}, not {wants})")
    if known["classes"] != list(task.classes):
        raise CondenseError(f"{file.path}: its teachers are of other classes, or of these in another order")
    if known["transform"] != transform_digests(task):
        raise CondenseError(f"{file.path}: its teachers saw the data under another normalisation (zca=true or not?)")


def _few(classes: Sequence[Any]) -> str:
    return f"{len(classes)} of {', '.join(map(str, classes[:3]))}" + ", ..." * (len(classes) > 3)


def _judged(run: Run, net: networks.Network, name: str, source: str) -> Committee:
    """A teacher of others with its accuracy on some test images, which tells that classes or normalisation differ."""
    net, task, right = _frozen(net, run.device), run.task, 0
    ids = rng.Draws(0, "glance").sample(len(task.test), min(GLANCE, len(task.test))).sort().values
    with torch.no_grad():
        for part in ids.split(TEST_CHUNK):
            labels = torch.from_numpy(task.test.labels[part.numpy()]).to(run.device)
            right += int((net(task.test_batch(part)).argmax(1) == labels).sum())
    share = right / len(ids)
    if share < 2 / task.num_classes:
        _log.warning(
            "condense: teacher %s gets %.1f %% of the test images right: were its classes in another order, or its "
            "images normalised in another way?", source, 100 * share,
        )  # fmt: skip
    member = Member(net, name, share, sha256=_digest(net.state_dict()))
    return Committee((member,), source, f"{len(ids)} test images")


def _checkpoint(path: Path, network: Architecture, shape: tuple[int, int, int], classes: int) -> networks.Network:
    """The network with the weights of a file of ``torch.save``.

    Raises:
        CondenseError: no such file, it holds more than tensors, or they do not fit.
    """
    state = _saved(path)
    with rng.seeded("layout"):
        net = networks.build(network, shape, classes)
    if isinstance(net, networks.Wrapped) and not any(name.startswith("model.") for name in state):
        state = {f"model.{name}": value for name, value in state.items()}  # by its library's own names
    if misfit := _load(net, state):
        raise CondenseError(f"{path}: does not fit {networks.name_of(network)} for {by(shape)} images of {classes} "
                            f"classes: {misfit}")  # fmt: skip
    return net


def fill(net: nn.Module, path: Path, named: str) -> None:
    """Gives ``net`` the weights of a file of ``torch.save``; ``named`` is what messages call both.

    Raises:
        CondenseError: no such file, it holds more than tensors, or they do not fit.
    """
    if misfit := _load(net, _saved(path)):
        raise CondenseError(f"{named}: the file does not fit: {misfit}")


def _saved(path: Path) -> State:
    """What a file of ``torch.save`` holds of a network, without what other tools put around it."""
    if not path.is_file():
        raise CondenseError(f"{path}: no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old pickles, which are read all the same or refused
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as fault:  # a damaged file raises anything
        reason = (str(fault) or type(fault).__name__).strip().splitlines()[0]
        raise CondenseError(f"{path}: cannot be read as tensors alone ({reason}); give what torch.save wrote of a "
                            "network's state_dict()") from fault  # fmt: skip
    for key in ("state_dict", "model", "net", "weights"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()) or not state:
        raise CondenseError(f"{path}: holds no state of a network; give what torch.save wrote of its state_dict()")
    for prefix in ("_orig_mod.", "module."):  # what torch.compile and DataParallel put before names
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return dict(state)


def _load(net: nn.Module, state: Mapping[str, Tensor]) -> str:
    """Gives ``net`` the state, or changes nothing and says what does not fit."""
    own = net.state_dict()
    counters = {name: value for name, value in own.items() if name.endswith("num_batches_tracked")}
    state = {**counters, **state}  # old checkpoints lack them, and nothing reads them in eval mode
    both = [name for name in own if name in state]
    unlike = [name for name in both if state[name].shape != own[name].shape]
    faults = {
        "missing": [name for name in own if name not in state],
        "unknown": [name for name in state if name not in own],
        "of another shape": [f"{name} ({by(state[name].shape)}, not {by(own[name].shape)})" for name in unlike],
        "not finite": [name for name in both if not bool(state[name].isfinite().all())],
    }
    if any(faults.values()):
        return ", ".join(f"{len(names)} {words}: {names[0]}" + ", ..." * (len(names) > 1)
                         for words, names in faults.items() if names)  # fmt: skip
    net.load_state_dict(dict(state))
    return ""


class _Public(networks.Network):
    """A network with public weights that takes images in a task's training space: they go back to pixels and from there
    to what the weights were trained on."""

    def __init__(
        self, net: networks.Network, transform: Transform, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        self.net, self.transform = net, transform
        self.own_mean: Tensor
        self.own_std: Tensor
        for name, value in (("own_mean", mean), ("own_std", std)):
            self.register_buffer(name, torch.tensor(value, dtype=torch.float32)[:, None, None])

    def embed(self, x: Tensor, maps: list[Tensor] | None = None) -> Tensor:
        if self.transform.mean.device != x.device:
            self.transform = self.transform.to(x.device)
        pixels = self.transform.inverse(x).expand(-1, 3, -1, -1)  # grey ones three times
        return self.net.embed((pixels - self.own_mean) / self.own_std, maps)

    def classify(self, embedding: Tensor) -> Tensor:
        """(N, D) to (N, classes)."""
        return self.net.classify(embedding)


@dataclass(frozen=True)
class Weights:
    """Public weights, not loaded yet."""

    classes: int
    mean: Sequence[float]
    std: Sequence[float]
    size: tuple[int, int]
    """Height and width of the images that they were made for."""
    load: Callable[[], nn.Module]
    """Gives the network with its weights; fetches them where they are not here."""
    place: str
    """The file that holds them once they are here."""
    origin: str
    """Where they are fetched from."""


def torchvision_weights(name: str, named: str) -> Weights:
    """The default weights of a torchvision model; ``named`` is what messages call it."""
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        hint = did_you_mean(f"torchvision:{name}", [f"torchvision:{other}" for other in known])
        raise CondenseError(f"{named}: unknown{hint}")
    weights: Any = models.get_model_weights(name).DEFAULT
    preset = weights.transforms()
    place = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rpartition("/")[2]
    return Weights(
        len(weights.meta["categories"]), preset.mean, preset.std, (preset.crop_size[0], preset.crop_size[0]),
        lambda: models.get_model(name, weights=weights, progress=False), str(place), weights.url,
    )  # fmt: skip


def timm_weights(name: str, named: str) -> Weights:
    """The weights that timm has for a model; ``named`` is what messages call it."""
    try:
        import timm
    except ImportError as error:
        raise need("timm", "timm", named) from error
    if not timm.is_model(name):
        hint = did_you_mean(f"timm:{name}", [f"timm:{other}" for other in timm.list_models()])
        raise CondenseError(f"{named}: unknown{hint}")
    found = timm.models.get_pretrained_cfg(name)
    if found is None or not (found.hf_hub_id or found.url):
        raise CondenseError(f"{named}: timm has no weights for it")
    repository = found.hf_hub_id or ""
    origin = f"https://huggingface.co/{repository}" if repository else str(found.url)
    cache = "the Hugging Face cache (HF_HOME), below hub/models--" + repository.replace("/", "--")
    place = cache if repository else str(Path(torch.hub.get_dir()) / "checkpoints" / origin.rpartition("/")[2])
    return Weights(
        found.num_classes, found.mean, found.std, (found.input_size[1], found.input_size[2]),
        lambda: timm.create_model(name, pretrained=True), place, origin,
    )  # fmt: skip


def _public(file: str, shape: tuple[int, int, int], classes: int, transform: Transform) -> _Public:
    """Public weights behind the space that ``transform`` leads to.

    Raises:
        CondenseError: unknown, of another number of classes, or they are neither here nor can be fetched.
    """
    library, _, name = file.partition(":")
    weights = {"torchvision": torchvision_weights, "timm": timm_weights}[library](name, f"teachers={file}")
    if weights.classes != classes:
        raise CondenseError(f"teachers={file}: its weights tell {weights.classes} classes apart, the data have "
                            f"{classes}; give a checkpoint of these, or leave it out to train teachers")  # fmt: skip
    if shape[0] not in (1, 3):
        raise CondenseError(f"teachers={file}: takes images of 1 or 3 channels, not {shape[0]}")
    try:
        with rng.seeded("layout"):
            model = weights.load()
    except Exception as fault:  # each library fails in its own way
        reason = (str(fault) or type(fault).__name__).strip().splitlines()[0]
        raise CondenseError(f"teachers={file}: its weights are not here and cannot be fetched ({reason}); get "
                            f"{weights.origin} elsewhere and put it at {weights.place}") from fault  # fmt: skip
    net = networks.Wrapped(model, (3, *shape[1:]), classes, name=file)
    return _Public(net, transform, weights.mean, weights.std)


# -- teachers of a set's labels ---------------------------------------------------------------------------------------


def find(described: Mapping[str, Any]) -> Path | None:
    """Where the teachers are that ``Committee.describe()`` told of: where they lay, or in the cache; None where they
    are gone. A checkpoint that is still there, and public weights by their name, are compared when they are read."""
    wanted = described.get("sha256")
    if not isinstance(wanted, list) or not wanted or _key(map(str, wanted)) != described.get("content"):
        return None
    named, cached = described.get("path"), cache_dir() / "teachers"
    if isinstance(named, str) and (is_public(named) or (Path(named).suffix in CHECKPOINTS and Path(named).is_file())):
        return Path(named)
    places = [Path(named)] if isinstance(named, str) else []
    for path in (*places, *(sorted(cached.glob("*.h5")) if cached.exists() else ())):
        with contextlib.suppress(CondenseError):
            if set(wanted) <= {entry["sha256"] for entry in read(path).entries}:
                return path
    return None


def teacher(
    path: Path,
    device: torch.device,
    shape: tuple[int, int, int] | None = None,
    classes: int | None = None,
    *,
    described: Mapping[str, Any] | None = None,
    weights: Sequence[float] | None = None,
    transform: Transform | None = None,
) -> nn.Module:
    """A network, in eval mode on the device, that gives the mean logits of teachers.

    Args:
        path: of their file, of a checkpoint, or a name of public weights.
        device: where it computes.
        shape: (C,H,W) that its images must have; needed for what is no file of `condense teachers`.
        classes: number of classes that it must have; needed likewise.
        described: what ``Committee.describe()`` told of the teachers that are wanted; None: all of the file.
        weights: of the teachers, as for :meth:`Committee.mean`.
        transform: the map to the training space of its images; needed for public weights, else compared.

    Raises:
        CondenseError: the file is damaged or of other images, classes or normalisation, or holds other teachers.
    """
    file = str(path)
    others = CondenseError(f"{file}: holds other teachers than those that are asked for")
    wanted = [str(digest) for digest in (described or {}).get("sha256", [])]
    if not is_public(file) and path.suffix not in CHECKPOINTS:
        recorded = read(path)
        known = recorded.manifest
        for what, has, wants in (
            ("image size", known["image_shape"], list(shape) if shape else None),
            ("number of classes", len(known["classes"]), classes),
            ("normalisation", known["transform"], digests(transform) if transform is not None else None),
        ):
            if wants is not None and has != wants:
                seen = f" ({has}, not {wants})" if what != "normalisation" else ""
                raise CondenseError(f"{file}: its teachers are of another {what}{seen}")
        places = {entry["sha256"]: k for k, entry in enumerate(recorded.entries)}
        if not set(wanted) <= set(places):
            raise others
        chosen = [places[digest] for digest in wanted] or range(len(recorded.entries))
        return Committee(tuple(recorded.member(k, device) for k in chosen)).mean(weights)
    names = [str(name) for name in (described or {}).get("networks", [])]
    if shape is None or classes is None or len(names) != len(file.split(",") if is_public(file) else [file]):
        raise CondenseError(f"{file}: only a set that was labelled by it says what it is; give a file of "
                            "`condense teachers`")  # fmt: skip
    if is_public(file):
        if transform is None:
            raise CondenseError(f"{file}: public weights need the normalisation of their images")
        nets: list[networks.Network] = [_public(one, shape, classes, transform) for one in file.split(",")]
    else:
        networks.check(names[0])
        nets = [_checkpoint(path, names[0], shape, classes)]
    found = [_digest(net.state_dict()) for net in nets]
    if wanted != found:
        raise others
    members = [
        Member(_frozen(net, device), name, math.nan, sha256=digest) for net, name, digest in zip(nets, names, found)
    ]
    return Committee(tuple(members)).mean(weights)
