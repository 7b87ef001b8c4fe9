"""The teacher's logits on augmented views: computed epoch by epoch, and written to disk so that labelling resumes."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import zlib
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
from condense.files import atomic_write, check_writable
from condense.tracking import Progress

STATISTICS = ("running", "batch")


def check_statistics(statistics: str, micro: int) -> tuple[str, int]:
    """Checks both settings and returns them; ``micro`` is 0 with running statistics, where it has no effect."""
    if statistics not in STATISTICS:
        raise CondenseError(f"statistics={statistics}: unknown{did_you_mean(statistics, STATISTICS)}")
    if statistics == "batch" and micro < 2:
        raise CondenseError(f"micro={micro}: a batch of one view has no statistics; set at least 2")
    return statistics, micro if statistics == "batch" else 0


@functools.lru_cache(maxsize=16)
def draw_epoch_views(
    views: ViewRule, seed: int, epoch: int, rows: int, size: tuple[int, int], device: torch.device
) -> MixedViews:
    """Draws the views of a whole epoch; cached, because every batch of the epoch needs them."""
    return views.draw(seed, epoch, rows, size).to(device)


@functools.lru_cache(maxsize=16)
def mixed_batches(views: ViewRule, seed: int, epoch: int, rows: int) -> list[Tensor]:
    """Returns the batches in which the views of an epoch are mixed; cached, because every step needs one of them."""
    return views.batches(seed, epoch, rows)


def given_or_predicted_classes(images: Tensor, teacher: nn.Module, hard: Tensor | None) -> Tensor:
    """Returns ``hard`` on the images' device, or the classes that the teacher predicts if it is None."""
    return compute_logits(teacher, images).argmax(1) if hard is None else hard.to(images.device).long()


@contextlib.contextmanager
def _eval_with_statistics(teacher: nn.Module, statistics: str) -> Iterator[None]:
    """Puts the teacher into eval mode. With ``statistics="batch"`` BatchNorm uses the statistics of the batch; running
    statistics do not change."""
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


def grouping_version(statistics: str) -> str:
    """Returns the rule of :func:`split_evenly` for keys of caches; empty with running statistics, where there are no
    groups. Earlier versions filled all micro-batches but the last one."""
    return "even groups" if statistics == "batch" else ""


