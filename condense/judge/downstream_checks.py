"""What a set is good for besides accuracy: robustness, privacy, continual learning and the ranking of architectures.

Every measure is taken on the set and on random real images of the same bytes, with the same training.
"""

from __future__ import annotations

import itertools
import shlex
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from condense import networks, rng
from condense.commands import data_argument
from condense.config import build_config, whole_number
from condense.data import DataOptions, Task, load_task
from condense.device import out_of_memory_advice, pick_device
from condense.errors import CondenseError, did_you_mean
from condense.formatting import aligned
from condense.judge.arms import equal_byte_count, hard_source, learned_lr, own_source, random_bytes_source
from condense.judge.evaluation import check_data, data_options, default_protocol, evaluate
from condense.judge.protocol import OWN, Protocol, get_protocol
from condense.judge.records import environment
from condense.judge.students import make_student
from condense.judge.transfer import pretraining_rules
from condense.networks import ComputeConfig, Network, calibrate
from condense.sets import DistilledSet, check_set
from condense.tracking import Progress
from condense.training import train

SCHEMA = "condense.downstream/1"

CHECKS = ("robustness", "privacy", "continual", "ranking")

DISTILLED, RANDOM = ARMS = ("distilled", "random, equal bytes")

CHUNK = 256
"""Test images that are attacked or tested at once."""

ATTACKED = 1000
"""Test images that robustness is measured on, drawn once for both arms."""

ATTACKS = {"FGSM": 1, "PGD-10": 10}
"""Steps of the attacks."""

RADII = (2, 8)
"""Largest changes of a pixel, in 1/255."""

RANKED = ("-in", "-bn")
"""Norms of the architectures that are ranked, each at every width and up to three depths."""


def downstream(
    distilled: DistilledSet,
    task: Task | Any,
    *,
    checks: Sequence[str] = ("robustness", "privacy", "continual"),
    network: str | None = None,
    runs: int | None = None,
    protocol: str | None = None,
    steps: int = 5,
    widths: Sequence[int] = (16, 32),
    seed: int = 0,
    device: str = "auto",
    precision: str = "auto",
    quiet: bool = True,
) -> dict[str, Any]:
    """Measures a set beside random real images of the same bytes.

    * robustness: accuracy on 1,000 test images that are attacked (FGSM and PGD in the pixels, L-infinity) or corrupted;
      the corruptions are made here and are not those of CIFAR-10-C.
    * privacy: how well the loss of a network tells members of its training data from test images, as the area under the
      ROC curve (0.5: not at all). Members are the real training images for the set, the images themselves for the
      random ones.
    * continual: classes arrive in groups, the set is the memory, and a network is trained from scratch on it after each
      group (GDumb); accuracy is that on the test images of all classes so far.
    * ranking: Spearman's correlation over small ConvNets between accuracies after training on the set and on all real
      images. It trains many networks.

    Args:
        distilled: the set.
        task: the real data of the set, or the ``data`` argument of ``condense.task``.
        checks: some of ``CHECKS``.
        network: architecture; by default that of the set.
        runs: students of each arm; by default the number of the protocol.
        protocol: training of the students; by default that of the set.
        steps: groups of classes of ``continual``.
        widths: widths of the ConvNets of ``ranking``.
        seed: of weights, shuffles, random images and the order of classes.
        device: auto, cpu, cuda, ...
        precision: auto, fp32 or bf16; attacks are computed in fp32.
        quiet: no progress on stderr.

    Returns:
        The record, schema ``condense.downstream/1``, JSON-ready. Accuracies are fractions.

    Raises:
        CondenseError: the data do not fit the set; an unknown check, network or protocol; or out of memory.
    """
    check_set(distilled)
    for name in checks:
        if name not in CHECKS:
            raise CondenseError(f"--checks {name}: unknown{did_you_mean(name, CHECKS)}")
    rules = get_protocol(protocol or default_protocol(distilled))
    if rules.is_transfer:
        raise CondenseError(f"--protocol {rules.name}: judges pretrained networks; take one of classes, e.g. dc-v1")
    pretraining_rules(distilled, rules)  # checks that the protocol fits the labels
    runs = rules.runs if runs is None else whole_number(runs, "--runs")
    architecture = distilled.manifest["network"] if network in (None, OWN) else network
    where = pick_device(device)
    if not isinstance(task, Task):
        task = load_task(task, build_config(DataOptions, data_options(distilled), "the data"))
    distilled = distilled.with_data(task)
    check_data(distilled, task, [architecture], runs, [])
    if "continual" in checks and not 1 <= steps <= task.num_classes:
        raise CondenseError(f"--class-steps {steps}: must be 1 to {task.num_classes}, the number of classes")
    compute = calibrate(precision, where, architecture, task.shape, task.num_classes)
    judged = task
    task = task.to(where, transform=distilled.transform)
    bench = _Bench(distilled, task, rules, architecture, runs, whole_number(seed, "--seed"), compute, quiet)
    options = {"runs": runs, "protocol": rules.name, "seed": seed, "device": device, "precision": precision}
    options |= {"quiet": quiet, "controls": ["random-bytes"]}
    rows: dict[str, list[dict[str, Any]]] = {}
    with out_of_memory_advice(where, "take a smaller --network, or another --device"):
        if "robustness" in checks or "privacy" in checks:
            rows = bench.measure_networks([name for name in ("robustness", "privacy") if name in checks])
        if "continual" in checks:
            rows["continual"] = _continual(distilled, judged, steps, {**options, "networks": architecture})
        if "ranking" in checks:
            rows["ranking"] = _ranking(distilled, judged, widths, options)
    words = ["condense", "downstream", distilled.file_name, "--data", data_argument(task), "--checks", ",".join(checks)]
    return {
        "schema": SCHEMA,
        "set": {"name": distilled.name, "sha256": distilled.sha256(), "method": distilled.manifest["method"]},
        "data": {"name": task.name, "fingerprint": task.fingerprint},
        "protocol": {"name": rules.name, "version": rules.version},
        "network": architecture,
        "runs": runs,
        "seed": seed,
        "random_images": equal_byte_count(distilled),
        "checks": {name: rows[name] for name in CHECKS if name in rows},
        "environment": environment(where, compute.precision),
        "command": shlex.join(words),
    }


