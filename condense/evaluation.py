"""The fair judge: students trained on a set and on control arms under one protocol, and the record of what came out."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from condense import container, networks, rng
from condense.config import build
from condense.distilled import DistilledSet
from condense.errors import CondenseError, did_you_mean
from condense.labels import HardLabels, TeacherLabels, content
from condense.protocols import OWN, Protocol, get_protocol
from condense.records import (
    SCHEMA,
    TEXT_LIMIT,
    cross_architecture,
    environment,
    known_cost,
    scores,
    summary,
    time_to_accuracy,
)
from condense.run import Ranks, device_name, pick_device, pick_precision
from condense.students import (
    STUDENT_VERSION,
    FixedSource,
    Recipe,
    Source,
    Student,
    TaskSource,
    accuracy,
    pick_together,
    train,
)
from condense.tasks import DataOptions, Task, cache_dir, load
from condense.tracking import Progress
from condense.units import by

Architecture = Callable[..., nn.Module]
CONTROLS = ("random", "random-hard", "random-bytes", "noise", "full", "full-equal")
SEARCH = -1
"""Stands for the run's number in the draws of the student that tries a learning rate."""


@dataclass(frozen=True)
class Arm:
    """One thing that students are trained on: what it is called, what identifies it, its budget, its source per run."""

    name: str
    labels: str
    """own (what the set brings) or hard."""
    identity: str
    """Digest of what the students see; with recipe, network and seed it keys the cache."""
    steps: int
    rates: tuple[float, ...]
    """Learning rates; of several, held-out real training images decide."""
    source: Callable[[Task, int], Source]
    """What run number k learns from, of this real data; made when it is trained."""
    learned: bool = False
    """Whether its learning rate is the one that was learned with the set."""
    augment: bool = True
    """Whether the protocol's augmentation is applied."""


def evaluate(
    distilled: DistilledSet,
    task: Task | Any,
    *,
    networks: str | Architecture | Sequence[str | Architecture] | None = None,
    runs: int | None = None,
    protocol: str | None = None,
    controls: Sequence[str] = ("random",),
    without_augmentation: bool = False,
    teacher: nn.Module | None = None,
    teachers: str | Path | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: str = "auto",
    cache: bool = True,
    quiet: bool = True,
) -> dict[str, Any]:
    """Trains students on the set and on control arms under one protocol and returns the record.

    Every arm gets the same recipe and number of steps (`full` its own) and, run by run, the same initial weights.
    Accuracy is that of the last step on the real test images. A learning rate that was learned with the set goes to
    the distilled arm; the controls of its size get the better of that one and the protocol's, on held-out real training
    images, as every arm does where the protocol names several. Each student is kept by content under the cache
    directory and never trained twice; a killed evaluation goes on where it was. Ranks that ``torchrun`` started share
    the students out.

    Args:
        distilled: the set to judge; its own transform is applied to the real images too.
        task: the real data, with the set's classes and image shape; or what ``condense.task`` takes.
        networks: one or several architectures, names or ``nn.Module`` factories (whose scores are not cached); the
            protocol's when None, where "own" is the one that the set was made with.
        runs: students per arm; the protocol's number when None.
        protocol: name; the one in the manifest, else dc-v1 (dc-soft-v1 for labels that are not hard), when None.
        controls: any of random (equal images per class), random-hard (these with their classes, where the protocol
            judges softer labels), random-bytes (hard-labelled 8-bit real images of the set's
            total bytes), noise, full, full-equal (full data for the distilled arm's number of steps). On the soft track
            noise gets the set's own labels, and random needs their ``teacher``.
        without_augmentation: also train the distilled and random arms without augmentation, for ARS.
        teacher: what soft or per-view labels were made by, a network in the set's training space; it labels the random
            images in the same way.
        teachers: file of the experts or teachers that they were made by, in place of ``teacher``; the one that the
            manifest names is found in the cache or where it lay.
        seed: of the students' weights, shuffles, augmentation and of the random images.
        cache: False trains everything anew and stores nothing.

    Returns:
        The record, schema ``condense.record/1``, JSON-ready.

    Raises:
        CondenseError: data that do not fit the set, unknown network, protocol or control, or out of memory.
    """
    chosen = get_protocol(protocol or _protocol(distilled))
    where = pick_device(device)
    precision = pick_precision(precision, where)
    wanted = [networks] if isinstance(networks, str) or callable(networks) else networks
    own = distilled.manifest["network"]
    architectures = list(dict.fromkeys(own if name == OWN else name for name in wanted or chosen.networks))
    runs = chosen.runs if runs is None else runs
    if not isinstance(task, Task):
        task = load(task, build(DataOptions, data_options(distilled), "the data"))
    _check(distilled, task, architectures, runs, controls)
    ranks = Ranks(where)  # before anything goes to the device, which it picks among several
    task = task.to(where, transform=distilled.transform)
    lost = ""
    if teacher is None and (teachers is not None or ("random" in controls and chosen.labels == "soft")):
        teacher, lost = recorded_teacher(distilled, teachers, where)
    judge = _Judge(task, chosen, runs, seed, where, precision, cache, quiet, ranks)
    arms, missing = _arms(judge, distilled, dict.fromkeys(controls), without_augmentation, teacher, lost)
    try:
        results = judge.results([(arm, network) for network in architectures for arm in arms])
    except (torch.OutOfMemoryError, MemoryError) as fault:
        raise CondenseError(f"out of memory on {where}: take smaller --networks, or another --device") from fault
    ranks.close()
    return _record(
        distilled,
        judge,
        results,
        missing,
        command(distilled, judge, architectures, list(controls), without_augmentation, teachers is not None),
    )


