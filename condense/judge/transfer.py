"""Transfer: networks that are pretrained on a set, judged on real data by a linear probe and by fine-tuning."""

from __future__ import annotations

import copy
import hashlib
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from condense import networks, rng
from condense.commands import data_argument
from condense.data import Task, cache_dir, digests
from condense.device import device_name
from condense.errors import CondenseError, did_you_mean
from condense.files import tensors_sha256
from condense.formatting import aligned, by, interval, percent
from condense.judge.arms import Arm, NetworkFactory, make_arms
from condense.judge.protocol import Protocol, get_protocol
from condense.judge.records import describe_set, environment, valid_cost
from condense.judge.scoring import summary
from condense.judge.students import Score, read_score, write_score
from condense.networks import Network, WithHead
from condense.ranks import Ranks
from condense.sets import DistilledSet
from condense.tracking import Progress
from condense.training import STUDENT_VERSION, Student, TaskSource, TrainConfig, accuracy, fit_linear_probe, train

TRANSFER_SCHEMA = "condense.transfer/1"

PROBE, FINETUNING = TESTS = ("linear probe", "fine-tuning")

SCRATCH = "scratch"
"""Arm without pretraining, which every table has."""

TRANSFER_CONTROLS = ("random", "full")
"""Names of further arms; a file of a set is one too."""


@dataclass(frozen=True)
class PretrainedArm:
    """Where the weights of the networks of an arm come from."""

    name: str
    content_key: str
    """Digest of what the networks are pretrained on; part of the key of cached scores."""
    outputs: int
    """Outputs of the networks while they are pretrained."""
    training: Arm | None = None
    """Images and labels of the pretraining; None: no pretraining."""
    rules: Protocol | None = None
    """Protocol of the pretraining."""
    network: Network | None = None
    """A network that is pretrained already."""


def pretraining_rules(distilled: DistilledSet, rules: Protocol) -> Protocol:
    """Returns the protocol that trains networks on a set: of a protocol of transfer, the one for its kind of labels.

    Raises:
        CondenseError: the labels are features, and the protocol trains classifiers.
    """
    if not rules.is_transfer and distilled.labels.outputs is not None:
        raise CondenseError(
            f"--protocol {rules.name}: tests students on classes, but the labels of {distilled.name} are "
            f"{distilled.labels.kind}; take transfer-v1"
        )
    return rules if distilled.labels.outputs is not None or not rules.is_transfer else get_protocol(rules.supervised)


def check_transfer(controls: Sequence[str], rules: Protocol, **without: Any) -> None:
    """Checks the arguments of an evaluation under a protocol of transfer.

    Args:
        controls: names of arms, and files of sets.
        rules: the protocol.
        without: arguments that such an evaluation does not take, by the name of their option.

    Raises:
        CondenseError: an unknown control, or an argument of these is given.
    """
    for control in controls:
        if control not in TRANSFER_CONTROLS and not control.endswith(".h5"):
            hint = did_you_mean(control, TRANSFER_CONTROLS)
            raise CondenseError(f"--controls {control}: no arm of {rules.name}{hint}; or name the .h5 of another set")
    for option, value in without.items():
        if value:
            raise CondenseError(f"--{option}: does not apply to {rules.name}, which judges pretrained networks")


def transfer_tasks(task: Task, others: Sequence[Task], distilled: DistilledSet, device: torch.device) -> list[Task]:
    """Returns the data that networks are tested on, in the training space of the set: its own first.

    Raises:
        CondenseError: other images than those of the set, or two data of one name.
    """
    for number, other in enumerate(others):
        if other.shape != distilled.shape:
            raise CondenseError(
                f"--transfer {other.name}: images are {by(other.shape)}, those of the set {by(distilled.shape)}; "
                "give data of that size, or resize= and grey= for all"
            )
        if other.name in [task.name, *(earlier.name for earlier in others[:number])]:
            raise CondenseError(f"--transfer {other.name}: is given twice; NAME=DATA names other data")
    if all(each.num_classes < 2 for each in (task, *others)):
        raise CondenseError(f"{task.name} was read without classes; give data with classes by --transfer")
    return [each.to(device, transform=distilled.transform) for each in (task, *others)]