class _Bench:
    """Students of both arms, one after the other, with what is measured on each."""

    def __init__(
        self,
        distilled: DistilledSet,
        task: Task,
        rules: Protocol,
        network: str,
        runs: int,
        seed: int,
        compute: ComputeConfig,
        quiet: bool,
    ) -> None:
        self.distilled, self.task, self.rules, self.network = distilled, task, rules, network
        self.runs, self.seed, self.compute, self.quiet = runs, seed, compute, quiet

    def measure_networks(self, checks: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
        """Rows of robustness and privacy: each measure on every student of each arm."""
        found: dict[tuple[str, str, str], list[float]] = {}
        for arm, run in itertools.product(ARMS, range(self.runs)):
            net, members = self.student(arm, run)
            for check in checks:
                measured = (
                    robustness(net, self.task, self.seed) if check == "robustness" else privacy(net, self.task, members)
                )
                for measure, value in measured.items():
                    found.setdefault((check, measure, arm), []).append(value)
        rows: dict[str, list[dict[str, Any]]] = {check: [] for check in checks}
        for (check, measure, arm), values in found.items():
            rows[check].append(summary_row(measure, arm, values))
        return rows

    def student(self, arm: str, run: int) -> tuple[Network, tuple[Tensor, Tensor]]:
        """A trained network, and the images in training space with their classes that its training data came from."""
        task, device = self.task, self.task.device
        if arm == DISTILLED:
            has_own_labels = self.rules.labels == "soft" or self.distilled.labels.is_hard
            source = (own_source if has_own_labels else hard_source)(self.distilled, device)
            ids = rng.Draws(self.seed, "members").permutation(len(task.train))[: len(task.test)]
            members = task.batch(ids), torch.from_numpy(task.train.labels[ids.numpy()]).to(device)
        else:
            source = random_bytes_source(self.seed, equal_byte_count(self.distilled), task, run)
            members = source.images, source.labels.targets(source.ids)
        rate = learned_lr(self.distilled) if arm == DISTILLED else None
        budget = self.rules.budget(len(self.distilled))
        recipe = self.rules.recipe(source.size, mirror=task.mirror, transform=task.transform, steps=budget, lr=rate)
        student = make_student(self.network, task, source, self.seed, run)
        progress = Progress(f"{arm}, run {run + 1} of {self.runs}", recipe.steps, quiet=self.quiet)
        with networks.memory_format(self.compute.format):
            train([student], recipe, device=device, precision=self.compute.precision, report=progress.update)
        progress.close()
        return student.network.eval(), members


def summary_row(measure: str, arm: str, values: Sequence[float]) -> dict[str, Any]:
    """A row of the table: all values, their mean (None if there are none) and standard deviation (None for one)."""
    std = statistics.stdev(values) if len(values) > 1 else None
    mean = statistics.fmean(values) if values else None
    return {"measure": measure, "arm": arm, "values": list(values), "mean": mean, "std": std}


# -- robustness -------------------------------------------------------------------------------------------------------


def robustness(net: Network, task: Task, seed: int) -> dict[str, float]:
    """Accuracies of a network on ``ATTACKED`` test images as they are, attacked and corrupted."""

    def logits(pixels: Tensor) -> Tensor:
        return net(task.transform(pixels))

    correct: dict[str, int] = {}
    chosen = rng.Draws(seed, "attacked").permutation(len(task.test))[:ATTACKED]
    for part, (pixels, labels) in enumerate(_test_pixels(task, chosen)):
        changed = {"clean": pixels}
        for (name, steps), radius in itertools.product(ATTACKS.items(), RADII):
            draws = rng.Draws(seed, "attack", part)
            changed[f"{name} {radius}/255"] = attack(logits, pixels, labels, radius / 255, steps, draws)
        for name, corrupt in CORRUPTIONS.items():
            changed[name] = corrupt(pixels, rng.generator(seed, "corruption", part)).clamp(0, 1)
        for name, images in changed.items():
            with torch.no_grad():
                correct[name] = correct.get(name, 0) + int((logits(images).argmax(1) == labels).sum())
    return {name: count / len(chosen) for name, count in correct.items()}


def _test_pixels(task: Task, chosen: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    labels = torch.as_tensor(task.test.labels)
    for ids in chosen.split(CHUNK):
        yield task.test_pixels(ids), labels[ids].to(task.device)


def attack(
    logits: Callable[[Tensor], Tensor], pixels: Tensor, labels: Tensor, radius: float, steps: int, draws: rng.Draws
) -> Tensor:
    """Images within ``radius`` of ``pixels`` (N,C,H,W), in [0,1], that increase the cross-entropy.

    Args:
        logits: pixels to logits.
        steps: 1 for FGSM (Goodfellow et al. 2015); more for PGD (Madry et al. 2018), from a random start, in steps of a
            quarter of the radius.
        draws: random stream of the start.
    """
    attacked = pixels
    if steps > 1:
        attacked = (pixels + draws.uniform(tuple(pixels.shape), -radius, radius).to(pixels)).clamp(0, 1)
    length = radius if steps == 1 else radius / 4
    for _ in range(steps):
        attacked = attacked.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits(attacked), labels, reduction="sum"), attacked)
        moved = attacked.detach() + length * gradient.sign()
        attacked = torch.minimum(torch.maximum(moved, pixels - radius), pixels + radius).clamp(0, 1)
    return attacked


