"""Arms: the distilled set and its control arms, each with its budget, its learning rates and its training images."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from condense import rng
from condense.data import Task
from condense.errors import CondenseError, did_you_mean
from condense.files import tensors_sha256
from condense.judge.protocol import Protocol
from condense.labels import HardLabels
from condense.selection import even_shares
from condense.sets import DistilledSet
from condense.training import FixedSource, ResampledSource, Source, TaskSource

NetworkFactory = Callable[..., nn.Module]

CONTROLS = ("random", "random-hard", "random-bytes", "distilled-hard", "noise", "full", "full-equal", "rs2")


@dataclass(frozen=True)
class Arm:
    """Training images and labels of students, with their budget."""

    name: str
    labels: str
    """own (those of the set) or hard."""
    content_key: str
    """Digest of the training images and labels; part of the key of the score cache."""
    steps: int
    rates: tuple[float, ...]
    """Learning rates; if several, held-out real training images decide."""
    source: Callable[[Task, int], Source]
    """Creates the training source of a run from the real data and the number of the run."""
    uses_learned_lr: bool = False
    """Whether the learning rate was learned with the set."""
    augment: bool = True
    """Whether the augmentation of the protocol is applied."""


def check_control(name: str) -> None:
    """Checks the name of a control arm.

    Raises:
        CondenseError: unknown.
    """
    if name not in CONTROLS:
        raise CondenseError(f"--controls {name}: unknown{did_you_mean(name, CONTROLS)}")


def make_arms(
    distilled: DistilledSet,
    controls: Iterable[str],
    *,
    task: Task,
    protocol: Protocol,
    seed: int,
    device: torch.device,
    without_augmentation: bool = False,
    teacher: nn.Module | None = None,
    reason: str = "",
) -> tuple[list[Arm], list[dict[str, str]]]:
    """Creates the arms that students are trained on.

    Args:
        distilled: the set.
        controls: names of control arms.
        task: the real data.
        protocol: the rules of the evaluation.
        seed: seed of random images and noise.
        device: device of the training images.
        without_augmentation: add the distilled and the random arm without augmentation.
        teacher: network that labels random images as the set's images were labelled.
        reason: why there is no ``teacher``.

    Returns:
        The arms, those of the set first, and the unavailable arms with the reason.
    """
    controls, kind = list(controls), distilled.labels.kind
    arms, missing = _distilled_arms(
        distilled, task, protocol, seed, device, with_hard=bool({"full", "distilled-hard"} & set(controls))
    )
    track = arms[0].labels
    is_soft = track == "own" and not distilled.labels.is_hard
    teacher = distilled.labels.relabelling_teacher(teacher)
    for control in controls:
        if control == "distilled-hard":
            if distilled.labels.is_hard:
                missing.append({"arm": control, "why": "the labels of the set are its classes"})
            continue  # else it is among the arms of the set
        if control == "random" and is_soft and teacher is None:
            why = f"no teacher that gives random images {kind} labels" + (f" ({reason})" if reason else "")
            missing.append({"arm": control, "why": why})
        elif control in ("random", "noise") and is_soft:
            arms.append(_soft_control(control, distilled, protocol, seed, teacher))
        elif control in ("full", "full-equal"):
            arms.append(_full_control(control, distilled, protocol, task, device))
        elif control == "rs2":
            arms.append(
                _resampled_arm(control, "hard", len(distilled), protocol.budget(len(distilled)), protocol, seed)
            )
        else:
            arms.append(_hard_control(control, track, distilled, protocol, seed))
    if without_augmentation and is_soft and distilled.labels.per_view:
        missing.append({"arm": "distilled without augmentation", "why": f"{kind} labels belong to augmented views"})
    elif without_augmentation:
        arms += [
            dataclasses.replace(arm, augment=False)
            for arm in arms
            if arm.name in ("distilled", "random") and arm.labels == track
        ]
    return arms, missing


def _distilled_arms(
    distilled: DistilledSet, task: Task, protocol: Protocol, seed: int, device: torch.device, with_hard: bool
) -> tuple[list[Arm], list[dict[str, str]]]:
    """The set with its own labels on the soft track, with the classes of its images on the hard track.

    ``with_hard`` adds the latter on the soft track; HLR compares hard labels with hard labels.
    """
    if distilled.resampling:
        size = distilled.resampling.size(len(task.train))
        return [_resampled_arm("distilled", "own", size, protocol.budget(len(distilled)), protocol, seed)], []
    kind, lr = distilled.labels.kind, learned_lr(distilled)
    rates = tuple(protocol.lr) if lr is None else (lr,)
    own_images = own_source(distilled, device)
    own = Arm(
        "distilled",
        "own",
        distilled.sha256() + distilled.labels.target_version,
        protocol.budget(len(distilled)),
        rates,
        lambda *_: own_images,
        uses_learned_lr=lr is not None,
    )
    if distilled.labels.is_hard:
        return [own], []
    hard_images = hard_source(distilled, device)
    content_key = f"{distilled.sha256()}-hard"
    hard = dataclasses.replace(own, labels="hard", content_key=content_key, source=lambda *_: hard_images)
    if protocol.labels == "hard":
        why = f"{protocol.name} judges hard labels; take a protocol of the soft track, e.g. dc-soft-v1"
        return [hard], [{"arm": f"distilled with its {kind} labels", "why": why}]
    return [own, hard] if with_hard else [own], []


def _control_budget(distilled: DistilledSet, protocol: Protocol) -> tuple[int, tuple[float, ...]]:
    """Steps and learning rates of controls of the set's size: a learned rate competes with those of the protocol."""
    rates, lr = tuple(protocol.lr), learned_lr(distilled)
    return protocol.budget(len(distilled)), rates if lr is None or lr in rates else (*rates, lr)