def make_pretrained_arms(
    distilled: DistilledSet,
    controls: Sequence[str],
    task: Task,
    rules: Protocol,
    seed: int,
    teacher: nn.Module | None,
    reason: str,
) -> tuple[list[PretrainedArm], list[dict[str, str]]]:
    """Returns the arms, that of the set first, and those that are not available with the reason."""

    def trained(made: DistilledSet, names: Sequence[str]) -> tuple[list[PretrainedArm], list[dict[str, str]]]:
        own = pretraining_rules(made, rules)
        outputs = made.labels.outputs or len(made.classes)
        arms, missing = make_arms(
            made, names, task=task, protocol=own, seed=seed, device=task.device, teacher=teacher, reason=reason
        )
        return [PretrainedArm(arm.name, arm.content_key, outputs, arm, own) for arm in arms], missing

    by_reason = f" ({reason})" if reason else ""
    arms, missing = trained(distilled, [name for name in controls if name == "random"])
    for name in controls:
        if name.endswith(".h5"):
            other = DistilledSet.load(name)
            if other.shape != distilled.shape or digests(other.transform) != digests(distilled.transform):
                raise CondenseError(f"--controls {name}: its images are of another size or training space")
            (arm,), gone = trained(other.with_data(task), [])
            missing += [{**entry, "arm": f"{Path(name).name}: {entry['arm']}"} for entry in gone]
            arms.append(PretrainedArm(Path(name).name, arm.content_key, arm.outputs, arm.training, arm.rules))
        elif name == "full":
            target = _only_network(teacher)
            if target is None:
                missing.append({"arm": name, "why": f"the set has no single target model that is found{by_reason}"})
            else:
                key = f"target-{tensors_sha256(target.state_dict())}"
                arms.append(PretrainedArm(name, key, task.num_classes, network=target))
    arms.append(PretrainedArm(SCRATCH, SCRATCH, task.num_classes))
    return arms, missing


def _only_network(teacher: nn.Module | None) -> Network | None:
    """The network of an ensemble of one; None for others."""
    members = list(teacher.members) if isinstance(teacher, networks.MeanLogits) else [teacher]
    return members[0] if len(members) == 1 and isinstance(members[0], Network) else None


