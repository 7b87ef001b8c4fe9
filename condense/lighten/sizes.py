"""Bytes of every kind of labels, predicted from the sizes of a set."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from condense import networks, rng
from condense.labels import (
    DEFAULT_MAX_K,
    DEFAULT_MAX_RANK,
    DistanceLabels,
    HalfCode,
    HardLabels,
    Int8TeacherLabels,
    LowRankCode,
    PerViewLabels,
    ProjectorLabels,
    SoftLabels,
    StaticLabels,
    TopKCode,
    default_size,
)
from condense.lighten.settings import PoolOptions

# Bytes before there is a set ------------------------------------------------------------------------------------------

_RULE = 3 * 8 + 3 * 4 + 3
"""Bytes that views follow from, of whatever kind."""


def label_bytes(
    classes: int,
    images: int,
    epochs: int,
    *,
    teacher_bytes: int | None = None,
    projector_bytes: tuple[int, int] | None = None,
) -> list[LabelComparison]:
    """What labels of every kind would need at their usual settings, the heaviest first.

    Args:
        classes: C.
        images: N, of the set.
        epochs: E, labelled epochs of views.
        teacher_bytes: of labels=teacher, see :func:`int8_bytes`; None: no such row.
        projector_bytes: of labels=projector, in the file and external; None: no such row.
    """
    views, terms = epochs * images, _RULE + 2 * 4 + 2
    coded = terms + 3 * 4  # the stated error
    number = 1 if classes <= 1 << 8 else 2 if classes <= 1 << 16 else 8
    rank, k, pruning = default_size(classes, DEFAULT_MAX_RANK), default_size(classes, DEFAULT_MAX_K), PoolOptions()
    pooled = 2 * pruning.count(epochs) * images * classes + number * images + 8 + len(HalfCode.name) + coded
    rows: list[tuple[str, int, int, Any]] = [
        ("per-view", 2 * views * classes + terms, 0, PerViewLabels),
        (f"lowrank:rank={rank}", views * rank + rank * (4 + 2 * classes) + 2 * classes + coded, 0, LowRankCode),
        (f"pool:keep={pruning.keep:g}", pooled, 0, HalfCode),
        ("distances", 4 * views + 8 * images + 4 + _RULE, 0, DistanceLabels),
        ("static", 2 * images * classes + 4 + 1 + _RULE, 0, StaticLabels),
        ("soft", 4 * images * classes, 0, SoftLabels),
        ("hard", math.ceil(images * math.ceil(math.log2(classes)) / 8), 0, HardLabels),
    ]
    if classes <= 1 << 16:
        rows.append((f"topk:k={k}", views * (k * (2 + number) + 2) + coded, 0, TopKCode))
    if teacher_bytes is not None:
        rows.append(("teacher:weights=int8", teacher_bytes, 0, Int8TeacherLabels))
    if projector_bytes is not None:
        rows.append(("projector", *projector_bytes, ProjectorLabels))
    points = [
        LabelComparison(specification, specification.partition(":")[0], stored, external, labels.exactness)
        for specification, stored, external, labels in rows
    ]
    return sorted(points, key=lambda point: -point.bytes - point.external)


def int8_bytes(names: Sequence[str], shape: networks.Shape, classes: int) -> int:
    """Bytes of labels=teacher of networks of these architectures, which follow from no weight."""
    with rng.seeded("layout"):
        members = [networks.build_network(name, shape, classes) for name in names]
    return Int8TeacherLabels(members, 0, 0, names=names, shape=shape).nbytes()


# Accuracy against bytes -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LabelComparison:
    """One kind of labels for a set: what it needs and, where students were trained, what they reach."""

    words: str
    """The kind with its settings; ``own`` is the set's own labels."""
    kind: str = ""
    bytes: int = 0
    external: int = 0
    exactness: str = ""
    step_cost: str = ""
    mean: float | None = None
    """Accuracy, a fraction."""
    ci95: tuple[float, float] | None = None
    missing: str = ""
    """Why there is none."""
