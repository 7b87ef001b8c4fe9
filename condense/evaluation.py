"""The fair judge: protocols, control arms under the same budget and labels, and the record of what came out."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import condense
from condense import networks, rng
from condense.augment import dsa
from condense.config import build, packaged, read_yaml
from condense.distilled import DistilledSet, replacing
from condense.errors import CondenseError, did_you_mean
from condense.labels import HardLabels
from condense.run import device_name, peak_memory, pick_device, pick_precision
from condense.students import FixedSource, Recipe, Source, Student, TaskSource, accuracy, pick_together, train
from condense.tasks import DataOptions, Task, cache_dir, load
from condense.tracking import Progress

SCHEMA = "condense.record/1"
STUDENT_VERSION = 1
"""Raised by every change of networks, augmentation or training that alters a student; cached scores depend on it."""
Architecture = Callable[..., nn.Module]
CONTROLS = ("random", "noise", "full", "full-equal")


@dataclass(frozen=True)
class Protocol:
    """How students are trained and judged; a versioned YAML file in ``benchmarks/protocols``."""

    name: str
    """Name with its version, e.g. dc-v1."""
    version: int
    """Raised by every change that alters scores."""
    summary: str
    """One line for people."""
    labels: str
    """Label track: hard or soft."""
    steps: int
    """Optimizer steps for every started ``per_images`` training images."""
    per_images: int
    """See ``steps``."""
    batch: int
    """Images per step."""
    lr: float
    """Learning rate of SGD, unless the set carries a learned one."""
    momentum: float
    """Momentum of SGD."""
    weight_decay: float
    """L2 penalty."""
    drops: list[float]
    """Fractions of the budget after which the learning rate drops."""
    drop_factor: float
    """Factor of each drop."""
    augment: str
    """DSA operations joined by _, or none."""
    full_epochs: int
    """Passes over the real data for the `full` arm, which never makes fewer steps than the distilled arm."""
    runs: int
    """Networks trained per arm unless told otherwise."""

    def recipe(self, size: int, *, mirror: bool, steps: int | None = None, lr: float | None = None) -> Recipe:
        """The student recipe for a set of ``size`` images; ``steps`` and ``lr`` replace the protocol's own."""
        return Recipe(
            steps=steps or self.steps * math.ceil(size / self.per_images),
            batch=self.batch,
            lr=lr or self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            drops=tuple(self.drops),
            drop_factor=self.drop_factor,
            augment=dsa(self.augment, mirror=mirror),
        )


@functools.cache
def protocols() -> dict[str, Protocol]:
    """Every packaged protocol by name."""
    found = {}
    for entry in packaged("benchmarks/protocols"):
        protocol = build(Protocol, read_yaml(entry.read_text(), entry.name), entry.name)
        found[protocol.name] = protocol
    return found


def get_protocol(name: str) -> Protocol:
    """The protocol called ``name``.

    Raises:
        CondenseError: unknown; suggests the nearest.
    """
    if name not in protocols():
        raise CondenseError(f"unknown protocol '{name}'{did_you_mean(name, protocols())}")
    return protocols()[name]


@dataclass(frozen=True)
class Arm:
    """One thing that students are trained on: what it is called, what identifies it, and its source per run."""

    name: str
    labels: str
    identity: str
    """Digest of what the students see; with protocol, network and seed it keys the cache."""
    recipe: Recipe
    source: Callable[[int], Source]
    """What run number k learns from; made when it is trained."""