@dataclass
class TransferJudge:
    """Pretrains, fine-tunes and tests networks, through the cache of scores and distributed over ranks."""

    rules: Protocol
    tasks: list[Task]
    runs: int
    seed: int
    device: torch.device
    precision: str
    cache: bool
    quiet: bool
    ranks: Ranks
    target_network: str | None
    """Architecture of the target model; only networks of it have the arm ``full``."""
    missing: list[dict[str, str]] = field(default_factory=list)

    @property
    def tested(self) -> list[Task]:
        """The data with classes."""
        return [task for task in self.tasks if task.num_classes > 1]

    def results(
        self, arms: Sequence[PretrainedArm], architectures: Sequence[str | NetworkFactory]
    ) -> list[dict[str, Any]]:
        """Accuracies of all runs, as entries of ``results`` of the record."""
        cells = []
        for architecture in architectures:
            for arm in arms:
                if arm.network is not None and architecture != self.target_network:
                    why = f"the target model is {self.target_network}, not {networks.network_name(architecture)}"
                    self.missing.append({"arm": arm.name, "why": why})
                else:
                    cells.append((arm, architecture))
        table = torch.zeros(len(cells), self.runs, len(self.tested), len(TESTS), 2, dtype=torch.float64)
        jobs = [(cell, run) for cell in range(len(cells)) for run in range(self.runs)]
        for cell, run in jobs[self.ranks.rank :: self.ranks.world_size]:
            table[cell, run] = self._measure(*cells[cell], run)
        if self.ranks.world_size > 1:
            table = table.to(self.device)
            self.ranks.all_reduce_sum(table)
            table = table.cpu()
        return [
            {
                "arm": arm.name,
                "network": networks.network_name(architecture),
                "data": task.name,
                "test": test,
                "accuracies": table[cell, :, i, j, 0].tolist(),
                **summary(table[cell, :, i, j, 0].tolist()),
                "seconds": round(float(table[cell, :, i, j, 1].sum()), 2),
            }
            for i, task in enumerate(self.tested)
            for j, test in enumerate(TESTS)
            for cell, (arm, architecture) in enumerate(cells)
        ]

    def _measure(self, arm: PretrainedArm, architecture: str | NetworkFactory, run: int) -> torch.Tensor:
        """Accuracy and seconds of each test on each data of one network, float64 (data, tests, 2)."""
        table, net = torch.zeros(len(self.tested), len(TESTS), 2, dtype=torch.float64), None
        for i, task in enumerate(self.tested):
            for j, test in enumerate(TESTS):
                path = self._path(arm, architecture, run, task, test)
                found = read_score(path, False) if path is not None else None
                if found is None:
                    net = self._pretrained(arm, architecture, run) if net is None else net
                    found = self._test(net, arm, architecture, run, task, test)
                    if path is not None:
                        write_score(path, found)
                table[i, j, 0], table[i, j, 1] = found.accuracy, found.seconds
        return table

    def _pretrained(self, arm: PretrainedArm, architecture: str | NetworkFactory, run: int) -> Network:
        """The network of a run before it is tested, on the CPU."""
        if arm.network is not None:
            return copy.deepcopy(arm.network).cpu()
        task = self.tasks[0]
        with rng.seeded(self.seed, "student", run):
            net = networks.build_network(architecture, task.shape, arm.outputs)
        if arm.training is not None and arm.rules is not None:
            recipe = arm.rules.recipe(
                0, mirror=task.mirror, transform=task.transform, steps=arm.training.steps, lr=arm.training.rates[0]
            )
            student = Student(net, arm.training.source(task, run), rng.key(self.seed, "run", run))
            self._train(student, recipe, f"{arm.name}, pretraining", architecture, run)
        return net.cpu()

    def _test(
        self, net: Network, arm: PretrainedArm, architecture: str | NetworkFactory, run: int, task: Task, test: str
    ) -> Score:
        """Accuracy and seconds of training of a linear probe or of a fine-tuned copy of ``net``."""
        where: dict[str, Any] = {"device": self.device, "precision": self.precision}
        body = copy.deepcopy(net).requires_grad_(True)
        seconds = 0.0
        if test == PROBE:
            judged = WithHead(body, fit_linear_probe(body, task, **where))
        else:
            with rng.seeded(self.seed, "head", run):
                judged = WithHead(body, nn.Linear(networks.embedding_size(body, task.shape), task.num_classes))
            source = TaskSource(task, self.device)
            student = Student(judged, source, rng.key(self.seed, "finetuning", run))
            seconds = self._train(student, self._finetuning(task), f"{arm.name} on {task.name}", architecture, run)
        right = accuracy(judged, task, **where)
        return Score(right, right, round(seconds, 3))

    def _finetuning(self, task: Task) -> TrainConfig:
        return get_protocol(self.rules.finetuning).recipe(len(task.train), mirror=task.mirror, transform=task.transform)

    def _train(
        self, student: Student, recipe: TrainConfig, title: str, architecture: str | NetworkFactory, run: int
    ) -> float:
        name = f"{title}, {networks.network_name(architecture)}, run {run + 1} of {self.runs}"
        progress = Progress(name, recipe.steps, quiet=self.quiet or not self.ranks.is_main_process)
        shape, classes = self.tasks[0].shape, self.tasks[0].num_classes
        compute = networks.calibrate(self.precision, self.device, architecture, shape, classes)
        with networks.memory_format(compute.format):
            seconds = train([student], recipe, device=self.device, precision=self.precision, report=progress.update)
        progress.close()
        return seconds

    def _path(
        self, arm: PretrainedArm, architecture: str | NetworkFactory, run: int, task: Task, test: str
    ) -> Path | None:
        """File of a score; its name is a digest of everything that affects it. None: not to be cached."""
        if not self.cache or not isinstance(architecture, str):
            return None
        rules = arm.rules and arm.rules.recipe(0, mirror=self.tasks[0].mirror).cache_key()
        training = arm.training and (arm.training.steps, arm.training.rates[0])
        parts = [
            TRANSFER_SCHEMA,
            arm.content_key,
            rules,
            training,
            self._finetuning(task).cache_key() if test == FINETUNING else test,
            architecture,
            networks.library_version(architecture),
            run,
            self.seed,
            self.tasks[0].fingerprint,
            task.fingerprint,
            digests(task.transform),
            self.precision,
            device_name(self.device),
            torch.backends.cudnn.allow_tf32,
            rng.HASH_VERSION,
            STUDENT_VERSION,
            torch.__version__,
        ]
        digest = hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()
        return cache_dir() / "students" / digest[:2] / f"{digest}.json"


