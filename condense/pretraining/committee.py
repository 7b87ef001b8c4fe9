"""teachers, served to a method."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import statistics
import time
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
from condense.formatting import by
from condense.networks import CHECKPOINTS, Key, MeanLogits, Member, Recorded, is_public, read
from condense.networks.pretrained import load_checkpoint, load_public_network
from condense.networks.saved import digests_key, freeze, network_nbytes
from condense.pretraining.budget import agreed_plan, groups, seconds_per_step, taught
from condense.pretraining.store import Same, transform_digests
from condense.pretraining.teachers import (
    GROUP,
    NETWORK,
    Architecture,
    Squeezing,
    _check_last_batch,
    _digest,
    _record,
    _student,
    _train,
    cache_file,
)
from condense.training import TEST_CHUNK, pick_together

_log = logging.getLogger(__name__)

GLANCE = 1000
"""Most test images on which teachers of others are judged."""


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
        return digests_key(member.sha256 for member in self.members)

    def bytes(self) -> int:
        """Of all members' states."""
        return sum(network_nbytes(member.network) for member in self.members)

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


def committee_of(file: Recorded, keys: Sequence[Key], device: torch.device, source: str | None = None) -> Committee:
    """The members of ``file`` of these keys, in their order; ``source``: the file unless given."""
    places = {key: k for k, key in enumerate(file.keys)}
    members = tuple(file.member(places[key], device) for key in keys)
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

    Teachers of the cache count as the run's own work, whenever they were trained; ``preparation`` in
    the manifest states them. Of a
    time limit they take a third at most: as many whole epochs for all as fit, or one epoch for fewer of them. Named
    ones are free. ``teachers`` in the manifest describes them.

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
        run.note("teachers", committee.describe())
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
    if run.dry_run or not all(isinstance(one, str) for one in architectures):  # a name must say what is kept
        committee, from_cache = _unkept(run, shorter, source, chosen, plan.unit_steps, again), 0
        if run.dry_run:  # as large as wanted
            committee = _filled(committee, run, source, wanted)
        credited = 0.0
    else:
        keys = [(networks.name_of(one), k) for one, k in chosen]
        made = _record(run, shorter, cache_file(run, shorter), keys, again, force=True)
        committee = committee_of(made.file, keys, run.device, "")
        there = [member for member in committee.members if (member.name, member.number) not in made.trained]
        credited, from_cache = sum(member.seconds for member in there), len(there)
    run.credit(credited)
    run.note("teachers", committee.describe())
    trained = plan.networks - from_cache
    run.note("preparation", {
        "networks": plan.networks, "networks_wanted": len(wanted), "steps_each": plan.steps,
        "steps_each_wanted": squeezing.epochs * unit, "epochs": plan.units, "epochs_wanted": squeezing.epochs,
        "from_cache": from_cache,
        "seconds": round(credited + (time.monotonic() - began if trained else 0.0), 2),
    })  # fmt: skip
    return committee


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
                    freeze(net, run.device), entry["network"], entry["accuracy"], entry["seconds"], entry["number"],
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
        members.append(Member(freeze(net, run.device), networks.name_of(one), 0.0, number=k))
    return dataclasses.replace(committee, members=tuple(members))


def _named(run: Run, file: str, architectures: Sequence[Architecture], count: int) -> Committee:
    """The teachers that ``file`` names, checked against the run."""
    task = run.task
    if is_public(file):
        nets = {one: load_public_network(one, task.shape, task.num_classes, task.transform) for one in file.split(",")}
        judged = [_judged(run, net, one, one) for one, net in nets.items()]
        return Committee(tuple(one.members[0] for one in judged), file, judged[0].judged_on)
    path = Path(file)
    if path.suffix in CHECKPOINTS:
        if len(architectures) > 1 or count > 1:
            raise CondenseError(f"teachers={file}: a checkpoint is one network; leave out committee and num_teachers, "
                                "or give a file of `condense teachers`")  # fmt: skip
        net = load_checkpoint(path, architectures[0], task.shape, task.num_classes)
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
    return committee_of(named, keys, run.device)


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
    net, task, right = freeze(net, run.device), run.task, 0
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


# -- teachers of a set's labels ---------------------------------------------------------------------------------------


def find(described: Mapping[str, Any]) -> Path | None:
    """Where the teachers are that ``Committee.describe()`` told of: where they lay, or in the cache; None where they
    are gone. A checkpoint that is still there, and public weights by their name, are compared when they are read."""
    wanted = described.get("sha256")
    if not isinstance(wanted, list) or not wanted or digests_key(map(str, wanted)) != described.get("content"):
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
        nets: list[networks.Network] = [load_public_network(one, shape, classes, transform) for one in file.split(",")]
    else:
        networks.check(names[0])
        nets = [load_checkpoint(path, names[0], shape, classes)]
    found = [_digest(net.state_dict()) for net in nets]
    if wanted != found:
        raise others
    members = [
        Member(freeze(net, device), name, math.nan, sha256=digest) for net, name, digest in zip(nets, names, found)
    ]
    return Committee(tuple(members)).mean(weights)