def _soft_control(
    control: str, distilled: DistilledSet, protocol: Protocol, seed: int, teacher: nn.Module | None
) -> Arm:
    """Random real images or noise with labels of the set's kind."""
    steps, rates = _control_budget(distilled, protocol)
    if control == "noise":
        source = functools.partial(_soft_noise_source, seed, distilled)
        return Arm(
            control, "own", f"noise-for-{distilled.sha256()}{distilled.labels.target_version}", steps, rates, source
        )
    assert teacher is not None
    ipc, kind, rule = int(distilled.manifest["ipc"]), distilled.labels.kind, distilled.labels.cache_key()
    content_key = f"random-{ipc}-{kind}-{tensors_sha256(teacher.state_dict())}-{rule}"
    source = functools.partial(_teacher_labelled_source, seed, ipc, distilled, teacher)
    return Arm(control, "own", content_key, steps, rates, source)


def _hard_control(control: str, track: str, distilled: DistilledSet, protocol: Protocol, seed: int) -> Arm:
    """Random real images or noise with their classes."""
    steps, rates = _control_budget(distilled, protocol)
    ipc = int(distilled.manifest["ipc"])
    if control == "random-hard":
        return Arm(control, "hard", f"random-{ipc}", steps, rates, functools.partial(random_source, seed, ipc, 0.0))
    if control == "random-bytes":
        count = equal_byte_count(distilled)
        source = functools.partial(random_bytes_source, seed, count)
        return Arm(control, "hard", f"{control}-{count}", steps, rates, source)
    smoothing = distilled.labels.smoothing
    source = functools.partial(random_source if control == "random" else noise_source, seed, ipc, smoothing)
    content_key = f"{control}-{ipc}" + (f"-smoothing{smoothing}" if smoothing else "")
    return Arm(control, track, content_key, steps, rates, source)


def _full_control(control: str, distilled: DistilledSet, protocol: Protocol, task: Task, device: torch.device) -> Arm:
    """All real images: for the protocol's epochs (full), or for the steps of the distilled arm (full-equal)."""
    steps = protocol.budget(len(distilled))
    if control == "full":
        steps = max(protocol.full_epochs * math.ceil(len(task.train) / protocol.batch), steps)
    return Arm(control, "hard", "full", steps, tuple(protocol.lr), lambda task, run: TaskSource(task, device))