def transfer_gains(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Differences of the accuracies of the set and of each other arm, paired by run, with their t-intervals."""
    gains = []
    own = {(entry["network"], entry["data"], entry["test"]): entry for entry in results if entry["arm"] == "distilled"}
    for entry in results:
        if entry["arm"] != "distilled":
            same = own[entry["network"], entry["data"], entry["test"]]
            differences = summary([a - b for a, b in zip(same["accuracies"], entry["accuracies"])])
            keys = {key: entry[key] for key in ("network", "data", "test")}
            gains.append({**keys, "over": entry["arm"], "value": differences["mean"], "ci95": differences["ci95"]})
    return gains


def judge_transfer(
    distilled: DistilledSet,
    judge: TransferJudge,
    architectures: Sequence[str | NetworkFactory],
    controls: Sequence[str],
    teacher: nn.Module | None,
    reason: str,
) -> dict[str, Any]:
    """Pretrains networks on the set and on control arms, tests them, and returns the record.

    Args:
        distilled: the set.
        judge: protocol, data and machine.
        architectures: of the networks.
        controls: random (as many random real images, labelled as the set is), full (the target model itself), and files
            of other sets.
        teacher: the target model, if it was found.
        reason: why there is no ``teacher``.

    Returns:
        The record, schema ``condense.transfer/1``, JSON-ready.
    """
    rules, tasks = judge.rules, judge.tasks
    arms, missing = make_pretrained_arms(distilled, controls, tasks[0], rules, judge.seed, teacher, reason)
    results = judge.results(arms, architectures)
    words = ["condense", "evaluate", distilled.file_name, "--data", data_argument(tasks[0])]
    words += ["--transfer", ",".join(map(data_argument, tasks[1:]))] if tasks[1:] else []
    words += ["--networks", ",".join(map(networks.network_name, architectures)), "--runs", str(judge.runs)]
    shown = ["PATH.h5" if name.endswith(".h5") else name for name in controls]
    words += ["--protocol", rules.name, "--controls", ",".join(shown) or "none"]
    words += ["--seed", str(judge.seed)] * (judge.seed != 0) + ["--precision", judge.precision]
    return {
        "schema": TRANSFER_SCHEMA,
        "set": describe_set(distilled),
        "data": [{"name": task.name, "fingerprint": task.fingerprint, "classes": task.num_classes} for task in tasks],
        "protocol": {"name": rules.name, "version": rules.version},
        "runs": judge.runs,
        "seed": judge.seed,
        "results": results,
        "gains": transfer_gains(results),
        "missing": [*missing, *judge.missing],
        "cost": valid_cost(distilled.manifest.get("cost")),
        "environment": environment(judge.device, judge.precision),
        "command": shlex.join(words),
    }


def format_transfer(record: dict[str, Any]) -> str:
    """Formats the results of a record of transfer as lines for a terminal."""
    gains = {tuple(gain[key] for key in ("network", "data", "test", "over")): gain for gain in record["gains"]}
    rows = [
        (
            "data",
            "test",
            "network",
            "arm",
            "students",
            "accuracy, % (± std)",
            "95 % interval",
            "distilled is better by",
        )
    ]
    for entry in record["results"]:
        gain, more = gains.get(tuple(entry[key] for key in ("network", "data", "test", "arm"))), ""
        if gain is not None:
            more = f"{100 * gain['value']:+.1f}"
            more += "" if gain["ci95"] is None else " ({:+.1f} to {:+.1f})".format(*(100 * x for x in gain["ci95"]))
        where = (entry["data"], entry["test"], entry["network"], entry["arm"])
        shown = (percent(entry["mean"], entry["std"]), interval(entry["ci95"]))
        rows.append((*where, str(len(entry["accuracies"])), *shown, more))
    lines = [aligned(rows, ruled=True)]
    lines += [f"arm {entry['arm']} is missing: {entry['why']}" for entry in record["missing"]]
    return "\n".join(lines)
