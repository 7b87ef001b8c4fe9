"""``condense.evaluate`` and ``condense.fit``: students trained on a set, and the record of the results."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from condense import networks, rng
from condense.commands import data_argument
from condense.config import build_config, whole_number
from condense.data import PRUNING_OPTIONS, DataOptions, Task, load_task
from condense.device import out_of_memory_advice, pick_device, pick_precision
from condense.errors import CondenseError
from condense.formatting import by
from condense.judge.arms import NetworkFactory, check_control, learned_lr, make_arms, own_source
from condense.judge.label_source import find_label_teacher
from condense.judge.protocol import OWN, Protocol, get_protocol
from condense.judge.records import RECORD_SCHEMA, describe_set, environment, valid_cost
from condense.judge.scoring import compute_scores, cross_architecture, summary, time_to_accuracy
from condense.judge.students import Evaluator
from condense.judge.transfer import (
    TransferJudge,
    check_transfer,
    judge_transfer,
    pretraining_rules,
    transfer_tasks,
)
from condense.networks import calibrate
from condense.plugins import missing_plugins, plugin_versions
from condense.ranks import Ranks
from condense.sets import DistilledSet, check_set
from condense.training import Student, train

MAX_CURVE_POINTS = 100
"""Maximum number of tests during the training of a student."""


def evaluate(
    distilled: DistilledSet,
    task: Task | Any,
    *,
    networks: str | NetworkFactory | Sequence[str | NetworkFactory] | None = None,
    runs: int | None = None,
    protocol: str | None = None,
    controls: Sequence[str] = ("random",),
    without_augmentation: bool = False,
    teacher: nn.Module | None = None,
    teachers: str | Path | None = None,
    classes: Sequence[str] | None = None,
    curve: Sequence[float] = (),
    transfer: Sequence[Task | Any] = (),
    seed: int = 0,
    device: str = "auto",
    precision: str = "auto",
    cache: bool = True,
    quiet: bool = True,
) -> dict[str, Any]:
    """Trains students on the set and on control arms under one protocol and returns the record.

    All arms have the same training rules and number of steps (except `full`) and, for each run, the same initial
    weights. Accuracy is measured on the real test images after the last step. If a learning rate was learned with the
    set, the distilled arm uses it. Arms with several learning rates use the best one on held-out real training images:
    all arms if the protocol has several, and controls of the set's size, which choose between the learned rate and that
    of the protocol. Scores are cached by content, so no student is trained twice, and a killed evaluation resumes where
    it stopped. Ranks started by ``torchrun`` share the students.

    Args:
        distilled: the set to evaluate; its transform is also applied to the real images.
        task: the real data, with the classes and image shape of the set; or the ``data`` argument of ``condense.task``.
        networks: one or several architectures: names, or ``nn.Module`` factories, whose scores are not cached. By
            default those of the protocol. "own" is the one that the set was made with.
        runs: students per arm; by default the number of the protocol.
        protocol: name; by default that of the manifest, or dc-v1 (dc-soft-v1 for labels that are not hard).
        controls: any of random (the same number of real images per class), random-hard (these with their classes, on
            the soft track), random-bytes (hard-labelled 8-bit real images with the bytes of the set), distilled-hard
            (the images of a set with soft labels, with their classes), noise, full, full-equal (all real images for the
            steps of the distilled arm), and rs2 (as many real images as the set has, other ones in each epoch, for
            these steps: equal compute). On the soft track noise has the labels of the set, and random needs the
            ``teacher`` of the labels.
        without_augmentation: also train the distilled and random arms without augmentation, for ARS.
        teacher: network in the training space of the set that gave its soft or per-view labels; it labels the random
            images in the same way.
        teachers: file of the experts or teachers that gave the labels, instead of ``teacher``; by default the file
            named by the manifest is searched in the cache and at its path.
        classes: names of some classes: students are trained on the images of these only, and tested on these only.
        curve: shares of the training, in (0, 1], after which students are also tested on the real test images, for
            curves of accuracy over images and time. Nothing is chosen by them, and the students are the same without.
            The learning rate follows the whole training, so a point is not the result of a training of its length.
        transfer: other real data that networks are tested on too, under a protocol of transfer such as transfer-v1.
        seed: seed of the students' weights, shuffles and augmentation, and of the random images.
        device: auto, cpu, cuda, ...
        precision: auto, fp32 or bf16.
        cache: False trains all students again and stores nothing.
        quiet: no progress on stderr.

    Returns:
        The record, schema ``condense.record/1``, JSON-ready. Under a protocol of transfer, schema
        ``condense.transfer/1``: networks are pretrained on the set and on the arms, then tested by a linear probe and
        by fine-tuning; controls are random, full (the target model itself) and files of other sets.

    Raises:
        CondenseError: the data do not fit the set, an unknown network, protocol or control, or out of memory.
    """
    check_set(distilled)
    rules = get_protocol(protocol or default_protocol(distilled))
    pretraining_rules(distilled, rules)  # checks that the protocol fits the labels
    torch_device = pick_device(device)
    pick_precision(precision, torch_device)  # checks the name
    seed = whole_number(seed, "--seed")
    controls = [controls] if isinstance(controls, str) else controls or []
    if rules.is_transfer:
        check_transfer(
            controls, rules, curve=curve, classes=classes is not None, **{"without-augmentation": without_augmentation}
        )
    elif transfer:
        raise CondenseError(f"--transfer: {rules.name} tests students on the data of the set; take transfer-v1")
    architectures = _architectures(networks, distilled, rules)
    shares = _curve_shares(curve)
    runs = rules.runs if runs is None else whole_number(runs, "--runs")
    if not isinstance(task, Task):
        task = load_task(task, build_config(DataOptions, data_options(distilled), "the data"))
    distilled = distilled.with_data(task)
    if classes is not None:
        distilled, task = distilled.select_classes(classes), task.select_classes(classes)
    check_data(distilled, task, architectures, runs, [] if rules.is_transfer else controls)
    precision = calibrate(precision, torch_device, architectures[0], task.shape, task.num_classes).precision
    # Ranks selects this rank's GPU, so it comes before the first tensor on the device.
    ranks = Ranks(torch_device, "run the same command again: trained students are kept")
    others = [each if isinstance(each, Task) else load_task(each, task.options) for each in transfer]
    task, *others = transfer_tasks(task, others, distilled, torch_device)
    reason = ""
    if teacher is None and (teachers is not None or ({"random", "full"} & {*controls} and rules.labels == "soft")):
        teacher, reason = find_label_teacher(distilled, teachers, torch_device)
    if rules.is_transfer:
        where = (torch_device, precision, cache, quiet, ranks)
        judge = TransferJudge(rules, [task, *others], runs, seed, *where, _target_network(distilled))
        with out_of_memory_advice(torch_device, "take smaller --networks, or another --device"):
            return judge_transfer(distilled, judge, architectures, list(controls), teacher, reason)
    evaluator = Evaluator(task, rules, runs, seed, torch_device, precision, cache, quiet, ranks, shares)
    arms, missing = make_arms(
        distilled,
        dict.fromkeys(controls),
        task=task,
        protocol=rules,
        seed=seed,
        device=torch_device,
        without_augmentation=without_augmentation,
        teacher=teacher,
        reason=reason,
    )
    with out_of_memory_advice(torch_device, "take smaller --networks, or another --device"):
        results = evaluator.results([(arm, network) for network in architectures for arm in arms])
    ranks.barrier()
    line = evaluate_command(
        distilled, evaluator, architectures, list(controls), without_augmentation, teachers is not None, classes
    )
    return _record(distilled, evaluator, results, missing, line)


def _architectures(
    networks: str | NetworkFactory | Sequence[str | NetworkFactory] | None, distilled: DistilledSet, protocol: Protocol
) -> list[str | NetworkFactory]:
    """The architectures without repetitions; "own" is replaced by the network of the set."""
    is_one = isinstance(networks, str) or callable(networks) or not isinstance(networks, Iterable)
    names: Any = [networks] if is_one and networks is not None else networks
    own = distilled.manifest["network"]
    return list(dict.fromkeys(own if name == OWN else name for name in names or protocol.networks))


def _target_network(distilled: DistilledSet) -> str | None:
    """The architecture of the network that gave the labels, if the manifest names one."""
    names = distilled.manifest.get("label_source", {}).get("teachers", {}).get("networks")
    return str(names[0]) if isinstance(names, list) and names else None


def _curve_shares(curve: Sequence[float]) -> tuple[float, ...]:
    """The shares of the training after which students are tested, ascending.

    Raises:
        CondenseError: more than 100, or one that is not in (0, 1].
    """
    for share in curve:
        if not isinstance(share, (int, float)) or not 0 < share <= 1:
            raise CondenseError(f"--curve {share}: must be shares of the training, above 0 and at most 1")
    if len(curve) > MAX_CURVE_POINTS:
        raise CondenseError(f"--curve: {len(curve)} shares; give at most {MAX_CURVE_POINTS}")
    return tuple(sorted(set(map(float, curve))))


def _record(
    distilled: DistilledSet,
    evaluator: Evaluator,
    results: list[dict[str, Any]],
    missing: list[dict[str, str]],
    line: str,
) -> dict[str, Any]:
    """Creates the record."""
    manifest, kind, data, rules = distilled.manifest, distilled.labels.kind, evaluator.task, evaluator.protocol
    cost, own = valid_cost(manifest.get("cost")), manifest["network"]
    plugins = plugin_versions(entry["network"] for entry in results)
    return {
        "schema": RECORD_SCHEMA,
        "set": describe_set(distilled),
        "data": {
            "name": data.name,
            "fingerprint": data.fingerprint,
            "same": data.fingerprint == manifest.get("data", {}).get("fingerprint"),
        },
        "protocol": {"name": rules.name, "version": rules.version, "labels": rules.labels},
        "runs": evaluator.runs,
        "seed": evaluator.seed,
        "results": results,
        "missing": missing,
        "scores": compute_scores(results, kind),
        "cross_architecture": cross_architecture(results, own),
        "time": time_to_accuracy(results, cost),
        "cost": cost,
        "environment": environment(evaluator.device, evaluator.precision),
        "command": line,
        **({"plugins": plugins} if plugins else {}),
    }


def evaluate_command(
    distilled: DistilledSet,
    evaluator: Evaluator,
    architectures: Sequence[str | NetworkFactory],
    controls: Sequence[str],
    without_augmentation: bool,
    teachers: bool = False,
    classes: Sequence[str] | None = None,
) -> str:
    """The ``condense evaluate`` command line of a record. PATH replaces paths of the user's files."""
    name = distilled.name if "claim" in distilled.manifest else distilled.file_name
    words = ["condense", "evaluate", name, "--data", data_argument(evaluator.task)]
    words += ["--networks", ",".join(networks.network_name(network) for network in architectures)]
    words += ["--runs", str(evaluator.runs), "--protocol", evaluator.protocol.name]
    words += ["--controls", ",".join(controls) or "none"] + ["--without-augmentation"] * without_augmentation
    words += ["--teachers", "PATH"] * teachers
    words += ["--classes", ",".join(classes)] if classes is not None else []
    words += ["--curve", ",".join(f"{share:g}" for share in evaluator.shares)] if evaluator.shares else []
    words += ["--seed", str(evaluator.seed)] * (evaluator.seed != 0) + ["--precision", evaluator.precision]
    own = {**dataclasses.asdict(DataOptions()), **distilled.manifest.get("data", {}).get("options", {})}
    options = dataclasses.asdict(evaluator.task.options)
    words += [
        f"{key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in options.items()
        if value != own[key] and key not in ("zca", *PRUNING_OPTIONS)
    ]
    return shlex.join(words)


