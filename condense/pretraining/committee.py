"""Teachers of a method: loads or trains them, and returns them as a committee."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from condense import networks, rng
from condense.data import Task, Transform, cache_dir, digests
from condense.engine import Run
from condense.errors import CondenseError
from condense.networks import (
    CHECKPOINT_SUFFIXES,
    MeanLogits,
    Member,
    MemberKey,
    PublicNetwork,
    State,
    TeacherFile,
    combined_sha256,
    freeze,
    is_public,
    load_public_weights,
    load_torch_checkpoint,
    read_teacher_file,
    state_nbytes,
)
from condense.pretraining.budget import TrainingPlan
from condense.pretraining.pipeline import Architecture, MemoryStore, NetworkKey, load_or_train, split_training_data
from condense.pretraining.store import ContentGuard, FileStore, check_same, transform_digests
from condense.pretraining.teachers import (
    DEFAULT_TEACHER_NETWORK,
    TeacherOptions,
    TeacherRecord,
    TeacherTraining,
    accuracy_source,
    build_untrained,
    check_last_batch,
    recorded_teacher_training,
    state_sha256,
    teacher_cache_file,
    teacher_store,
)
from condense.training import TEST_CHUNK

_log = logging.getLogger(__name__)

ACCURACY_SAMPLE = 1000
"""Maximum number of test images that measure the accuracy of teachers that this toolkit did not train."""


@dataclass(frozen=True, eq=False)
class Committee:
    """Teachers: the first of each architecture, then the second ones, and so on."""

    members: tuple[Member, ...]
    source: str = ""
    """Path of their file, or name of public weights; empty for those of the cache."""
    judged_on: str = "test images"
    """Images that their accuracies were measured on."""

    @property
    def content_key(self) -> str:
        """SHA-256 of the members' states."""
        return combined_sha256(member.sha256 for member in self.members)

    def nbytes(self) -> int:
        """Bytes of all members' states."""
        return sum(state_nbytes(member.network) for member in self.members)

    def ensemble(self, weights: Sequence[float] | None = None) -> nn.Module:
        """Returns a frozen network in eval mode that maps images (B,C,H,W) in training space to the members' mean
        logits, float32 (B,classes). It shares the members' networks, and its state holds all of theirs.

        Args:
            weights: of the members, in their order, scaled to a sum of 1; None: all alike.

        Raises:
            CondenseError: not one weight of at least 0 for each member, or all are 0.
        """
        return MeanLogits([member.network for member in self.members], weights).requires_grad_(False).eval()

    def describe(self) -> dict[str, Any]:
        """For the manifest of a set: path (None in the cache), networks, content keys, accuracies, size and seconds."""
        return {
            "path": self.source or None,
            "content": self.content_key,
            "networks": [member.name for member in self.members],
            "numbers": [member.number for member in self.members],
            "sha256": [member.sha256 for member in self.members],
            "accuracies": [
                None if math.isnan(member.accuracy) else round(member.accuracy, 6) for member in self.members
            ],
            "judged_on": self.judged_on,
            "bytes": self.nbytes(),
            "seconds": round(sum(member.seconds for member in self.members), 2),
        }


def committee_of(
    file: TeacherFile, keys: Sequence[MemberKey], device: torch.device, source: str | None = None
) -> Committee:
    """Loads the members of ``file`` with these keys, in their order. ``source`` is the path of the file by default."""
    places = {key: k for k, key in enumerate(file.keys)}
    members = tuple(file.load_member(places[key], device) for key in keys)
    source = str(file.path.absolute()) if source is None else source
    return Committee(members, source, str(file.manifest.get("judged_on", "")))


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
            f"teacher {name} has no BatchNorm, whose statistics this method matches; take a network such as "
            f"{DEFAULT_TEACHER_NETWORK}"
        )


def get_committee(
    options: TeacherOptions, run: Run, *, batch_norm: bool = False, features_only: bool = False
) -> Committee:
    """The teachers that a method's settings name or describe; see :func:`load_or_train_teachers`."""
    return load_or_train_teachers(
        run,
        options.teacher_training(run.task),
        file=options.teachers,
        architectures=options.architectures(run.network),
        count=options.num_teachers,
        batch_norm=batch_norm,
        features_only=features_only,
    )