def evaluate(
    distilled: DistilledSet,
    task: Task | Any,
    *,
    networks: str | Architecture | Sequence[str | Architecture] | None = None,
    runs: int | None = None,
    protocol: str | None = None,
    controls: Sequence[str] = ("random",),
    seed: int = 0,
    device: str = "auto",
    precision: str = "auto",
    cache: bool = True,
    quiet: bool = True,
) -> dict[str, Any]:
    """Trains students on the set and on control arms under one protocol and returns the record.

    Every arm gets the same recipe and number of steps (`full` its own) and, run by run, the same initial weights.
    Accuracy is that of the last step on the real test images. Control arms, and the set itself, are kept by content
    under the cache directory and never trained twice.

    Args:
        distilled: the set to judge; its own transform is applied to the real images too.
        task: the real data, with the set's classes and image shape; or what ``condense.task`` takes.
        networks: one or several architectures, names or ``nn.Module`` factories (whose scores are not cached); the one
            that the set was made with when None.
        runs: students per arm; the protocol's number when None.
        protocol: name; the one in the manifest, else dc-v1, when None.
        controls: any of random, noise, full, full-equal.
        seed: of the students' weights, shuffles, augmentation and of the random images.
        cache: False trains everything anew and stores nothing.

    Returns:
        The record, schema ``condense.record/1``, JSON-ready.

    Raises:
        CondenseError: data that do not fit the set, unknown network, protocol or control.
    """
    chosen = get_protocol(protocol or distilled.manifest.get("protocol") or "dc-v1")
    where = pick_device(device)
    precision = pick_precision(precision, where)
    wanted = [networks] if isinstance(networks, str) or callable(networks) else networks
    architectures = list(wanted or [distilled.manifest["network"]])
    runs = chosen.runs if runs is None else runs
    if not isinstance(task, Task):
        task = load(task, _options(distilled))
    _check(distilled, task, architectures, runs, controls)
    task = task.to(where, transform=distilled.transform)
    mirror = distilled.manifest.get("mirror", task.mirror)
    judge = _Judge(task, chosen, mirror, runs, seed, where, precision, cache, quiet)
    arms = [_distilled_arm(judge, distilled)]
    missing = []
    for control in dict.fromkeys(controls):
        arm = _control_arm(judge, distilled, control)
        if isinstance(arm, Arm):
            arms.append(arm)
        else:
            missing.append({"arm": control, "why": arm})
    results = [judge.score(arm, network) for network in architectures for arm in arms]
    return {
        "schema": SCHEMA,
        "set": {
            "name": distilled.name,
            "sha256": distilled.sha256(),
            "method": distilled.manifest["method"],
            "dataset": distilled.manifest["dataset"],
            "ipc": distilled.manifest["ipc"],
            "label_kind": distilled.labels.kind,
            "bytes": distilled.nbytes(),
        },
        "data": {
            "name": task.name,
            "fingerprint": task.fingerprint,
            "same": task.fingerprint == distilled.manifest.get("data", {}).get("fingerprint"),
        },
        "protocol": {"name": chosen.name, "version": chosen.version},
        "runs": runs,
        "seed": seed,
        "results": results,
        "missing": missing,
        "scores": scores(results),
        "cost": distilled.manifest.get("cost", {}),
        "environment": environment(where, precision),
        "command": shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]]),
    }


def fit(
    distilled: DistilledSet,
    network: str | Architecture,
    *,
    seed: int = 0,
    device: str = "auto",
    protocol: str | None = None,
) -> networks.Network:
    """Trains one network on the set by the recipe in its manifest and returns it on the CPU, in eval mode.

    The network works in training space: give it ``distilled.transform(images)`` for images in [0,1].
    """
    chosen = get_protocol(protocol or distilled.manifest.get("protocol") or "dc-v1")
    where = pick_device(device)
    with rng.seeded(seed, "student", 0):
        net = networks.build(network, distilled.shape, len(distilled.classes))
    images, ids = distilled.training_images()
    source = FixedSource(images.to(where), distilled.labels.to(where), ids)
    recipe = chosen.recipe(len(images), mirror=distilled.manifest.get("mirror", True), lr=_learned_lr(distilled))
    train(
        [Student(net, source, rng.key(seed, "run", 0))], recipe, device=where, precision=pick_precision("auto", where)
    )
    return net.cpu().eval()


# -- arms -------------------------------------------------------------------------------------------------------------