def _record(
    distilled: DistilledSet,
    judge: _Judge,
    results: list[dict[str, Any]],
    missing: list[dict[str, str]],
    asked: str,
) -> dict[str, Any]:
    """The record of what came out, with what follows from it; foreign parts of the manifest are left out."""
    manifest, kind, data = distilled.manifest, distilled.labels.kind, judge.task
    cost, made_by, own = known_cost(manifest.get("cost")), manifest.get("command"), manifest["network"]
    set_seed, needs = manifest.get("seed"), distilled.nbytes()
    return {
        "schema": SCHEMA,
        "set": {
            "name": distilled.name,
            "sha256": distilled.sha256(),
            "method": manifest["method"],
            "dataset": manifest["dataset"],
            "ipc": manifest["ipc"],
            "seed": set_seed if isinstance(set_seed, int) else None,
            "label_kind": kind,
            "network": own,
            "bytes": {**needs, "stored": needs["total"] - needs["external"]},
            "labelling": {"exactness": distilled.labels.exactness, "step_cost": distilled.labels.step_cost},
            "command": made_by if isinstance(made_by, str) and len(made_by) <= TEXT_LIMIT else None,
        },
        "data": {
            "name": data.name,
            "fingerprint": data.fingerprint,
            "same": data.fingerprint == manifest.get("data", {}).get("fingerprint"),
        },
        "protocol": {"name": judge.protocol.name, "version": judge.protocol.version, "labels": judge.protocol.labels},
        "runs": judge.runs,
        "seed": judge.seed,
        "results": results,
        "missing": missing,
        "scores": scores(results, kind),
        "cross_architecture": cross_architecture(results, own),
        "time": time_to_accuracy(results, cost),
        "cost": cost,
        "environment": environment(judge.device, judge.precision),
        "command": asked,
    }


def command(
    distilled: DistilledSet,
    judge: _Judge,
    architectures: Sequence[str | Architecture],
    controls: Sequence[str],
    without_augmentation: bool,
    teachers: bool = False,
) -> str:
    """The command line that gives this record, however it was asked for. A place to fill in is called PATH."""
    ready = "claim" in distilled.manifest
    words = ["condense", "evaluate", distilled.name if ready else distilled.file_name, "--data", data_word(judge.task)]
    words += ["--networks", ",".join(networks.name_of(network) for network in architectures)]
    words += ["--runs", str(judge.runs), "--protocol", judge.protocol.name]
    words += ["--controls", ",".join(controls) or "none"] + ["--without-augmentation"] * without_augmentation
    words += ["--teachers", "PATH"] * teachers
    words += ["--seed", str(judge.seed)] * (judge.seed != 0) + ["--precision", judge.precision]
    own = {**dataclasses.asdict(DataOptions()), **distilled.manifest.get("data", {}).get("options", {})}
    given = dataclasses.asdict(judge.task.options)
    words += [f"{key}={json.dumps(value)}" for key, value in given.items() if value != own[key] and key != "zca"]
    return shlex.join(words)