def load_or_train_teachers(
    run: Run,
    training: TeacherTraining,
    *,
    file: str = "",
    architectures: Sequence[Architecture],
    count: int = 1,
    batch_norm: bool = False,
    features_only: bool = False,
) -> Committee:
    """Returns the teachers of a method's run: named ones, else those of the cache, where missing ones are trained.

    Of a time limit the training takes a third at most: as many whole epochs for all teachers as fit, or one epoch for
    fewer of them. Named teachers cost nothing. The note ``teachers`` in the manifest describes them.

    Args:
        run: of the method.
        training: of the teachers, unless they are named.
        file: ``teachers`` of :class:`TeacherOptions`, or nothing.
        architectures: of the teachers.
        count: number of teachers of each architecture.
        batch_norm: refuse teachers without BatchNorm, before any is trained.
        features_only: the method does not use logits, so public weights may be of other classes.

    Raises:
        Interrupted: SIGINT or SIGTERM; finished teachers stay in the cache.
        CondenseError: the run cannot use the named teachers, one diverged, or the cache cannot be written.
    """
    if file:
        committee = _load_named_teachers(run, file, architectures, count, features_only)
        if batch_norm:
            require_batch_norm(committee)
        run.register_state("teachers", ContentGuard(committee.content_key, file, "teachers"))
        run.note("teachers", committee.describe())
        return committee
    source, steps_per_epoch = split_training_data(run, training.recipe.batch, training.held_out)
    for architecture in architectures:
        net, name = build_untrained(architecture, source), networks.network_name(architecture)
        if batch_norm:
            _check_batch_norm(net, name)
        check_last_batch(net, name, len(source.train), training.recipe.batch)

    def open_cache(plan: TrainingPlan, keys: Sequence[NetworkKey]) -> FileStore[TeacherFile, State]:
        shorter = dataclasses.replace(training, epochs=plan.units)
        return teacher_store(run, shorter, teacher_cache_file(run, shorter), keys, steps_per_epoch, True)

    store, _ = load_or_train(
        run,
        recorded_teacher_training(run, training, source),
        [(architecture, number) for number in range(count) for architecture in architectures],
        open_cache,
        units=training.epochs,
        unit_steps=steps_per_epoch,
    )
    if isinstance(store, MemoryStore):
        committee = _committee_in_memory(store, source, run.device, accuracy_source(training))
    else:
        committee = committee_of(read_teacher_file(store.path), store.members, run.device, "")
    run.note("teachers", committee.describe())
    return committee


def _committee_in_memory(
    store: MemoryStore[TeacherRecord], source: Task, device: torch.device, judged_on: str
) -> Committee:
    members = []
    for architecture, number in store.keys:
        entry, state = store.records[architecture, number]
        net = build_untrained(architecture, source)
        net.load_state_dict(state)
        name, accuracy, seconds = entry["network"], entry["accuracy"], entry["seconds"]
        members.append(Member(freeze(net, device), name, accuracy, seconds, number, entry["sha256"]))
    for architecture, number in store.untrained:  # so that a dry run has the memory of the whole committee
        net = freeze(build_untrained(architecture, source), device)
        members.append(Member(net, networks.network_name(architecture), 0.0, number=number))
    return Committee(tuple(members), "", judged_on)


def _load_named_teachers(
    run: Run, file: str, architectures: Sequence[Architecture], count: int, features_only: bool
) -> Committee:
    """Loads the teachers that the setting ``teachers`` names, and checks that the run can use them."""
    task = run.task
    if is_public(file):
        classes = None if features_only else task.num_classes
        nets = {name: load_public_weights(name, task.shape, classes, task.transform) for name in file.split(",")}
        committees = [_with_accuracy(run, net, networks.architecture_of(name), name) for name, net in nets.items()]
        return Committee(tuple(committee.members[0] for committee in committees), file, committees[0].judged_on)
    path = Path(file)
    if path.suffix in CHECKPOINT_SUFFIXES:
        if len(architectures) > 1 or count > 1:
            raise CondenseError(
                f"teachers={file}: a checkpoint is one network; leave out committee and num_teachers, or give a file "
                "of `condense teachers`"
            )
        net = load_torch_checkpoint(path, architectures[0], task.shape, task.num_classes)
        return _with_accuracy(run, net, networks.network_name(architectures[0]), str(path.absolute()))
    named = read_teacher_file(path)
    _check_teacher_file(named, task)
    numbers = {name: sorted(k for other, k in named.keys if other == name) for name, _ in named.keys}
    names = [networks.network_name(architecture) for architecture in architectures]
    for name in names:
        if name not in numbers:
            raise CondenseError(
                f"{file}: holds no teacher of {name}, only of {', '.join(numbers)}; give committee={','.join(numbers)}"
            )
        if len(numbers[name]) < count:
            raise CondenseError(
                f"{file}: holds {len(numbers[name])} of the {count} teachers of {name}; add some with `condense "
                f"teachers --count {count}`, or give num_teachers={len(numbers[name])}"
            )
    return committee_of(named, [(name, numbers[name][k]) for k in range(count) for name in names], run.device)


def _check_teacher_file(file: TeacherFile, task: Task) -> None:
    """Checks before any work that the teachers of a file fit the data.

    Raises:
        CondenseError: they have other classes, image size or normalisation.
    """
    manifest = file.manifest
    properties = {
        "image size": (manifest["image_shape"], list(task.shape)),
        "classes": (manifest["classes"], list(task.classes)),
    }
    check_same(file.path, "teachers", properties)
    if manifest["transform"] != transform_digests(task):
        raise CondenseError(f"{file.path}: its teachers saw the data under another normalisation (zca=true or not?)")


def _network_sha256(net: networks.Network) -> str:
    """Content key of a network that this toolkit did not train, whatever the training space of the task."""
    return state_sha256(net.identity() if isinstance(net, PublicNetwork) else net.state_dict())


