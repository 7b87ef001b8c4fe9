"""From recovered images to a labelled set: images are stored, then teachers label what is stored."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from condense import rng
from condense.data import to_unit_range
from condense.engine import VIEW_LABELS_FILE, VIEW_LABELS_STATE_FILE, Interrupted, Run
from condense.errors import CondenseError
from condense.files import tensors_sha256
from condense.labels import (
    DistanceLabels,
    HardLabels,
    Labels,
    PerViewLabels,
    PoolLabels,
    PruningOptions,
    SoftLabels,
    StaticLabels,
    TeacherLabels,
    compute_logits,
    compute_pool_logits,
    compute_view_logits,
    compute_view_nll,
    grouping_version,
    resumable_logits,
)
from condense.methods.curriculum_synthesis.patches import get_crop_size
from condense.methods.curriculum_synthesis.settings import STORAGE_DTYPES, RelabelOptions
from condense.pretraining import Committee, TeacherOptions, get_committee
from condense.sets import SyntheticSet


def get_teachers(config: TeacherOptions, run: Run, batch_norm: bool = True) -> Committee:
    """The teachers of a run: from the file that the user named, from the cache, or trained now.

    Args:
        config: settings of the teachers.
        run: the run.
        batch_norm: all must have BatchNorm, whose statistics the method matches.

    Raises:
        CondenseError: the data are whitened, or not square where the initial images are crops.
    """
    if run.task.transform.kind != "standardise":
        raise CondenseError("zca=true: recovered pixels are kept in their range, which whitening does not have")
    init = getattr(config, "init", "")
    if init in ("patches", "critical"):
        get_crop_size(run.task, 1, f"init={init}")
    return get_committee(config, run, batch_norm=batch_norm)


def finish_set(
    config: RelabelOptions,
    run: Run,
    images: Tensor,
    classes: Tensor,
    committee: Committee,
    weights: Sequence[float] | None = None,
    make: Callable[..., Labels] | None = None,
) -> SyntheticSet:
    """The set with its images as stored and the labels that the teachers give these.

    Args:
        config: settings of the method.
        run: the run.
        images: (N, C, H, W) in training space, sorted by class.
        classes: int64 (N,).
        committee: the teachers.
        weights: of their logits; equal if None.
        make: makes the labels, in place of :func:`make_labels`.
    """
    stored = to_storage(run.task.transform.inverse(images.detach()).clamp(0, 1), config.store)
    labels = (make or make_labels)(config, run, stored, classes, committee, weights)
    synthetic = SyntheticSet(run.task, stored, classes, space="pixel", labels=labels)
    synthetic.tensors["images"].requires_grad_(False)
    if not labels.is_hard:
        synthetic.label_source = {"teachers": committee.describe(), "weights": list(weights) if weights else None}
    return synthetic


def to_storage(pixels: Tensor, store: str) -> Tensor:
    """Pixels in [0, 1] in the data type of the file; uint8 is rounded, never compressed."""
    return (pixels * 255).round().to(torch.uint8) if store == "uint8" else pixels.to(STORAGE_DTYPES[store])


def make_labels(
    config: RelabelOptions,
    run: Run,
    stored: Tensor,
    classes: Tensor,
    committee: Committee,
    weights: Sequence[float] | None = None,
) -> Labels:
    """The labels that teachers give stored images (N, C, H, W), of the kind that ``config`` names."""
    task, images = run.task, run.task.transform(to_unit_range(stored))
    rule, seed = config.view_rule(task.mirror, task.transform), rng.key(run.seed, "labels")
    teacher = committee.ensemble(weights)
    statistics: dict[str, Any] = {"statistics": config.label_statistics, "micro": config.label_micro}
    if config.labels == "hard":
        return HardLabels(classes, task.num_classes)
    with run.autocast():
        if config.labels == "soft":
            return SoftLabels(compute_logits(teacher, images, **statistics))
        if config.labels == "static":
            logits = compute_logits(teacher, images, **statistics).half()
            return StaticLabels(logits, seed, rule, config.temperature, config.squared)
        if config.labels == "teacher":
            members, names = zip(*((member.network, member.name) for member in committee.members))
            return TeacherLabels(
                members,
                len(images),
                seed,
                rule,
                config.temperature,
                config.squared,
                weights=weights,
                names=names,
                shape=task.shape,
                **statistics,
            )
        return _make_view_labels(config, run, stored, classes, teacher, statistics)


def _make_view_labels(
    config: RelabelOptions, run: Run, stored: Tensor, classes: Tensor, teacher: Any, statistics: dict[str, Any]
) -> Labels:
    """Labels of views: logits (per-view), few of them (pool), or two negative log-likelihoods each (distances)."""
    images, count, epochs = run.task.transform(to_unit_range(stored)), run.task.num_classes, config.label_epochs
    rule, seed = config.view_rule(run.task.mirror, run.task.transform), rng.key(run.seed, "labels")
    common = {**statistics, "classes": count, "quiet": run.quiet or not run.ranks.is_main_process}
    pruning = config if config.labels == "pool" and isinstance(config, PruningOptions) else None
    records = epochs if pruning is None else pruning.count(epochs)
    computed = records
    if pruning is not None and config.label_statistics == "batch":  # also views next to those that are kept
        computed = min(epochs, records * count)
    width = 2 if config.labels == "distances" else count
    storing = resumable_labels(config, run, stored, seed, records, width, in_order=pruning is None)
    with run.stage("labelling", computed) as stage, storing as where:
        some = min(stage.units, epochs)
        if config.labels == "distances":
            values = compute_view_nll(teacher, images, classes, some, rule, seed, **common, **where)
        elif pruning is not None and stage.units == computed:
            values = compute_pool_logits(teacher, images, classes, epochs, rule, seed, records, **common, **where)
        else:
            values = compute_view_logits(teacher, images, some, rule, seed, **common, **where)
    values = values.expand(records, -1, -1)  # a dry run has labelled one epoch
    if config.labels == "distances":
        return DistanceLabels(values, classes, count, seed, rule, **statistics)
    if pruning is not None:
        return PoolLabels.recorded(
            values,
            epochs,
            pruning.encode,
            pruning.cooled(),
            seed=seed,
            views=rule,
            temperature=config.temperature,
            squared=config.squared,
            hard=classes,
            **statistics,
        )
    return PerViewLabels(
        values,
        seed,
        rule,
        config.temperature,
        config.squared,
        calibrate=config.thresholds(),
        hard=classes if config.calibrate else None,
        **statistics,
    )


@contextlib.contextmanager
def resumable_labels(
    config: RelabelOptions, run: Run, stored: Tensor, seed: int, records: int, width: int, in_order: bool
) -> Iterator[dict[str, Any]]:
    """Where ``records`` labels of views per image are collected, as keywords of ``compute_view_logits``: in a file of
    the run directory, so that memory holds one epoch and a killed run continues there; in memory for a run without
    one."""
    if run.directory is None or not run.ranks.is_main_process:
        yield {}
        return

    def stop() -> None:
        if run.stop_requested and run.ranks.world_size == 1:
            raise Interrupted(f"stopped while labelling views; continue with: {run.resume_call}")

    path, state = run.directory / VIEW_LABELS_FILE, run.directory / VIEW_LABELS_STATE_FILE
    key = [tensors_sha256({"images": stored}), seed, str(config)]
    key += [version] if (version := grouping_version(config.label_statistics)) else []
    with resumable_logits(path, state, key, (records, len(stored), width), stop, in_order=in_order) as where:
        yield where