def data_word(task: Task) -> str:
    """What ``--data`` is given for this data: a registered name, or its name and a place to fill in."""
    return task.name if task.source == task.name else f"{task.name}=PATH"


def fit(
    distilled: DistilledSet,
    network: str | Architecture,
    *,
    seed: int = 0,
    device: str = "auto",
    protocol: str | None = None,
) -> networks.Network:
    """Trains one network on the set by the recipe in its manifest and returns it on the CPU, in eval mode.

    The network works in training space: give it ``distilled.transform(images)`` for images in [0,1]. Of a protocol with
    several learning rates it takes the first, because choosing needs real data.
    """
    chosen = get_protocol(protocol or _protocol(distilled))
    where = pick_device(device)
    with rng.seeded(seed, "student", 0):
        net = networks.build(network, distilled.shape, len(distilled.classes))
    source = _own_source(distilled, where)
    recipe = chosen.recipe(source.size, mirror=distilled.manifest.get("mirror", True), lr=_learned_lr(distilled))
    train(
        [Student(net, source, rng.key(seed, "run", 0))], recipe, device=where, precision=pick_precision("auto", where)
    )
    return net.cpu().eval()


def _protocol(distilled: DistilledSet) -> str:
    """The set's own protocol, else the usual one of its label track."""
    return distilled.manifest.get("protocol") or ("dc-v1" if distilled.labels.kind == "hard" else "dc-soft-v1")


# -- training and keeping ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """One student: the arm that it learns from, its network and learning rate, and the task that tests it."""

    arm: Arm
    network: str | Architecture
    rate: float
    run: int
    task: Task
    """The real data; for a search, with held-out training images in place of the test images."""