def _resampled_arm(name: str, labels: str, size: int, steps: int, protocol: Protocol, seed: int) -> Arm:
    """``size`` real images with their classes in each epoch, other ones each time."""
    source = functools.partial(resampled_source, seed, size)
    return Arm(name, labels, f"rs2-{size}", steps, tuple(protocol.lr), source)


# -- sources ----------------------------------------------------------------------------------------------------------


def learned_lr(distilled: DistilledSet) -> float | None:
    """The learning rate that was learned with the set, if any."""
    return distilled.manifest.get("learned_lr")


def own_source(distilled: DistilledSet, device: torch.device) -> FixedSource:
    """The images of the set with its labels."""
    images, ids = distilled.training_images()
    return FixedSource(images.to(device), distilled.labels.to(device), ids)


def hard_source(distilled: DistilledSet, device: torch.device) -> FixedSource:
    """The images of the set with their classes as labels."""
    images, ids = distilled.training_images()
    labels = HardLabels(distilled.hard_labels(), len(distilled.classes)).to(device)
    return FixedSource(images.to(device), labels, ids)


def random_source(seed: int, ipc: int, smoothing: float, task: Task, run: int) -> FixedSource:
    """``ipc`` random real images of each class with their classes."""
    images, classes = task.per_class(ipc, (seed, "random-arm", run))
    return FixedSource(images, HardLabels(classes, task.num_classes, smoothing))


def resampled_source(seed: int, size: int, task: Task, run: int) -> ResampledSource:
    """``size`` random real images with their classes in each epoch."""
    return ResampledSource(task, size, (seed, "rs2-arm", run), task.device)


def noise_source(seed: int, ipc: int, smoothing: float, task: Task, run: int) -> FixedSource:
    """``ipc`` images of Gaussian noise for each class."""
    classes = torch.arange(task.num_classes).repeat_interleave(ipc)
    noise = torch.randn((len(classes), *task.shape), generator=rng.generator(seed, "noise-arm", run))
    return FixedSource(noise.to(task.device), HardLabels(classes.to(task.device), task.num_classes, smoothing))


def _teacher_labelled_source(
    seed: int, ipc: int, distilled: DistilledSet, teacher: nn.Module, task: Task, run: int
) -> FixedSource:
    """Random real images with labels of ``teacher``, of the kind and with the settings of the set."""
    images, classes = task.per_class(ipc, (seed, "random-arm", run))
    views = rng.key(seed, "views", run)
    labels: Any = distilled.labels
    if getattr(labels, "views", None) is not None and labels.views.tiles:  # these images are no collages
        labels = copy.copy(labels)
        labels.views = dataclasses.replace(labels.views, tiles=0)
    return FixedSource(images, labels.label_images(images, teacher.to(images.device), views, classes))


def _soft_noise_source(seed: int, distilled: DistilledSet, task: Task, run: int) -> FixedSource:
    """As many noise images as the set decodes to, with the labels of the set; live teachers label the noise."""
    ids = distilled.training_images()[1]
    noise = torch.randn((len(ids), *task.shape), generator=rng.generator(seed, "noise-arm", run))
    return FixedSource(noise.to(task.device), distilled.labels.to(task.device), ids)


def equal_byte_count(distilled: DistilledSet) -> int:
    """Number of hard-labelled 8-bit images of the set's shape that fit into the bytes of the set."""
    label_bits = math.ceil(math.log2(len(distilled.classes)))
    return max(1, 8 * distilled.nbytes()["total"] // (8 * math.prod(distilled.shape) + label_bits))


def random_bytes_source(seed: int, count: int, task: Task, run: int) -> FixedSource:
    """``count`` random real images, as even over the classes as possible; all images if there are fewer."""
    order = rng.Draws(seed, "random-bytes-classes", run).permutation(task.num_classes).tolist()
    shares = even_shares(min(count, len(task.train)), task.counts[order].tolist())
    parts = (seed, "random-bytes-arm", run)
    share_of_class = sorted(zip(order, shares))
    ids = torch.cat([task.sample_ids(share, parts, [number]) for number, share in share_of_class])
    labels = torch.from_numpy(task.train.labels[ids.numpy()]).to(task.device)
    return FixedSource(task.batch(ids), HardLabels(labels, task.num_classes))
