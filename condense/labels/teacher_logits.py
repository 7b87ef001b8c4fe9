"""a teacher's logits on every view, resumable."""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condense import rng
from condense.augment import MixedViews, ViewRule
from condense.errors import CondenseError, did_you_mean
from condense.tracking import Progress

STATISTICS = ("running", "batch")


def check_statistics(statistics: str, micro: int) -> tuple[str, int]:
    """Both, if they can be; ``micro`` is 0 where it has no say, so that equal rules read equal."""
    if statistics not in STATISTICS:
        raise CondenseError(f"statistics={statistics}: unknown{did_you_mean(statistics, STATISTICS)}")
    if statistics == "batch" and micro < 2:
        raise CondenseError(f"micro={micro}: one view has no statistics of a batch; take at least 2")
    return statistics, micro if statistics == "batch" else 0


@functools.lru_cache(maxsize=16)
def draw_epoch_views(
    views: ViewRule, seed: int, epoch: int, rows: int, size: tuple[int, int], device: torch.device
) -> MixedViews:
    """The views of a whole epoch, kept from batch to batch."""
    return views.draw(seed, epoch, rows, size).to(device)


def given_or_predicted_classes(images: Tensor, teacher: nn.Module, hard: Tensor | None) -> Tensor:
    """``hard``, or the classes that the teacher finds likeliest."""
    return answers(teacher, images).argmax(1) if hard is None else hard.to(images.device).long()