def _with_accuracy(run: Run, net: networks.Network, name: str, source: str) -> Committee:
    """A teacher that this toolkit did not train, with its accuracy on some test images.

    A low accuracy warns that its classes or its normalisation differ.
    """
    net, task, correct = freeze(net, run.device), run.task, 0
    ids = rng.Draws(0, "glance").sample(len(task.test), min(ACCURACY_SAMPLE, len(task.test))).sort().values
    with torch.no_grad():
        for part in ids.split(TEST_CHUNK):
            labels = torch.from_numpy(task.test.labels[part.numpy()]).to(run.device)
            logits = net(task.test_batch(part))
            if logits.shape[1] != task.num_classes:  # of other classes: only its features are used
                return Committee((Member(net, name, math.nan, sha256=_network_sha256(net)),), source, "no images")
            correct += int((logits.argmax(1) == labels).sum())
    share = correct / len(ids)
    if share < 2 / task.num_classes:
        _log.warning(
            "condense: teacher %s gets %.1f %% of the test images right: were its classes in another order, or its "
            "images normalised in another way?",
            source,
            100 * share,
        )
    member = Member(net, name, share, sha256=_network_sha256(net))
    return Committee((member,), source, f"{len(ids)} test images")


# -- teachers of a set's labels ---------------------------------------------------------------------------------------


def find_teachers(described: Mapping[str, Any]) -> Path | None:
    """Returns the file of the teachers that ``Committee.describe()`` described, also if it was moved to the cache.

    Returns None if it is not found. The contents of a checkpoint and of public weights are compared when they are read.
    """
    expected = described.get("sha256")
    if not isinstance(expected, list) or not expected:
        return None
    if combined_sha256(map(str, expected)) != described.get("content"):
        return None
    named, cache = described.get("path"), cache_dir() / "teachers"
    if isinstance(named, str) and (
        is_public(named) or (Path(named).suffix in CHECKPOINT_SUFFIXES and Path(named).is_file())
    ):
        return Path(named)
    for path in (*([Path(named)] if isinstance(named, str) else []), *sorted(cache.glob("*.h5"))):
        with contextlib.suppress(CondenseError):
            if set(expected) <= {entry["sha256"] for entry in read_teacher_file(path).entries}:
                return path
    return None


def load_teacher_ensemble(
    path: Path,
    device: torch.device,
    shape: tuple[int, int, int] | None = None,
    classes: int | None = None,
    *,
    described: Mapping[str, Any] | None = None,
    weights: Sequence[float] | None = None,
    transform: Transform | None = None,
) -> nn.Module:
    """Returns a network, in eval mode on the device, that computes the mean logits of teachers.

    Args:
        path: of their file, of a checkpoint, or a name of public weights.
        device: where it computes.
        shape: (C,H,W) that its images must have; required unless ``path`` is a file of `condense teachers`.
        classes: number of classes that it must have; required in the same cases.
        described: result of ``Committee.describe()`` for the requested teachers; None: all of the file.
        weights: of the teachers, as for :meth:`Committee.mean`.
        transform: the map to the training space of its images; required for public weights, else compared.

    Raises:
        CondenseError: the file is damaged or of other images, classes or normalisation, or holds other teachers.
    """
    file = str(path)
    different_teachers_error = CondenseError(f"{file}: holds other teachers than those that are asked for")
    expected_digests = [str(digest) for digest in (described or {}).get("sha256", [])]
    if not is_public(file) and path.suffix not in CHECKPOINT_SUFFIXES:
        recorded = read_teacher_file(path)
        manifest = recorded.manifest
        properties = {
            "image size": (manifest["image_shape"], list(shape) if shape else None),
            "number of classes": (len(manifest["classes"]), classes),
        }
        check_same(path, "teachers", properties)
        if transform is not None and manifest["transform"] != digests(transform):
            raise CondenseError(f"{file}: its teachers are of another normalisation")
        indices = {entry["sha256"]: k for k, entry in enumerate(recorded.entries)}
        if not set(expected_digests) <= set(indices):
            raise different_teachers_error
        chosen = [indices[digest] for digest in expected_digests] or range(len(recorded.entries))
        return Committee(tuple(recorded.load_member(k, device) for k in chosen)).ensemble(weights)
    names = [str(name) for name in (described or {}).get("networks", [])]
    if shape is None or classes is None or len(names) != len(file.split(",") if is_public(file) else [file]):
        raise CondenseError(
            f"{file}: only a set that was labelled by it says what it is; give a file of `condense teachers`"
        )
    if is_public(file):
        if transform is None:
            raise CondenseError(f"{file}: public weights need the normalisation of their images")
        # Their digests are compared: the number of their classes is the right one.
        nets: list[networks.Network] = [load_public_weights(name, shape, None, transform) for name in file.split(",")]
    else:
        networks.check_network(names[0])
        nets = [load_torch_checkpoint(path, names[0], shape, classes)]
    net_digests = [_network_sha256(net) for net in nets]
    if expected_digests != net_digests:
        raise different_teachers_error
    members = [
        Member(freeze(net, device), name, math.nan, sha256=digest)
        for net, name, digest in zip(nets, names, net_digests)
    ]
    return Committee(tuple(members)).ensemble(weights)
