"""New labels for an existing set: relabelling with a teacher, and the manifest of the result."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from condense.augment import CropViews, ViewRule
from condense.errors import CondenseError
from condense.files import tensors_sha256
from condense.labels import Labels, PerViewLabels, check_image_count, compute_view_logits
from condense.networks import device_of
from condense.sets.distilled import DistilledSet


@torch.no_grad()
def relabel(
    distilled: DistilledSet,
    teacher: nn.Module,
    epochs: int,
    seed: int = 0,
    *,
    views: CropViews | ViewRule | None = None,
    temperature: float = 20.0,
    squared: bool = True,
    loss_kind: str = "kl",
    gamma: float = 0.0,
    calibrate: Sequence[float] | None = None,
    statistics: str = "running",
    micro: int = 8,
    batch_size: int = 256,
    start: int = 0,
    into: Any = None,
    quiet: bool = True,
    description: str | None = None,
    teacher_seconds: float | None = None,
) -> DistilledSet:
    """Labels a set with a teacher's logits on ``epochs`` epochs of augmented views (FKD, the relabel stage of SRe2L).

    The labels need 2 * epochs * images * classes bytes. The teacher is left in eval mode on its own device; inside
    ``torch.autocast`` it runs in that precision. The new manifest omits the protocol and the learned learning rate of
    the old labels, and the name gets the tag ``relabelled``.

    Args:
        distilled: A set without decode stages that cut stored images up.
        teacher: Network from images (B,C,H,W) in training space to logits (B, classes).
        epochs: Number of labelled epochs, each with its own views; students repeat them.
        seed: Seed of the views.
        views: Distribution of the views. Default: crops of 8 % to 100 %, flipped only if the set's classes allow it.
        temperature: T of targets and loss.
        squared, loss_kind, gamma, calibrate: See :class:`PerViewLabels`.
        statistics, micro, batch_size, start, into, quiet: See :func:`compute_view_logits`.
        description: Name of the teacher in the manifest, which also gets a digest of its weights. Default: its class.
        teacher_seconds: Seconds that training the teacher took; added to the set's cost together with the seconds of
            labelling. None: the cost of the new set is unknown.

    Returns:
        A new set with the same images.

    Raises:
        CondenseError: The set has decode stages, ``epochs`` is below 1, the logits do not fit the classes or are not
            finite, or an option is invalid.
    """
    _check_stages(distilled)
    if epochs < 1:
        raise CondenseError(f"epochs={epochs}: must be at least 1")
    began = time.monotonic()
    device = device_of(teacher)
    images, classes = distilled.training_images()[0].to(device), len(distilled.classes)
    rule = ViewRule(flip=distilled.manifest.get("mirror", True)) if views is None else ViewRule.of(views)
    hard = distilled.hard_labels() if gamma or calibrate is not None else None
    options: dict[str, Any] = {
        "loss_kind": loss_kind,
        "gamma": gamma,
        "calibrate": calibrate,
        "hard": hard,
        "statistics": statistics,
        "micro": micro,
    }
    blank = torch.zeros(1, len(images), classes)
    PerViewLabels(blank, seed, rule, temperature, squared, **options)  # checks the arguments before labelling
    logits = compute_view_logits(
        teacher,
        images,
        epochs,
        rule,
        seed,
        classes=classes,
        statistics=statistics,
        micro=micro,
        batch_size=batch_size,
        start=start,
        into=into,
        quiet=quiet,
    )
    labels = PerViewLabels(logits, seed, rule, temperature, squared, **options)
    seconds = None if teacher_seconds is None else teacher_seconds + time.monotonic() - began
    return replace_labels(distilled, labels, teacher, description=description, seconds=seconds)


def replace_labels(
    distilled: DistilledSet,
    labels: Labels,
    teacher: nn.Module,
    *,
    description: str | None = None,
    seconds: float | None = None,
) -> DistilledSet:
    """Returns the same images with other labels, and a manifest without the facts about the old labels.

    Args:
        distilled: A set; for per-view labels one without decode stages that cut stored images up.
        labels: Labels of the stored images, or of the decoded images if the set has an INFER stage.
        teacher: Network that computed them.
        description: Name of the teacher in the manifest, which also gets a digest of its weights. Default: its class.
        seconds: Seconds of training the teacher and of labelling, added to the set's cost. None: unknown.

    Raises:
        CondenseError: The set has decode stages, or another number of images.
    """
    if labels.per_view:
        _check_stages(distilled)
    check_image_count(distilled.training_images()[0] if distilled.compensated else distilled.stored, labels)
    teachers = {"network": description or type(teacher).__name__, "sha256": tensors_sha256(teacher.state_dict())}
    outdated = ("bytes", "checksums", "protocol", "learned_lr", "label_source", "claim", "command")
    manifest = {key: value for key, value in distilled.manifest.items() if key not in outdated}
    cost = add_preparation_seconds(manifest.get("cost", {}), seconds)
    manifest = {**manifest, "name": add_tag(distilled.name, "relabelled"), "cost": cost, "teacher": teachers}
    return DistilledSet(distilled.stored, labels, distilled.transform, manifest)


def add_preparation_seconds(cost: Mapping[str, Any], seconds: float | None) -> dict[str, Any]:
    """Adds seconds of preparation to a set's cost. None, or an unknown cost, gives an unknown cost."""
    total = dict(cost)
    if seconds is None:
        total.pop("seconds", None)
    elif "seconds" in total:
        total["preparation_seconds"] = round(total.get("preparation_seconds", 0.0) + seconds, 2)
    return total


def add_tag(name: str, tag: str) -> str:
    """Appends a tag to a set's name."""
    return name + ("-" if "." in name.rpartition("/")[2] else ".") + tag


def _check_stages(distilled: DistilledSet) -> None:
    if distilled.stages and not distilled.compensated:
        raise CondenseError(f"{distilled.name}: views are labelled by stored image, and this set decodes into more")