def _noise(pixels: Tensor, random: torch.Generator) -> Tensor:
    return pixels + 0.08 * torch.randn(pixels.shape, generator=random).to(pixels)


def _blurred(pixels: Tensor, random: torch.Generator) -> Tensor:
    channels = pixels.shape[1]
    row = torch.tensor([1.0, 2.0, 1.0], device=pixels.device) / 4
    kernel = (row[:, None] * row).expand(channels, 1, 3, 3)
    return F.conv2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), kernel, groups=channels)


def _pixelated(pixels: Tensor, random: torch.Generator) -> Tensor:
    small = F.avg_pool2d(pixels, 2, ceil_mode=True)
    return F.interpolate(small, scale_factor=2, mode="nearest")[..., : pixels.shape[2], : pixels.shape[3]]


CORRUPTIONS: Mapping[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "noise 0.08": _noise,
    "blur 3x3": _blurred,
    "brightness +0.2": lambda pixels, random: pixels + 0.2,
    "contrast 0.4": lambda pixels, random: pixels.mean((1, 2, 3), keepdim=True) * 0.6 + pixels * 0.4,
    "pixelate 2x2": _pixelated,
}
"""Corruptions of pixels in [0,1]; the result is clamped."""


# -- privacy ----------------------------------------------------------------------------------------------------------


