"""the set and its control arms."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from condense import rng
from condense.data import Task
from condense.errors import CondenseError, did_you_mean
from condense.files import content
from condense.labels import HardLabels, TeacherLabels
from condense.sets import DistilledSet
from condense.training import FixedSource, Source, TaskSource

if TYPE_CHECKING:
    from condense.judge.students import _Judge

Architecture = Callable[..., nn.Module]

CONTROLS = ("random", "random-hard", "random-bytes", "noise", "full", "full-equal")


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


def check_control(name: str) -> None:
    """Refuses what is no control arm."""
    if name not in CONTROLS:
        raise CondenseError(f"--controls {name}: unknown{did_you_mean(name, CONTROLS)}")