# Asking a teacher -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _answering(teacher: nn.Module, statistics: str) -> Iterator[None]:
    """The teacher in eval mode, for ``statistics="batch"`` with BatchNorm by the batch, and running statistics that
    stay as they are."""
    teacher.eval()
    norms = [m for m in teacher.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if statistics == "running" or not norms:
        yield
        return
    tracked = [norm.track_running_stats for norm in norms]
    for norm in norms:
        norm.training, norm.track_running_stats = True, False
    try:
        yield
    finally:
        for norm, before in zip(norms, tracked):
            norm.training, norm.track_running_stats = False, before


def _parts(rows: Tensor, size: int) -> list[Tensor]:
    """Consecutive parts of ``size`` rows; a last single one, which has no statistics, joins the part before it."""
    parts = list(rows.split(size))
    return [*parts[:-2], torch.cat(parts[-2:])] if len(parts) > 1 and len(parts[-1]) == 1 else parts


@torch.no_grad()
def answers(
    teacher: nn.Module, images: Tensor, *, statistics: str = "running", micro: int = 8, batch_size: int = 256
) -> Tensor:
    """The teacher's logits, float32 (N, classes), on images (N,C,H,W) as they are; it is left in eval mode.

    Args:
        teacher: images in training space, on its device, to logits.
        images: what it sees.
        statistics: ``running``, or ``batch``: BatchNorm by each micro-batch, without dropout (BSSL).
        micro: images of a micro-batch, consecutive; a last single one joins those before it.
        batch_size: images at once with running statistics.
    """
    batches = _parts(images, micro) if statistics == "batch" else images.split(batch_size)
    with _answering(teacher, statistics):
        return torch.cat([teacher(batch).float() for batch in batches])


def view_answers(
    teacher: nn.Module,
    images: Tensor,
    epochs: int,
    views: ViewRule,
    seed: int,
    *,
    classes: int,
    statistics: str = "running",
    micro: int = 8,
    batch_size: int = 256,
    start: int = 0,
    into: Any = None,
    report: Callable[[int], None] | None = None,
    quiet: bool = True,
) -> Tensor:
    """The teacher's logits on the views of a whole set, float16 (epochs, N, classes) on the CPU, epoch by epoch.

    Args:
        teacher: images in training space, on its device, to logits; left in eval mode.
        images: (N,C,H,W), the whole set.
        epochs: passes over the set, each with views of its own.
        views: how they are drawn.
        seed: of the views.
        classes: number of logits that the teacher must give.
        statistics: ``running``: the teacher as in any test. ``batch``: its BatchNorm normalises each micro-batch by its
            own statistics, running ones are left as they are, dropout is off (BSSL of CV-DD, whose release leaves
            dropout on). Micro-batches are consecutive parts of a permutation drawn for each epoch by ``seed``.
        micro: views of a micro-batch; a last single view joins the batch before it.
        batch_size: views at once with running statistics; of no consequence but for rounding.
        start: first epoch to label; those before are in ``into``.
        into: float16 (epochs, N, classes), a ``numpy.memmap`` or an HDF5 dataset open for writing, that takes each
            epoch when it is done, so that memory need hold one only and a run that was cut short goes on from
            ``start``. An HDF5 dataset is read whole at the end.
        report: called with the number of epochs that are done, after each.
        quiet: show no progress.

    Raises:
        CondenseError: answers that are no such logits or not finite as float16, or an ``into`` or ``start`` that does
            not fit.
    """
    how = _Asking(statistics, micro, batch_size, start, into, report, quiet)
    return _each_view(teacher, images, epochs, views, seed, classes, how, classes, lambda logits, ids, drawn: logits)


def view_distances(
    teacher: nn.Module,
    images: Tensor,
    hard: Tensor,
    epochs: int,
    views: ViewRule,
    seed: int,
    *,
    classes: int,
    **how: Any,
) -> Tensor:
    """-log of the teacher's probabilities of the classes of both images in each view, float16 (epochs, N, 2) on the
    CPU: what :class:`DistanceLabels` store. ``hard`` (N,) are the images' classes, ``views`` mix; the rest is as for
    :func:`view_answers`, ``into`` being (epochs, N, 2)."""

    def distances(logits: Tensor, ids: Tensor, drawn: MixedViews) -> Tensor:
        assert drawn.partner is not None
        known = hard.to(logits.device)
        two = torch.stack([known[ids], known[drawn.partner[ids]]], 1)
        return -F.log_softmax(logits, -1).gather(1, two)

    return _each_view(teacher, images, epochs, views, seed, classes, _Asking(**how), 2, distances)


@torch.no_grad()
def epoch_answers(
    teacher: nn.Module,
    images: Tensor,
    views: ViewRule,
    seed: int,
    epoch: int,
    *,
    classes: int,
    statistics: str = "running",
    micro: int = 8,
    batch_size: int = 256,
    wanted: Tensor | None = None,
) -> Iterator[tuple[Tensor, Tensor, MixedViews]]:
    """The teacher's logits on the views of one epoch, part by part: rows of the images, int64 (B,) on the CPU, logits
    float32 (B, classes), and all that was drawn for the epoch.

    ``wanted`` (N,) marks rows that matter, all when None. No others are asked for with running statistics; with those
    of the batch, whose others have a say, only micro-batches without any are left out. The rest is as for
    :func:`view_answers`.

    Raises:
        CondenseError: answers that are no such logits.
    """
    statistics, micro = check_statistics(statistics, micro)
    drawn = draw_epoch_views(views, seed, epoch, len(images), (images.shape[2], images.shape[3]), images.device)
    if statistics == "batch":
        parts = _parts(rng.Draws(seed, "label-batch", epoch).permutation(len(images)), micro)
        parts = parts if wanted is None else [part for part in parts if bool(wanted[part].any())]
    else:
        rows = torch.arange(len(images)) if wanted is None else wanted.nonzero()[:, 0]
        parts = list(rows.split(batch_size))
    for part in parts:
        ids = part.to(images.device)
        logits = answers(
            teacher, views.apply(images, ids, drawn), statistics=statistics, micro=len(ids), batch_size=len(ids)
        )
        if logits.shape != (len(ids), classes):
            raise CondenseError(f"the teacher answers {tuple(logits.shape)}, not ({len(ids)}, {classes}) logits")
        yield part, logits, drawn


@dataclass(frozen=True)
class _Asking:
    """How a teacher is taken through the views; see :func:`view_answers`."""

    statistics: str = "running"
    micro: int = 8
    batch_size: int = 256
    start: int = 0
    into: Any = None
    report: Callable[[int], None] | None = None
    quiet: bool = True


@torch.no_grad()
def _each_view(
    teacher: nn.Module,
    images: Tensor,
    epochs: int,
    views: ViewRule,
    seed: int,
    classes: int,
    how: _Asking,
    width: int,
    keep: Callable[[Tensor, Tensor, MixedViews], Tensor],
) -> Tensor:
    """``keep(logits, ids, drawn)`` (B, width) of every view, float16 (epochs, N, width)."""
    shape = (epochs, len(images), width)
    into = np.empty(shape, np.float16) if how.into is None else how.into
    if tuple(into.shape) != shape or into.dtype != np.float16:
        raise CondenseError(f"into: must be float16 {shape} to take the labels, not {into.dtype} {tuple(into.shape)}")
    if not 0 <= how.start <= (epochs if how.into is not None else 0):
        raise CondenseError(f"start={how.start}: of {epochs} epochs, those before it must be in into")
    progress = Progress("relabel", epochs, how.start, how.quiet)
    asked: dict[str, Any] = {"statistics": how.statistics, "micro": how.micro, "batch_size": how.batch_size}
    for epoch in range(how.start, epochs):
        done = torch.empty(shape[1:], dtype=torch.float16)
        for part, logits, drawn in epoch_answers(teacher, images, views, seed, epoch, classes=classes, **asked):
            done[part] = keep(logits, part.to(images.device), drawn).to("cpu", torch.float16)
        if not bool(done.isfinite().all()):
            raise CondenseError("the teacher's answers are not finite as float16; was it trained?")
        into[epoch] = done.numpy()
        if hasattr(into, "flush"):
            into.flush()  # what a kill must not lose
        progress.update(epoch + 1)
        if how.report is not None:
            how.report(epoch + 1)
    progress.close()
    return torch.from_numpy(into if isinstance(into, np.ndarray) else into[()])


@contextlib.contextmanager
def stored_answers(
    path: Path, state: Path, key: Sequence[Any], shape: tuple[int, int, int], stop: Callable[[], None] | None = None
) -> Iterator[dict[str, Any]]:
    """Where labels of views go while they are made, as keywords of :func:`view_answers`: into a file, so that memory
    holds one epoch, and who was killed goes on with the epoch that was not done. The caller removes both files.

    Args:
        path: .npy of float16 ``shape``.
        state: JSON that says how many epochs are done, and of what.
        key: strings and numbers that the labels follow from; of another key the files are begun anew.
        shape: (records, images, width).
        stop: called after each epoch, when it is on disk; may raise.

    Raises:
        CondenseError: the files cannot be written, or the disk has no room for them.
    """
    from condense.files import check_writable, replacing

    key = [*key, *shape, rng.HASH_VERSION]
    start, into = 0, None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # what cannot be read is begun anew
        known = json.loads(state.read_text())
        if known["key"] == key:
            into = np.lib.format.open_memmap(path, "r+")
            start = int(known["epochs"]) if (into.shape, into.dtype) == (shape, np.float16) else 0
    if not start:
        state.unlink(missing_ok=True)  # it must not speak of what comes now
        check_writable(path, force=True, size=2 * math.prod(shape))
        path.parent.mkdir(parents=True, exist_ok=True)
        into = np.lib.format.open_memmap(path, "w+", np.float16, shape)

    def report(done: int) -> None:
        with replacing(state) as temporary:
            temporary.write_text(json.dumps({"key": key, "epochs": done}))
        if stop is not None:
            stop()

    yield {"into": into, "start": start, "report": report}