def split_evenly(rows: Tensor, size: int) -> list[Tensor]:
    """Splits into the least number of parts of at most ``size`` rows, whose sizes differ by at most 1.

    Parts that would have a single row, which has no batch statistics, are joined with others.
    """
    count = max(1, min(math.ceil(len(rows) / size), len(rows) // 2))
    return list(rows.tensor_split(count))


@functools.lru_cache(maxsize=16)
def labelled_groups(views: ViewRule, seed: int, epoch: int, rows: int, micro: int) -> list[Tensor]:
    """Returns the micro-batches in which the views of an epoch are labelled, as int64 rows on the CPU. Batches that are
    mixed among themselves are split, so that no micro-batch has views of two of them."""
    if views.mix_batch:
        return [part for batch in views.batches(seed, epoch, rows) for part in split_evenly(batch, micro)]
    return split_evenly(rng.Draws(seed, "label-batch", epoch).permutation(rows), micro)


@torch.no_grad()
def compute_logits(
    teacher: nn.Module, images: Tensor, *, statistics: str = "running", micro: int = 8, batch_size: int = 256
) -> Tensor:
    """Computes the teacher's logits, float32 (N, classes), on images without augmentation.

    Args:
        teacher: Network from images in training space to logits; left in eval mode.
        images: (N,C,H,W) in training space, on the teacher's device.
        statistics: ``running``, or ``batch``: BatchNorm uses each micro-batch's statistics, without dropout (BSSL).
        micro: Maximum number of consecutive images per micro-batch, see :func:`split_evenly`.
        batch_size: Images per forward pass with running statistics.
    """
    batches = split_evenly(images, micro) if statistics == "batch" else images.split(batch_size)
    with _eval_with_statistics(teacher, statistics):
        return torch.cat([teacher(batch).float() for batch in batches])


def compute_view_logits(
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
    """Computes the teacher's logits on the views of a whole set, float16 (epochs, N, classes) on the CPU.

    Args:
        teacher: Network from images in training space to logits; left in eval mode.
        images: The whole set (N,C,H,W), in training space, on the teacher's device.
        epochs: Number of passes over the set, each with its own views.
        views: Distribution of the views.
        seed: Seed of the views.
        classes: Number of logits that the teacher must return.
        statistics: ``running``: BatchNorm uses its running statistics. ``batch``: BatchNorm uses the statistics of each
            micro-batch, running statistics do not change, dropout is off (BSSL of CV-DD, whose release leaves dropout
            on). Micro-batches are consecutive parts of a permutation drawn for each epoch from ``seed``, or parts of
            the batches in which ``views`` mix.
        micro: Maximum number of views per micro-batch; all have the same number if possible, else one less.
        batch_size: Views per forward pass with running statistics; affects only rounding.
        start: First epoch to label; earlier epochs are already in ``into``.
        into: float16 (epochs, N, classes), a ``numpy.memmap`` or an HDF5 dataset open for writing, that receives each
            epoch as soon as it is labelled, so that memory holds one epoch and an interrupted run resumes from
            ``start``. An HDF5 dataset is read into memory at the end.
        report: Called after each epoch with the number of labelled epochs.
        quiet: Whether to hide the progress bar.

    Raises:
        CondenseError: The teacher's logits have another shape or are not finite as float16, or ``into`` or ``start``
            does not fit.
    """
    options = _LabellingOptions(statistics, micro, batch_size, start, into, report, quiet)
    return _each_view(
        teacher, images, epochs, views, seed, classes, options, classes, lambda logits, ids, drawn: logits
    )


def compute_view_nll(
    teacher: nn.Module,
    images: Tensor,
    hard: Tensor,
    epochs: int,
    views: ViewRule,
    seed: int,
    *,
    classes: int,
    **options: Any,
) -> Tensor:
    """Computes the teacher's negative log-likelihood of the classes of the two mixed images in each view.

    Args:
        teacher, images, epochs, views, seed, classes: See :func:`compute_view_logits`; ``views`` must mix.
        hard: Classes of the images, int64 (N,).
        options: See :func:`compute_view_logits`; ``into`` is (epochs, N, 2).

    Returns:
        float16 (epochs, N, 2) on the CPU, which :class:`DistanceLabels` store.
    """

    def pair_nll(logits: Tensor, ids: Tensor, drawn: MixedViews) -> Tensor:
        assert drawn.partner is not None
        classes_of = hard.to(logits.device)
        pairs = torch.stack([classes_of[ids], classes_of[drawn.partner[ids]]], 1)
        return -F.log_softmax(logits, -1).gather(1, pairs)

    return _each_view(teacher, images, epochs, views, seed, classes, _LabellingOptions(**options), 2, pair_nll)


@torch.no_grad()
def iter_epoch_logits(
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
    """Yields the teacher's logits on the views of one epoch, batch by batch.

    Args:
        teacher, images, views, seed, classes, statistics, micro, batch_size: See :func:`compute_view_logits`.
        epoch: Epoch of the views.
        wanted: Images to label, bool (N,); all by default. With batch statistics a micro-batch is labelled as a whole
            if it contains any of them, because its other views affect the result.

    Yields:
        Rows of the images, int64 (B,) on the CPU; logits, float32 (B, classes); and all views drawn for the epoch.

    Raises:
        CondenseError: The teacher's logits have another shape.
    """
    statistics, micro = check_statistics(statistics, micro)
    drawn = draw_epoch_views(views, seed, epoch, len(images), (images.shape[2], images.shape[3]), images.device)
    if statistics == "batch":
        parts = labelled_groups(views, seed, epoch, len(images), micro)
        parts = parts if wanted is None else [part for part in parts if bool(wanted[part].any())]
    else:
        rows = torch.arange(len(images)) if wanted is None else wanted.nonzero()[:, 0]
        parts = list(rows.split(batch_size))
    for part in parts:
        ids = part.to(images.device)
        logits = compute_logits(
            teacher, views.apply(images, ids, drawn), statistics=statistics, micro=len(ids), batch_size=len(ids)
        )
        if logits.shape != (len(ids), classes):
            raise CondenseError(f"the teacher returns {tuple(logits.shape)}, not ({len(ids)}, {classes}) logits")
        yield part, logits, drawn


@dataclass(frozen=True)
class _LabellingOptions:
    """Options of labelling all views; see :func:`compute_view_logits`."""

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
    options: _LabellingOptions,
    width: int,
    keep: Callable[[Tensor, Tensor, MixedViews], Tensor],
) -> Tensor:
    """Computes ``keep(logits, ids, drawn)`` (B, width) for every view; returns float16 (epochs, N, width)."""
    shape = (epochs, len(images), width)
    into = np.empty(shape, np.float16) if options.into is None else options.into
    if tuple(into.shape) != shape or into.dtype != np.float16:
        raise CondenseError(f"into: must be float16 {shape}, not {into.dtype} {tuple(into.shape)}")
    if not 0 <= options.start <= (epochs if options.into is not None else 0):
        raise CondenseError(f"start={options.start}: must be 0 to {epochs}, and earlier epochs must be in into")
    progress = Progress("relabel", epochs, options.start, options.quiet)
    batching: dict[str, Any] = {
        "statistics": options.statistics,
        "micro": options.micro,
        "batch_size": options.batch_size,
    }
    for epoch in range(options.start, epochs):
        done = torch.empty(shape[1:], dtype=torch.float16)
        for part, logits, drawn in iter_epoch_logits(teacher, images, views, seed, epoch, classes=classes, **batching):
            done[part] = keep(logits, part.to(images.device), drawn).to("cpu", torch.float16)
        if not bool(done.isfinite().all()):
            raise CondenseError("the teacher's logits are not finite as float16; was it trained?")
        into[epoch] = done.numpy()
        if hasattr(into, "flush"):
            into.flush()  # so that a kill loses no labelled epoch
        progress.update(epoch + 1)
        if options.report is not None:
            options.report(epoch + 1)
    progress.close()
    return torch.from_numpy(into if isinstance(into, np.ndarray) else into[()])


@contextlib.contextmanager
def resumable_logits(
    path: Path,
    state: Path,
    key: Sequence[Any],
    shape: tuple[int, int, int],
    stop: Callable[[], None] | None = None,
    *,
    in_order: bool = True,
) -> Iterator[dict[str, Any]]:
    """Writes labels of views to a file during labelling, so that memory holds one epoch and a killed run resumes.

    Args:
        path: .npy file of float16 ``shape``. The caller removes both files.
        state: JSON file with the number of labelled epochs, the key, and checksums of the records.
        key: Strings and numbers on which the labels depend; files with a different key are overwritten.
        shape: (records, images, width).
        stop: Called after each epoch, when it is on disk; may raise.
        in_order: Whether epoch e writes record e. Otherwise an epoch may write to any record.

    Yields:
        Keyword arguments of :func:`compute_view_logits`.

    Raises:
        CondenseError: The files cannot be written, or the disk is full.
    """
    key = [*key, *shape, rng.HASH_VERSION]
    start, into, checksums = 0, None, [0] * shape[0]
    with contextlib.suppress(Exception):  # unreadable files are overwritten; they raise errors of many types
        progress = json.loads(state.read_text())
        if progress["key"] == key:
            into = np.lib.format.open_memmap(path, "r+")
            if (into.shape, into.dtype) == (shape, np.float16):
                end = int(progress["epochs"])
                checksums = [zlib.crc32(record.data) for record in into]
                stored = progress.get("crc32", checksums)  # earlier versions stored none
                differ = [k for k in range(end if in_order else shape[0]) if checksums[k] != stored[k]]
                start = end if not differ else differ[0] if in_order else 0
    if not start:
        state.unlink(missing_ok=True)  # it must not describe the new file
        check_writable(path, force=True, size=2 * math.prod(shape))
        path.parent.mkdir(parents=True, exist_ok=True)
        into = np.lib.format.open_memmap(path, "w+", np.float16, shape)

    assert into is not None
    values: np.ndarray = into

    def report(done: int) -> None:
        for record in [done - 1] if in_order else range(shape[0]):
            checksums[record] = zlib.crc32(values[record].data)
        with atomic_write(state) as temporary:
            temporary.write_text(json.dumps({"key": key, "epochs": done, "crc32": checksums}))
        if stop is not None:
            stop()

    yield {"into": into, "start": start, "report": report}