def fit(
    distilled: DistilledSet,
    network: str | NetworkFactory | nn.Module,
    *,
    seed: int = 0,
    device: str = "auto",
    protocol: str | None = None,
) -> nn.Module:
    """Trains one network on the set under its protocol.

    The network expects training space: call it with ``distilled.transform(images)`` for images in [0,1]. If the labels
    are features, it has one output for each of them, and is meant to be trained further on other data. If the
    protocol has several learning rates, the first one is used, because the choice needs real data.

    Args:
        distilled: the set.
        network: architecture, a name or an ``nn.Module`` factory; or a module, which is trained from its own weights.
        seed: seed of weights, shuffles and augmentation.
        device: auto, cpu, cuda, ...
        protocol: name; by default that of the manifest.

    Returns:
        The network on the CPU, in eval mode; a given module itself.

    Raises:
        CondenseError: unknown network, protocol or device.
    """
    check_set(distilled)
    seed = whole_number(seed, "--seed")
    rules = pretraining_rules(distilled, get_protocol(protocol or default_protocol(distilled)))
    torch_device, outputs = pick_device(device), distilled.labels.outputs or len(distilled.classes)
    if isinstance(network, nn.Module):
        net, compute = networks.as_network(network, distilled.shape, outputs), networks.ComputeConfig()
    else:
        compute = calibrate("auto", torch_device, network, distilled.shape, outputs)
        with rng.seeded(seed, "student", 0):
            net = networks.build_network(network, distilled.shape, outputs)
    source = own_source(distilled, torch_device)
    mirror = distilled.manifest.get("mirror", True)
    recipe = rules.recipe(source.size, mirror=mirror, transform=distilled.transform, lr=learned_lr(distilled))
    student = Student(net, source, rng.key(seed, "run", 0))
    with networks.memory_format(compute.format):
        train([student], recipe, device=torch_device, precision=compute.precision)
    net.cpu().eval()
    return network if isinstance(network, nn.Module) else net


