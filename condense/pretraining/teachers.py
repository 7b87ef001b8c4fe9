"""Teachers: networks trained on the real data and kept whole, weights and buffers, that methods ask for labels and for
the statistics of their BatchNorm layers.

The file is HDF5: every entry of a member's state, under its own name, is an array ``/members/K/NAME``; the manifest
says of each member its network, number, accuracy, seconds and SHA-256, and of all of them which data and training they
are of. A member is known by its network and number: those that are added later are those that would have been trained
at once (on a CPU bit for bit; a GPU trains groups together, whose sizes change the rounding).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from condense import networks, rng
from condense.augment import dsa
from condense.config import require
from condense.data import Task, cache_dir
from condense.device import device_name
from condense.engine import Run
from condense.errors import CondenseError
from condense.files import check_writable, content
from condense.hdf5 import AGAIN
from condense.networks import Key, Recorded, State, is_public, read
from condense.networks.saved import member_title, network_nbytes, write_teacher_file
from condense.pretraining.budget import groups, taught
from condense.pretraining.store import expected, parts_of, transform_digests
from condense.training import STUDENT_VERSION, Recipe, Student, TaskSource, accuracy, check_rule, pick_together, train
from condense.version import __version__

_log = logging.getLogger(__name__)

Architecture = str | Callable[..., nn.Module]

NETWORK = "convnet-d3-w128-bn"
"""What is trained where neither a network nor a method is named."""

GROUP = 10
"""Most teachers that a GPU trains together."""


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
        room += 2 * network_nbytes(net)
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
                write_teacher_file(place.with_name(_part(name, entry["number"])), about, [(entry, state)])
    ranks.close()
    if ranks.leads:
        have = _have(path, about, force)  # another process may have added to the file in the meantime
        lost = [key for key in wanted if key not in have]
        if lost:
            raise CondenseError(f"{path}: teacher {lost[0][1]} of {lost[0][0]} is not found there; ranks need one disk")
        kept = [key for key, (file, _) in have.items() if file.path == path]
        if len(kept) < len(have):
            used = [have[key] for key in dict.fromkeys([*kept, *wanted, *have])]
            write_teacher_file(path, about, ((file.entries[k], file.state(k)) for file, k in used))
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
                raise CondenseError(f"{place}: {member_title(file.entries[k])} is of another version of its library; "
                                    "take another --out, or replace it with --force")  # fmt: skip
            sound = file.sound(k)
            if not sound and place == path and not force:
                title = member_title(file.entries[k])
                raise CondenseError(f"{place}: {title} is damaged (its checksum differs); {AGAIN} "
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
