"""The fair judge: students trained on a set and on control arms under one protocol, and the record of what came out."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from condense import networks, rng
from condense.commands import data_word
from condense.config import build
from condense.data import DataOptions, Task, load
from condense.device import pick_device, pick_precision
from condense.errors import CondenseError
from condense.formatting import by
from condense.judge.arms import Architecture, _arms, _learned_lr, _own_source, check_control
from condense.judge.label_source import recorded_teacher
from condense.judge.protocol import OWN, get_protocol
from condense.judge.records import SCHEMA, TEXT_LIMIT, environment, known_cost
from condense.judge.scoring import cross_architecture, scores, summary, time_to_accuracy
from condense.judge.students import _Judge
from condense.ranks import Ranks
from condense.sets import DistilledSet
from condense.training import Student, train


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


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{len(names)} ({shown}{', ...' if len(names) > 3 else ''})"


def accuracy_lost(distilled: DistilledSet, rounded: DistilledSet, task: Task | Any, **how: Any) -> dict[str, Any]:
    """Accuracies of students trained on both sets from the same weights, on the network that the set was made with.

    Args:
        distilled: the set.
        rounded: the same images after rounding.
        task: the real data.
        how: what ``evaluate`` takes besides.

    Returns:
        ``before`` and ``after`` (mean accuracies), ``difference`` (after - before) and its ``ci95``, the t-interval of
        the paired differences (None for one run), and ``runs``.
    """
    how = {"networks": distilled.manifest["network"], "controls": [], **how}
    before, after = (evaluate(which, task, **how)["results"][0]["accuracies"] for which in (distilled, rounded))
    difference = summary([b - a for a, b in zip(before, after)])
    return {
        "before": sum(before) / len(before),
        "after": sum(after) / len(after),
        "difference": difference["mean"],
        "ci95": difference["ci95"],
        "runs": len(before),
    }