def privacy(net: Network, task: Task, members: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Membership inference by a threshold on the loss (Yeom et al. 2018), between members and test images."""
    from sklearn.metrics import roc_auc_score, roc_curve

    everything = torch.arange(len(task.test))
    test = torch.cat(
        [_losses(net, task.transform(pixels), labels) for pixels, labels in _test_pixels(task, everything)]
    )
    inside = torch.cat([_losses(net, x, y) for x, y in zip(members[0].split(CHUNK), members[1].split(CHUNK))])
    is_member = [1] * len(inside) + [0] * len(test)
    scores = (-torch.cat([inside, test])).nan_to_num(neginf=-1e30, posinf=1e30).numpy()
    false, true, _ = roc_curve(is_member, scores)
    return {"attack AUC": float(roc_auc_score(is_member, scores)), "attack advantage": float((true - false).max())}


@torch.no_grad()
def _losses(net: Network, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(net(images), labels, reduction="none").cpu()


# -- continual learning and the ranking of architectures --------------------------------------------------------------


def _continual(distilled: DistilledSet, task: Task, steps: int, options: dict[str, Any]) -> list[dict[str, Any]]:
    """Accuracy on all classes so far after each group of classes, and its mean over the groups."""
    order = rng.Draws(options["seed"], "classes").permutation(task.num_classes).tolist()
    groups = [part.tolist() for part in torch.tensor_split(torch.tensor(order), steps)]
    found: dict[str, list[list[float]]] = {arm: [] for arm in ARMS}
    rows, seen = [], []
    for group in groups:
        seen += group
        if len(seen) < 2:  # one class needs no learning
            continue
        names = [task.classes[number] for number in sorted(seen)]
        record = evaluate(distilled, task, classes=names, **options)
        for arm, accuracies in _accuracies(record, options["networks"]).items():
            found[arm].append(accuracies)
            rows.append(summary_row(f"accuracy on {len(seen)} classes", arm, accuracies))
    for arm, accuracies_by_step in found.items():
        rows.append(summary_row("mean of the steps", arm, [statistics.fmean(run) for run in zip(*accuracies_by_step)]))
    return rows


def _accuracies(record: Mapping[str, Any], network: str) -> dict[str, list[float]]:
    """Accuracies of a network by arm; of an arm that is there with two kinds of labels, those of the first."""
    names = {"distilled": DISTILLED, "random-bytes": RANDOM, "full": "full"}
    found: dict[str, list[float]] = {}
    for entry in record["results"]:
        if entry["network"] == network:
            found.setdefault(names[entry["arm"]], list(entry["accuracies"]))
    return found


def ranked_networks(task: Task, widths: Sequence[int]) -> list[str]:
    """ConvNets of up to three depths that fit the images, at each width and norm."""
    depths = range(1, min(3, min(task.shape[1:]).bit_length() - 1) + 1)
    return [f"convnet-d{depth}-w{width}{norm}" for depth in depths for width in widths for norm in RANKED]


def _ranking(
    distilled: DistilledSet, task: Task, widths: Sequence[int], options: dict[str, Any]
) -> list[dict[str, Any]]:
    """Spearman's correlation with the accuracies of networks that are trained on all real images."""
    from scipy.stats import spearmanr

    names = ranked_networks(task, widths)
    record = evaluate(distilled, task, networks=names, **{**options, "controls": ["random-bytes", "full"]})
    means = [{arm: statistics.fmean(values) for arm, values in _accuracies(record, name).items()} for name in names]
    rows = []
    for arm in ARMS:
        accuracies, full = [each[arm] for each in means], [each["full"] for each in means]
        is_defined = len(set(accuracies)) > 1 and len(set(full)) > 1
        correlations = [float(spearmanr(accuracies, full).statistic)] if is_defined else []
        rows.append(summary_row(f"Spearman over {len(names)} ConvNets", arm, correlations))
    return rows


def format_downstream(record: Mapping[str, Any]) -> str:
    """The record as one table, a line for each measure and a column for each arm; mean ± std of students."""
    lines: list[Sequence[str]] = [("check", "measure", *ARMS)]
    for check, rows in record["checks"].items():
        for measure in dict.fromkeys(row["measure"] for row in rows):
            cells = {row["arm"]: _cell(check, row) for row in rows if row["measure"] == measure}
            lines.append((check, measure, *(cells.get(arm, "") for arm in ARMS)))
    return aligned(lines, ruled=True)


def _cell(check: str, row: Mapping[str, Any]) -> str:
    if row["mean"] is None:
        return "undefined: all equal"
    scale, unit, digits = (1, "", 3) if check in ("privacy", "ranking") else (100, " %", 1)
    std = "" if row["std"] is None else f" ± {scale * row['std']:.{digits}f}"
    return f"{scale * row['mean']:.{digits}f}{unit}{std}"