@dataclass
class _Judge:
    """Trains students through the cache, shared out over the ranks."""

    task: Task
    protocol: Protocol
    runs: int
    seed: int
    device: torch.device
    precision: str
    cache: bool
    quiet: bool
    ranks: Ranks

    @functools.cached_property
    def transform_digest(self) -> str:
        """Of the map to training space; a whitening matrix is large, so it is read once."""
        arrays = self.task.transform.arrays()
        return hashlib.sha256(b"".join(arrays[name].tobytes() for name in sorted(arrays))).hexdigest()

    def results(self, cells: Sequence[tuple[Arm, str | Architecture]]) -> list[dict[str, Any]]:
        """Accuracies of all runs of each arm on each network, as entries of the record's ``results``."""
        rates = self.rates(cells)
        jobs = [
            _Job(arm, network, rate, run, self.task)
            for (arm, network), rate in zip(cells, rates)
            for run in range(self.runs)
        ]
        scored = self.scored(jobs)
        found = []
        for number, ((arm, network), rate) in enumerate(zip(cells, rates)):
            accuracies, seconds = zip(*scored[number * self.runs : (number + 1) * self.runs])
            found.append(
                {
                    "arm": arm.name,
                    "labels": arm.labels,
                    "augment": self.recipe(arm, rate).augment is not None,
                    "network": networks.name_of(network),
                    "steps": arm.steps,
                    "lr": rate,
                    "lr_from": "held-out" if len(arm.rates) > 1 else "learned" if arm.learned else "protocol",
                    "accuracies": list(accuracies),
                    **summary(accuracies),
                    "seconds": round(sum(seconds), 2),
                }
            )
        return found

    def rates(self, cells: Sequence[tuple[Arm, str | Architecture]]) -> list[float]:
        """Each cell's learning rate; of several, the one whose student does best on held-out training images.

        Neither the choice nor the student that is trained for it sees a test image.
        """
        if all(len(arm.rates) == 1 for arm, _ in cells):
            return [arm.rates[0] for arm, _ in cells]
        inner = self.task.hold_out(self.protocol.held_out, (self.seed, "held-out"))
        jobs = [
            _Job(arm, network, rate, SEARCH, inner)
            for arm, network in cells
            if len(arm.rates) > 1
            for rate in arm.rates
        ]
        scored = iter(self.scored(jobs))
        chosen = []
        for arm, _ in cells:
            tried = [next(scored)[0] for _ in arm.rates] if len(arm.rates) > 1 else [0.0]
            chosen.append(arm.rates[tried.index(max(tried))])
        return chosen

    def recipe(self, arm: Arm, rate: float) -> Recipe:
        recipe = self.protocol.recipe(0, mirror=self.task.mirror, steps=arm.steps, lr=rate)
        return recipe if arm.augment else dataclasses.replace(recipe, augment=None)

    def scored(self, jobs: Sequence[_Job]) -> list[tuple[float, float]]:
        """Accuracy and training seconds of each job: from the cache, else trained, each by one rank."""
        known = torch.zeros(len(jobs), 3, dtype=torch.float64)
        if self.ranks.leads:  # one rank looks, so that all agree on what is to be done
            for row, job in zip(known, jobs):
                entry = _read_score(self._path(job)) if self._cached(job) else None
                if entry is not None:
                    row[:] = torch.tensor([*entry, 1.0], dtype=torch.float64)
        known = self._shared(known)
        trained = torch.zeros_like(known)
        todo = [number for number in range(len(jobs)) if not known[number, 2]]
        for turn, unit in enumerate(self._units(jobs, todo)):
            if turn % self.ranks.world != self.ranks.rank:
                continue
            for number, entry in zip(unit, self._train([jobs[number] for number in unit])):
                trained[number] = torch.tensor([*entry, 1.0], dtype=torch.float64)
                if self._cached(jobs[number]):
                    _write_score(self._path(jobs[number]), entry)
        return [(row[0], row[1]) for row in (known + self._shared(trained)).tolist()]

    def _shared(self, table: torch.Tensor) -> torch.Tensor:
        """The sum of the ranks' tables."""
        if self.ranks.world == 1:
            return table
        table = table.to(self.device)
        self.ranks.sum(table)
        return table.cpu()

    def _units(self, jobs: Sequence[_Job], todo: Sequence[int]) -> list[list[int]]:
        """Jobs that are trained at once: one by one on a CPU; else the runs of a cell, in as many parts as ranks."""
        if not pick_together(self.device):
            return [[number] for number in todo]
        cells: dict[Any, list[int]] = {}
        for number in todo:
            job = jobs[number]
            cells.setdefault((job.arm, job.network, job.rate, id(job.task)), []).append(number)
        parts = [cell[rank :: self.ranks.world] for cell in cells.values() for rank in range(self.ranks.world)]
        return [part for part in parts if part]

    def _train(self, jobs: Sequence[_Job]) -> list[tuple[float, float]]:
        """Jobs of one arm and network with one learning rate: accuracy and training seconds of each."""
        first = jobs[0]
        recipe = self.recipe(first.arm, first.rate)
        students = []
        for job in jobs:
            with rng.seeded(self.seed, "student", job.run):
                net = networks.build(job.network, self.task.shape, self.task.num_classes)
            students.append(Student(net, job.arm.source(job.task, job.run), rng.key(self.seed, "run", job.run)))
        which = f"run {first.run + 1} of {self.runs}" if len(jobs) == 1 else f"{len(jobs)} runs"
        which = f"trying lr {first.rate:g}" if first.run == SEARCH else which
        progress = Progress(
            f"{first.arm.name} on {networks.name_of(first.network)}, {which}",
            len(students) * recipe.steps,
            quiet=self.quiet or not self.ranks.leads,
        )
        checkpoint = self._path(first).with_suffix(".part") if self._cached(first) else None
        seconds = train(
            students, recipe, device=self.device, precision=self.precision, checkpoint=checkpoint,
            report=progress.update,
        )  # fmt: skip
        progress.close()
        return [
            (accuracy(s.network, job.task, device=self.device, precision=self.precision), round(seconds / len(jobs), 3))
            for s, job in zip(students, jobs)
        ]

    def _cached(self, job: _Job) -> bool:
        return self.cache and isinstance(job.network, str)  # a factory's name does not say what it builds

    def _path(self, job: _Job) -> Path:
        """Where the score of one student is kept; everything that can change it is in the name."""
        recipe = self.recipe(job.arm, job.rate)
        parts = [
            job.arm.identity, {**recipe.known(), "augment": str(recipe.augment)},
            networks.name_of(job.network), networks.library_version(job.network), job.run,
            self.protocol.held_out if job.run == SEARCH else None, self.seed, self.task.fingerprint,
            self.transform_digest, self.precision, device_name(self.device), torch.backends.cudnn.allow_tf32,
            pick_together(self.device), rng.HASH_VERSION, STUDENT_VERSION, torch.__version__,
        ]  # fmt: skip
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
        return cache_dir() / "students" / digest[:2] / f"{digest}.json"