def default_protocol(distilled: DistilledSet) -> str:
    """The protocol of the manifest, or the usual one of the label track."""
    return distilled.manifest.get("protocol") or ("dc-v1" if distilled.labels.is_hard else "dc-soft-v1")


def data_options(distilled: DistilledSet) -> dict[str, Any]:
    """Options that the set's data were loaded with, without zca, because the set has its own transform, and without the
    pruning before it was distilled, because students and controls have all images."""
    options = {**distilled.manifest.get("data", {}).get("options", {}), "zca": False}
    return {name: value for name, value in options.items() if name not in PRUNING_OPTIONS}


def check_data(
    distilled: DistilledSet,
    task: Task,
    architectures: Sequence[str | NetworkFactory],
    runs: int,
    controls: Sequence[str],
) -> None:
    """Checks that data, networks and controls fit the set, before any student is trained."""
    if tuple(task.classes) != distilled.classes:
        raise CondenseError(
            f"--data {task.name}: has the classes {format_classes(task.classes)}, the set was made for "
            f"{format_classes(distilled.classes)}; give the data that it was made from"
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
        if isinstance(network, str) and network.startswith(networks.FACTORY_PREFIX):
            raise CondenseError(
                f"{distilled.name} was made with a network given in Python; name others with --networks"
            )
        try:
            networks.check_network(network)
        except CondenseError as fault:
            if network != distilled.manifest["network"]:
                raise
            raise CondenseError(f"{fault}{missing_plugins(distilled.manifest)}") from fault
        if isinstance(network, str):
            networks.check_network_memory(network, task.shape, task.num_classes)
        with rng.seeded("check"):
            networks.build_network(network, task.shape, task.num_classes)


def format_classes(names: Sequence[str]) -> str:
    """The number of classes and the first three."""
    first = ", ".join(names[:3])
    return f"{len(names)} ({first}{', ...' if len(names) > 3 else ''})"


def accuracy_lost(distilled: DistilledSet, rounded: DistilledSet, task: Task | Any, **options: Any) -> dict[str, Any]:
    """Accuracy before and after rounding the images of a set, of students with the same initial weights.

    Args:
        distilled: the set.
        rounded: the same images after rounding.
        task: the real data.
        options: further arguments of :func:`evaluate`; by default on the network that the set was made with.

    Returns:
        ``before`` and ``after`` (mean accuracies), ``difference`` (after - before) and its ``ci95``, the t-interval of
        the paired differences (None for one run), and ``runs``.
    """
    options = {"networks": distilled.manifest["network"], "controls": [], **options}
    before, after = (evaluate(images, task, **options)["results"][0]["accuracies"] for images in (distilled, rounded))
    difference = summary([b - a for a, b in zip(before, after)])
    return {
        "before": sum(before) / len(before),
        "after": sum(after) / len(after),
        "difference": difference["mean"],
        "ci95": difference["ci95"],
        "runs": len(before),
    }