@dataclass
class _Judge:
    """Trains arms run by run, through the cache."""

    task: Task
    protocol: Protocol
    mirror: bool
    runs: int
    seed: int
    device: torch.device
    precision: str
    cache: bool
    quiet: bool

    def recipe(self, size: int, **changes: Any) -> Recipe:
        return self.protocol.recipe(size, mirror=self.mirror, **changes)

    def score(self, arm: Arm, network: str | Architecture) -> dict[str, Any]:
        """Accuracies of all runs of an arm on one architecture, as an entry of the record's ``results``."""
        paths = [self._path(arm, network, run) for run in range(self.runs)]
        cache = self.cache and isinstance(network, str)  # a factory's name does not say what it builds
        known = [_read_score(path) if cache else None for path in paths]
        todo = [run for run, entry in enumerate(known) if entry is None]
        for runs in [todo] if pick_together(self.device) and todo else [[run] for run in todo]:
            for run, entry in zip(runs, self._train(arm, network, runs)):
                known[run] = entry
                if cache:
                    _write_score(paths[run], entry)
        done = [entry for entry in known if entry is not None]
        accuracies = [entry["accuracy"] for entry in done]
        return {
            "arm": arm.name,
            "labels": arm.labels,
            "augment": arm.recipe.augment is not None,
            "network": networks.name_of(network),
            "steps": arm.recipe.steps,
            "accuracies": accuracies,
            **summary(accuracies),
            "seconds": round(sum(entry["seconds"] for entry in done), 2),
        }

    def _train(self, arm: Arm, network: str | Architecture, runs: list[int]) -> list[dict[str, float]]:
        students = []
        for run in runs:
            with rng.seeded(self.seed, "student", run):
                net = networks.build(network, self.task.shape, self.task.num_classes)
            students.append(Student(net, arm.source(run), rng.key(self.seed, "run", run)))
        which = f"run {runs[0] + 1} of {self.runs}" if len(runs) == 1 else f"{len(runs)} runs"
        progress = Progress(
            f"{arm.name} on {networks.name_of(network)}, {which}", len(students) * arm.recipe.steps, quiet=self.quiet
        )
        began = time.monotonic()
        train(students, arm.recipe, device=self.device, precision=self.precision, report=progress.update)
        progress.close()
        accuracies = [accuracy(s.network, self.task, device=self.device, precision=self.precision) for s in students]
        seconds = (time.monotonic() - began) / len(students)
        return [{"accuracy": accuracy, "seconds": round(seconds, 3)} for accuracy in accuracies]

    def _path(self, arm: Arm, network: str | Architecture, run: int) -> Path:
        """Where the score of one student is kept; everything that can change it is in the name."""
        protocol = dataclasses.asdict(self.protocol)
        protocol = {key: value for key, value in protocol.items() if key not in ("summary", "runs")}
        recipe = {**dataclasses.asdict(arm.recipe), "augment": str(arm.recipe.augment)}
        parts = [
            arm.identity, protocol, recipe, networks.name_of(network), run, self.seed, self.task.fingerprint,
            _digest(self.task.transform), self.precision, self.device.type, pick_together(self.device),
            rng.HASH_VERSION, STUDENT_VERSION, torch.__version__,
        ]  # fmt: skip
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
        return cache_dir() / "students" / digest[:2] / f"{digest}.json"


def _digest(transform: Any) -> str:
    arrays = transform.arrays()
    return hashlib.sha256(b"".join(arrays[name].tobytes() for name in sorted(arrays))).hexdigest()


