"""TODO-DOC."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from condense.augment import CropViews, ViewRule
from condense.errors import CondenseError
from condense.files import content
from condense.labels import Labels, PerViewLabels, check_image_count, view_answers
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
    """The same images with a teacher's logits on ``epochs`` stored epochs of augmented views (FKD, SRe2L's relabel).

    Needs 2 * epochs * images * classes bytes. The teacher works in the set's training space, on its own device, and is
    left in eval mode; inside ``torch.autocast`` it works in that precision. The manifest loses the protocol and the
    learned rate of the old labels, and the name ends in ``.relabelled``.

    Args:
        distilled: a set without decode stages that cut stored images up.
        teacher: images (B,C,H,W) in training space to logits (B, classes).
        epochs: passes over the set with views of their own; students start again after them.
        seed: of the views.
        views: how they are drawn; when None crops of 8 % to 100 %, mirrored only where the set's classes allow it.
        temperature: T of targets and loss.
        squared, loss_kind, gamma, calibrate: see :class:`PerViewLabels`.
        statistics, micro, batch_size, start, into, quiet: see :func:`view_answers`.
        description: what the manifest calls the teacher; its class when None. A digest of its weights is added.
        teacher_seconds: what training it took; joins the set's cost with the time of labelling. None: the cost of the
            new set is unknown.

    Raises:
        CondenseError: the set has decode stages, epochs are below 1, the logits do not fit the classes or are not
            finite, or an option that cannot be.
    """
    _check_stages(distilled)
    if epochs < 1:
        raise CondenseError(f"epochs={epochs}: must be at least 1")
    began = time.monotonic()
    device = device_of(teacher)
    images, classes = distilled.training_images()[0].to(device), len(distilled.classes)
    rule = ViewRule(flip=distilled.manifest.get("mirror", True)) if views is None else ViewRule.of(views)
    hard = distilled.hard_labels() if gamma or calibrate is not None else None
    how: dict[str, Any] = {
        "loss_kind": loss_kind,
        "gamma": gamma,
        "calibrate": calibrate,
        "hard": hard,
        "statistics": statistics,
        "micro": micro,
    }
    blank = torch.zeros(1, len(images), classes)
    PerViewLabels(blank, seed, rule, temperature, squared, **how)  # what cannot be is found before the work
    logits = view_answers(
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
    labels = PerViewLabels(logits, seed, rule, temperature, squared, **how)
    seconds = None if teacher_seconds is None else teacher_seconds + time.monotonic() - began
    return relabelled(distilled, labels, teacher, description=description, seconds=seconds)


def relabelled(
    distilled: DistilledSet,
    labels: Labels,
    teacher: nn.Module,
    *,
    description: str | None = None,
    seconds: float | None = None,
) -> DistilledSet:
    """The same images with other labels, and a manifest that claims nothing of the old ones.

    Args:
        distilled: a set, for labels of views without decode stages that cut stored images up.
        labels: one for each stored image, or, where a stage makes images with labels of their own, for each of these.
        teacher: who gave them.
        description: what the manifest calls the teacher; its class when None. A digest of its weights is added.
        seconds: what training the teacher and labelling took; joins the set's cost. None: it is unknown.

    Raises:
        CondenseError: the set has decode stages, or another number of images.
    """
    if labels.per_view:
        _check_stages(distilled)
    check_image_count(distilled.training_images()[0] if distilled.compensated else distilled.stored, labels)
    teachers = {"network": description or type(teacher).__name__, "sha256": content(teacher.state_dict())}
    outdated = ("bytes", "checksums", "protocol", "learned_lr", "label_source", "claim", "command")
    kept = {key: value for key, value in distilled.manifest.items() if key not in outdated}
    cost = prepared(kept.get("cost", {}), seconds)
    manifest = {**kept, "name": tagged(distilled.name, "relabelled"), "cost": cost, "teacher": teachers}
    return DistilledSet(distilled.stored, labels, distilled.transform, manifest)


def prepared(cost: Mapping[str, Any], seconds: float | None) -> dict[str, Any]:
    """A set's cost with seconds of work done for its labels elsewhere; None: it is unknown, and what is unknown stays
    so."""
    known = dict(cost)
    if seconds is None:
        known.pop("seconds", None)
    elif "seconds" in known:
        known["preparation_seconds"] = round(known.get("preparation_seconds", 0.0) + seconds, 2)
    return known


def tagged(name: str, tag: str) -> str:
    """A set's name with one more word in its tag."""
    return name + ("-" if "." in name.rpartition("/")[2] else ".") + tag


def _check_stages(distilled: DistilledSet) -> None:
    if distilled.stages and not distilled.compensated:
        raise CondenseError(f"{distilled.name}: views are labelled by stored image, and this set decodes into more")