def _read_score(path: Path) -> tuple[float, float] | None:
    try:
        entry = json.loads(path.read_text())
        return float(entry["accuracy"]), float(entry["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_score(path: Path, entry: tuple[float, float]) -> None:
    """Atomic; a cache that cannot be written costs time, not the result."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(dict(zip(("accuracy", "seconds"), entry))))
        os.replace(temporary, path)
    except OSError as fault:
        print(f"condense: the score cache cannot be written ({fault}); going on without it", file=sys.stderr)


# -- arms -------------------------------------------------------------------------------------------------------------


def _learned_lr(distilled: DistilledSet) -> float | None:
    return distilled.manifest.get("learned_lr")


def _own_source(distilled: DistilledSet, device: torch.device) -> FixedSource:
    images, ids = distilled.training_images()
    return FixedSource(images.to(device), distilled.labels.to(device), ids)


def _hard_source(distilled: DistilledSet, device: torch.device) -> FixedSource:
    """The set's images with the class of each in place of its labels."""
    images, ids = distilled.training_images()
    labels = HardLabels(distilled.hard_labels(), len(distilled.classes)).to(device)
    return FixedSource(images.to(device), labels, ids)


def _arms(
    judge: _Judge,
    distilled: DistilledSet,
    controls: Iterable[str],
    without_augmentation: bool,
    teacher: nn.Module | None,
    lost: str = "",
) -> tuple[list[Arm], list[dict[str, str]]]:
    """The arms to train, the distilled ones first, and which cannot be had and why."""
    controls, kind, protocol = list(controls), distilled.labels.kind, judge.protocol
    ipc, learned = int(distilled.manifest["ipc"]), _learned_lr(distilled)
    steps, rates = protocol.budget(len(distilled)), tuple(protocol.lr)
    both = rates if learned is None or learned in rates else (*rates, learned)
    taught = rates if learned is None else (learned,)
    own_source = _own_source(distilled, judge.device)
    own = Arm("distilled", "own", distilled.sha256(), steps, taught, lambda *_: own_source, learned is not None)
    hard = own
    if kind != "hard":
        hard_source = _hard_source(distilled, judge.device)
        identity = f"{distilled.sha256()}-hard"
        hard = dataclasses.replace(own, labels="hard", identity=identity, source=lambda *_: hard_source)
    missing = []
    dropped = kind != "hard" and protocol.labels == "hard"
    main = hard if dropped else own
    arms = [main]
    if dropped:
        why = f"{protocol.name} judges hard labels; take a protocol of the soft track, e.g. dc-soft-v1"
        missing.append({"arm": f"distilled with its {kind} labels", "why": why})
    elif kind != "hard" and "full" in controls:
        arms.append(hard)  # HLR compares hard labels with hard labels
    label = main.labels
    soft = label == "own" and kind != "hard"
    if isinstance(distilled.labels, TeacherLabels) and (teacher is None or kind == "projector"):
        teacher = distilled.labels.teacher
    for control in controls:
        if control == "random" and soft:
            if teacher is None:
                why = f"no teacher that gives random images {kind} labels" + (f" ({lost})" if lost else "")
                missing.append({"arm": control, "why": why})
                continue
            identity = f"random-{ipc}-{kind}-{content(teacher.state_dict())}-{distilled.labels.rule()}"
            make = functools.partial(_taught_source, judge.seed, ipc, distilled, teacher)
            arms.append(Arm(control, label, identity, steps, both, make))
        elif control == "noise" and soft:
            make = functools.partial(_soft_noise_source, judge.seed, distilled)
            arms.append(Arm(control, label, f"noise-for-{distilled.sha256()}", steps, both, make))
        elif control in ("random", "noise"):
            smoothing = getattr(distilled.labels, "smoothing", 0.0)
            make = functools.partial(
                _random_source if control == "random" else _noise_source, judge.seed, ipc, smoothing
            )
            identity = f"{control}-{ipc}" + (f"-smoothing{smoothing}" if smoothing else "")
            arms.append(Arm(control, label, identity, steps, both, make))
        elif control == "random-hard":
            make = functools.partial(_random_source, judge.seed, ipc, 0.0)
            arms.append(Arm(control, "hard", f"random-{ipc}", steps, both, make))
        elif control == "random-bytes":
            count = _equal_count(distilled)
            make = functools.partial(_random_bytes_source, judge.seed, count)
            arms.append(Arm(control, "hard", f"{control}-{count}", steps, both, make))
        else:
            epochs = protocol.full_epochs * math.ceil(len(judge.task.train) / protocol.batch)
            budget = max(epochs, steps) if control == "full" else steps
            arms.append(Arm(control, "hard", "full", budget, rates, lambda task, run: TaskSource(task, judge.device)))
    if without_augmentation and soft and distilled.labels.per_view:
        missing.append({"arm": "distilled without augmentation", "why": f"{kind} labels belong to augmented views"})
    elif without_augmentation:
        arms += [
            dataclasses.replace(arm, augment=False)
            for arm in arms
            if arm.name in ("distilled", "random") and arm.labels == label
        ]
    return arms, missing


def recorded_teacher(
    distilled: DistilledSet, teachers: str | Path | None, device: torch.device
) -> tuple[nn.Module | None, str]:
    """The mean of the experts or teachers that soft labels came from, or None and why there is none.

    Raises:
        CondenseError: ``teachers`` cannot serve.
    """
    from condense import trajectories

    source = distilled.manifest.get("label_source", {})
    known = source.get("experts", {})
    given = teachers is not None and container.format_of(Path(teachers)) != trajectories.FORMAT.name
    if "teachers" in source or (given and not known):
        return _squeezed_teacher(distilled, source, teachers, device)
    asked = {"count": known.get("count"), "epoch": source.get("epoch", -1)}
    if teachers is not None:
        file = trajectories.read(Path(teachers))
        if known and file.content(known["count"], known["epochs"]) != known["content"]:
            raise CondenseError(f"--teachers {teachers}: not the experts that the set's labels came from")
        return trajectories.teacher(file.path, device, distilled.shape, len(distilled.classes), **asked), ""
    path = trajectories.find(known)
    if path is None:
        return None, "the experts that its labels came from are not found; give --teachers FILE" if known else ""
    try:
        return trajectories.teacher(path, device, distilled.shape, len(distilled.classes), **asked), ""
    except CondenseError as fault:
        return None, str(fault)


def _squeezed_teacher(
    distilled: DistilledSet, source: dict[str, Any], teachers: str | Path | None, device: torch.device
) -> tuple[nn.Module | None, str]:
    """The weighted mean of teachers kept whole, or None and why there is none.

    Raises:
        CondenseError: ``teachers`` cannot serve.
    """
    from condense import teachers as kept

    known = source.get("teachers") or {}
    path = kept.find(known) if teachers is None else Path(teachers)
    if path is None:
        return None, "the teachers that its labels came from are not found; give --teachers FILE"
    try:
        found = kept.teacher(
            path, device, distilled.shape, len(distilled.classes), described=known, weights=source.get("weights"),
            transform=distilled.transform,
        )  # fmt: skip
        return found, ""
    except CondenseError as fault:
        if teachers is not None:
            raise CondenseError(f"--teachers {fault}") from fault
        return None, str(fault)


def _random_source(seed: int, ipc: int, smoothing: float, task: Task, run: int) -> FixedSource:
    images, classes = task.per_class(ipc, (seed, "random-arm", run))
    return FixedSource(images, HardLabels(classes, task.num_classes, smoothing))


def _noise_source(seed: int, ipc: int, smoothing: float, task: Task, run: int) -> FixedSource:
    classes = torch.arange(task.num_classes).repeat_interleave(ipc)
    noise = torch.randn((len(classes), *task.shape), generator=rng.generator(seed, "noise-arm", run))
    return FixedSource(noise.to(task.device), HardLabels(classes.to(task.device), task.num_classes, smoothing))


def _taught_source(
    seed: int, ipc: int, distilled: DistilledSet, teacher: nn.Module, task: Task, run: int
) -> FixedSource:
    """Random real images with labels that the set's teacher gives them in the set's own way."""
    images, classes = task.per_class(ipc, (seed, "random-arm", run))
    views = rng.key(seed, "views", run)
    return FixedSource(images, distilled.labels.anew(images, teacher.to(images.device), views, classes))


def _soft_noise_source(seed: int, distilled: DistilledSet, task: Task, run: int) -> FixedSource:
    """Noise images, as many as the set decodes into, with its own labels; live teachers are asked about the noise."""
    ids = distilled.training_images()[1]
    noise = torch.randn((len(ids), *task.shape), generator=rng.generator(seed, "noise-arm", run))
    return FixedSource(noise.to(task.device), distilled.labels.to(task.device), ids)


def _equal_count(distilled: DistilledSet) -> int:
    """How many hard-labelled 8-bit images of the set's shape fit into its bytes."""
    label_bits = math.ceil(math.log2(len(distilled.classes)))
    return max(1, 8 * distilled.nbytes()["total"] // (8 * math.prod(distilled.shape) + label_bits))


def _random_bytes_source(seed: int, count: int, task: Task, run: int) -> FixedSource:
    """``count`` real images, as evenly over the classes as they go; all of them where there are not so many."""
    order = rng.Draws(seed, "random-bytes-classes", run).permutation(task.num_classes).tolist()
    wanted = _even_shares(min(count, len(task.train)), task.counts[order].tolist())
    parts = (seed, "random-bytes-arm", run)
    ids = torch.cat([task.sample_ids(share, parts, [c]) for share, c in sorted(zip(wanted, order), key=lambda p: p[1])])
    labels = torch.from_numpy(task.train.labels[ids.numpy()]).to(task.device)
    return FixedSource(task.batch(ids), HardLabels(labels, task.num_classes))


def _even_shares(total: int, room: Sequence[int]) -> list[int]:
    """``total`` shared out evenly, none above its ``room``; what does not divide goes to the first ones with room."""
    shares = [0] * len(room)
    while total:
        able = [i for i, most in enumerate(room) if shares[i] < most]
        share = max(1, total // len(able))
        for i in able:
            more = min(share, room[i] - shares[i], total)
            shares[i] += more
            total -= more
    return shares


# -- checks -----------------------------------------------------------------------------------------------------------


def data_options(distilled: DistilledSet) -> dict[str, Any]:
    """How the set's own data were loaded; the set brings its own transform, so whitening is not fitted again."""
    return {**distilled.manifest.get("data", {}).get("options", {}), "zca": False}


def _check(
    distilled: DistilledSet,
    task: Task,
    architectures: Sequence[str | Architecture],
    runs: int,
    controls: Sequence[str],
) -> None:
    if tuple(task.classes) != distilled.classes:
        raise CondenseError(
            f"--data {task.name}: has the classes {_few(task.classes)}, the set was made for "
            f"{_few(distilled.classes)}; give the data that it was made from"
        )
    if task.shape != distilled.shape:
        raise CondenseError(
            f"--data {task.name}: images are {by(task.shape)}, those of the set {by(distilled.shape)}; "
            "give the data that it was made from, or resize="
        )
    if runs < 1:
        raise CondenseError(f"--runs {runs}: must be at least 1")
    for control in controls:
        check_control(control)
    for network in architectures:
        if isinstance(network, str) and network.startswith(networks.FACTORY):
            raise CondenseError(
                f"{distilled.name} was made with a network given in Python; name others with --networks"
            )
        networks.check(network)
        with rng.seeded("check"):  # one that does not fit the images is refused before any arm is trained
            networks.build(network, task.shape, task.num_classes)


def check_control(name: str) -> None:
    """Refuses what is no control arm."""
    if name not in CONTROLS:
        raise CondenseError(f"--controls {name}: unknown{did_you_mean(name, CONTROLS)}")


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{len(names)} ({shown}{', ...' if len(names) > 3 else ''})"
