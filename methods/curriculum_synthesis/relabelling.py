"""TODO-DOC."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from condense import rng
from condense.data import unit
from condense.engine import VIEW_LABELS, VIEW_LABELS_STATE, Interrupted, Run
from condense.errors import CondenseError
from condense.files import content
from condense.labels import (
    DistanceLabels,
    HardLabels,
    Labels,
    PerViewLabels,
    PoolLabels,
    Pruning,
    SoftLabels,
    StaticLabels,
    TeacherLabels,
    answers,
    pool_answers,
    stored_answers,
    view_answers,
    view_distances,
)
from condense.methods.curriculum_synthesis.patches import side
from condense.methods.curriculum_synthesis.settings import STORES, Relabelling
from condense.pretraining import Committee, TeacherOptions
from condense.pretraining.committee import provide
from condense.sets import SyntheticSet

# -- steps that the methods share -------------------------------------------------------------------------------------


def squeezed(config: TeacherOptions, run: Run) -> Committee:
    """The teachers of a run, all with BatchNorm: of the file that was named, of the cache, or trained now."""
    if run.task.transform.kind != "standardise":
        raise CondenseError("zca=true: recovered pixels are kept in their range, which whitening does not have")
    start = getattr(config, "init", "")
    if start in ("patches", "critical"):
        side(run.task, 1, f"init={start}")
    return provide(
        run, config.squeezing(run.task), file=config.teachers, architectures=config.architectures(run.network),
        count=config.num_teachers, batch_norm=True,
    )  # fmt: skip


def finished(
    config: Relabelling,
    run: Run,
    images: Tensor,
    classes: Tensor,
    committee: Committee,
    weights: Sequence[float] | None = None,
    labelling: Callable[..., Labels] | None = None,
) -> SyntheticSet:
    """The set as it is kept, with the labels that the committee gives the images as kept.

    Args:
        config: of the method.
        run: its run.
        images: (N,C,H,W) in training space, sorted by class.
        classes: int64 (N,).
        committee: the teachers.
        weights: of their logits; equal where None.
        labelling: what makes the labels, in place of :func:`relabelled`.
    """
    stored = kept(run.task.transform.inverse(images.detach()).clamp(0, 1), config.store)
    labels = (labelling or relabelled)(config, run, stored, classes, committee, weights)
    made = SyntheticSet(run.task, stored, classes, space="pixel", labels=labels)
    made.tensors["images"].requires_grad_(False)
    if labels.kind != "hard":
        made.label_source = {"teachers": committee.describe(), "weights": list(weights) if weights else None}
    return made


def kept(pixels: Tensor, store: str) -> Tensor:
    """Pixels in [0,1] as a file keeps them; uint8 are rounded, never compressed."""
    return (pixels * 255).round().to(torch.uint8) if store == "uint8" else pixels.to(STORES[store])


def relabelled(
    config: Relabelling,
    run: Run,
    stored: Tensor,
    classes: Tensor,
    committee: Committee,
    weights: Sequence[float] | None = None,
) -> Labels:
    """The labels that a committee gives stored images (N,C,H,W), of the kind that ``config`` names."""
    task, count = run.task, run.task.num_classes
    images, rule = task.transform(unit(stored)), config.rule(task.mirror)
    seed, teacher = rng.key(run.seed, "labels"), committee.mean(weights)
    kind, temperature, squared = config.labels, config.temperature, config.squared
    statistics: dict[str, Any] = {"statistics": config.label_statistics, "micro": config.label_micro}
    how: dict[str, Any] = {**statistics, "classes": count, "quiet": run.quiet or not run.ranks.leads}
    with run.fast():
        if kind == "hard":
            return HardLabels(classes, count)
        if kind == "soft":
            return SoftLabels(answers(teacher, images, **statistics))
        if kind == "static":
            return StaticLabels(answers(teacher, images, **statistics).half(), seed, rule, temperature, squared)
        if kind == "teacher":
            members, names = zip(*((member.network, member.name) for member in committee.members))
            return TeacherLabels(
                members, len(images), seed, rule, temperature, squared, weights=weights, names=names,
                shape=task.shape, **statistics,
            )  # fmt: skip
        two, pruning = kind == "distances", config if kind == "pool" and isinstance(config, Pruning) else None
        records = asked = config.label_epochs if pruning is None else pruning.count(config.label_epochs)
        if pruning is not None and config.label_statistics == "batch":  # those beside what is kept are asked about too
            asked = min(config.label_epochs, records * count)
        storing = in_making(config, run, stored, seed, records, 2 if two else count)
        with run.stage("labelling", asked) as done, storing as where:
            epochs = min(done, config.label_epochs)
            if two:
                found = view_distances(teacher, images, classes, epochs, rule, seed, **how, **where)
            elif pruning is not None and done == asked:
                found = pool_answers(teacher, images, classes, config.label_epochs, rule, seed, records, **how, **where)
            else:
                found = view_answers(teacher, images, epochs, rule, seed, **how, **where)
    found = found.expand(records, -1, -1)  # a dry run has made one epoch
    if two:
        return DistanceLabels(found, classes, count, seed, rule, **statistics)
    if pruning is not None:
        return PoolLabels.recorded(
            found, config.label_epochs, pruning.encode, pruning.cooled(), seed=seed, views=rule,
            temperature=temperature, squared=squared, hard=classes, **statistics,
        )  # fmt: skip
    return PerViewLabels(
        found, seed, rule, temperature, squared, calibrate=config.thresholds(),
        hard=classes if config.calibrate else None, **statistics,
    )  # fmt: skip


@contextlib.contextmanager
def in_making(
    config: Relabelling, run: Run, stored: Tensor, seed: int, records: int, width: int
) -> Iterator[dict[str, Any]]:
    """Where ``records`` labels of views of each image go while they are made, as keywords of ``view_answers``: into a
    file of the run's folder, so that memory holds one epoch and a run that was killed goes on in the middle; else into
    memory."""
    if run.directory is None or not run.ranks.leads:
        yield {}
        return

    def stop() -> None:
        if run.asked_to_stop and run.ranks.world == 1:
            raise Interrupted(f"stopped while labelling views; go on with: condense resume {run.directory}")

    path, state = run.directory / VIEW_LABELS, run.directory / VIEW_LABELS_STATE
    key = [content({"images": stored}), seed, str(config)]
    with stored_answers(path, state, key, (records, len(stored), width), stop) as where:
        yield where