def _read_score(path: Path) -> dict[str, float] | None:
    try:
        entry = json.loads(path.read_text())
        return {"accuracy": float(entry["accuracy"]), "seconds": float(entry["seconds"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_score(path: Path, entry: dict[str, float]) -> None:
    """Atomic; a cache that cannot be written costs time, not the result."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(entry))
        os.replace(temporary, path)
    except OSError as fault:
        print(f"condense: the score cache cannot be written ({fault}); going on without it", file=sys.stderr)


def _options(distilled: DistilledSet) -> DataOptions:
    """How the set's own data were loaded; the set brings its own transform, so whitening is not fitted again."""
    options = distilled.manifest.get("data", {}).get("options", {})
    return build(DataOptions, {**options, "zca": False}, "the data")


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
            f"--data {task.name}: images are {_size(task.shape)}, those of the set {_size(distilled.shape)}; "
            "give the data that it was made from, or resize="
        )
    if runs < 1:
        raise CondenseError(f"--runs {runs}: must be at least 1")
    for control in controls:
        if control not in CONTROLS:
            raise CondenseError(f"--controls {control}: unknown{did_you_mean(control, CONTROLS)}")
    for network in architectures:
        if isinstance(network, str) and network.startswith(networks.FACTORY):
            raise CondenseError(
                f"{distilled.name} was made with a network given in Python; name others with --networks"
            )
        networks.check(network)
        with rng.seeded("check"):  # one that does not fit the images is refused before any arm is trained
            networks.build(network, task.shape, task.num_classes)


def _size(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{len(names)} ({shown}{', ...' if len(names) > 3 else ''})"


def _learned_lr(distilled: DistilledSet) -> float | None:
    return distilled.manifest.get("learned_lr")


def _distilled_arm(judge: _Judge, distilled: DistilledSet) -> Arm:
    images, ids = distilled.training_images()
    labels = distilled.labels.to(judge.device)
    source = FixedSource(images.to(judge.device), labels, ids)
    recipe = judge.recipe(len(images), lr=_learned_lr(distilled))
    return Arm("distilled", "own", distilled.sha256(), recipe, lambda run: source)


def _control_arm(judge: _Judge, distilled: DistilledSet, control: str) -> Arm | str:
    """A control arm, or why it cannot be had. Arms with the set's labels need a source of such labels."""
    task, ipc = judge.task, int(distilled.manifest["ipc"])
    equal = judge.recipe(len(distilled)).steps
    if control in ("full", "full-equal"):
        source = TaskSource(task, judge.device)
        epochs = judge.protocol.full_epochs * math.ceil(source.size / judge.protocol.batch)
        steps = max(epochs, equal) if control == "full" else equal
        return Arm(control, "hard", control, judge.recipe(source.size, steps=steps), lambda run: source)
    if distilled.labels.kind != "hard":
        return f"no source of {distilled.labels.kind} labels for these images"
    make = _random_source if control == "random" else _noise_source
    recipe = judge.recipe(ipc * task.num_classes, steps=equal)
    return Arm(control, "own", f"{control}-{ipc}", recipe, lambda run: make(judge, ipc, run))


def _random_source(judge: _Judge, ipc: int, run: int) -> FixedSource:
    images, classes = judge.task.per_class(ipc, (judge.seed, "random-arm", run))
    classes = classes.to(judge.device)
    return FixedSource(images, HardLabels(classes, judge.task.num_classes))


def _noise_source(judge: _Judge, ipc: int, run: int) -> FixedSource:
    classes = torch.arange(judge.task.num_classes).repeat_interleave(ipc)
    noise = torch.randn((len(classes), *judge.task.shape), generator=rng.generator(judge.seed, "noise-arm", run))
    return FixedSource(noise.to(judge.device), HardLabels(classes.to(judge.device), judge.task.num_classes))


# -- numbers ----------------------------------------------------------------------------------------------------------


def summary(accuracies: Sequence[float]) -> dict[str, Any]:
    """Mean, sample standard deviation and 95 % t-interval of the mean (None for both with a single run)."""
    mean = statistics.fmean(accuracies)
    if len(accuracies) < 2:
        return {"mean": mean, "std": None, "ci95": None}
    from scipy.stats import t

    std = statistics.stdev(accuracies)
    half = float(t.ppf(0.975, len(accuracies) - 1)) * std / math.sqrt(len(accuracies))
    return {"mean": mean, "std": std, "ci95": [mean - half, mean + half]}


def scores(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """DD-Ranking's scores per network, on fractions, from the arms that were run.

    IOR = distilled - random; HLR = full - distilled (hard labels); LRS = (e^a - e^-1) / (e - e^-1),
    a = (IOR - HLR) / 2.
    """
    found: dict[str, Any] = {}
    for network in dict.fromkeys(entry["network"] for entry in results):
        means = {entry["arm"]: entry["mean"] for entry in results if entry["network"] == network}
        values = {}
        if "random" in means:
            values["IOR"] = means["distilled"] - means["random"]
        if "full" in means:
            values["HLR"] = means["full"] - means["distilled"]
        if len(values) == 2:
            alpha = 0.5 * values["IOR"] - 0.5 * values["HLR"]
            values["LRS"] = (math.exp(alpha) - math.exp(-1)) / (math.e - math.exp(-1))
        found[network] = values
    return found


def environment(device: torch.device, precision: str) -> dict[str, Any]:
    """Versions and machine, for the record."""
    return {
        "condense": condense.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "precision": precision,
        "tf32": device.type == "cuda" and torch.backends.cudnn.allow_tf32,
        "peak_memory": peak_memory(device),
    }


def table(record: dict[str, Any]) -> str:
    """The record's results as lines for a terminal."""
    rows = [("network", "arm", "runs", "accuracy", "95 % interval", "steps", "seconds")]
    for entry in record["results"]:
        std = "" if entry["std"] is None else f" ± {100 * entry['std']:.1f}"
        interval = "" if entry["ci95"] is None else "{:.1f} to {:.1f}".format(*(100 * bound for bound in entry["ci95"]))
        rows.append(
            (
                entry["network"],
                entry["arm"],
                str(len(entry["accuracies"])),
                f"{100 * entry['mean']:.1f} %{std}",
                interval,
                str(entry["steps"]),
                f"{entry['seconds']:.1f}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    for network, values in record["scores"].items():
        if values:
            lines.append(f"{network}: " + ", ".join(f"{name} {value:+.3f}" for name, value in values.items()))
    for entry in record["missing"]:
        lines.append(f"arm {entry['arm']} is missing: {entry['why']}")
    return "\n".join(lines)


def write_record(record: dict[str, Any], path: Path) -> None:
    """Writes the record as indented JSON, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n")
