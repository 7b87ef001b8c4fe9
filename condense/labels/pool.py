"""Pool labels (LPLD, LPQLD): few labelled epochs per class, from which every epoch of a student is sampled."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from condense import rng
from condense.augment import MixedViews, ViewBoxes, ViewRule, float32_decimal
from condense.config import require_one_of, require_range
from condense.device import on_host, upload
from condense.errors import CondenseError
from condense.labels.arrays import checked_array
from condense.labels.base import LABEL_KINDS, Fidelity, check_image_count, kl_loss
from condense.labels.coded import CodedLabels, make_coded_labels, read_coded_kwargs
from condense.labels.codes import (
    CODES,
    DEFAULT_MAX_K,
    DEFAULT_MAX_RANK,
    FILLS,
    Code,
    HalfCode,
    LowRankCode,
    TopKCode,
    check_code_size,
    default_size,
)
from condense.labels.per_view import PerViewLabels
from condense.labels.teacher_logits import given_or_predicted_classes, iter_epoch_logits
from condense.tracking import Progress

MAX_POOL_RECORDS = 1 << 24
"""Maximum of classes times labelled epochs of a pool."""


class PoolLabels(CodedLabels):
    """A pool of few labelled epochs, from which each epoch of a student is sampled (LPLD, NeurIPS 2024).

    A record consists of the views of one class's images in one of the E labelled epochs. The pool keeps K records of
    each class, from random epochs; in a student's epoch e all images of a class use one of its records, sampled
    uniformly with replacement. The kept records and the samples depend only on the seed, so only logits are stored:

        kept(c)    the first K of a random order of the E epochs, sorted
        slot(e, c) uniform on 0..K-1, by (seed, e)

    The partner of an image is mixed in with its view in the record's epoch, which the teacher labelled. The released
    program keeps records of its loader's batches, which contain mixed classes; here batches are arbitrary, so records
    belong to classes. With another code of the values this is LPQLD's pruning and quantisation.

    ``cooling=(factor, every, least)`` is LPQLD's dynamic knowledge reuse: in a student's epoch e the temperature of
    targets and loss is T * factor^(e // every), but at least ``least`` (or T, if that is lower), so that a repeated
    record gives different targets. Targets are then (B, C + 1), with the temperature after the classes.

    Args:
        code: Code of the logits (K, N, C).
        error: Difference between the code and the logits that were encoded.
        of: Number of labelled epochs E.
        cooling: None or three numbers.
        terms: The result of :meth:`PerViewLabels.terms`, with ``hard``.

    Raises:
        CondenseError: As for ``PerViewLabels``; or there are no classes, K is not in 1..E, or the cooling is invalid.
    """

    kind = "pool"

    def __init__(
        self, code: Code, error: Fidelity, of: int, cooling: Sequence[float] | None = None, **terms: Any
    ) -> None:
        super().__init__(code, error, **terms)
        if self.hard is None:
            raise CondenseError("pool: needs the class of each image; give hard")
        if (
            not code.shape[0] <= of <= MAX_POOL_RECORDS // self.shape[2]
        ):  # bounds the memory that an untrusted file can claim
            raise CondenseError(f"a pool of {code.shape[0]} epochs: out of range for {of} labelled epochs")
        self.of, self.cooling = of, None if cooling is None else tuple(float32_decimal(x) for x in cooling)
        if self.cooling is not None:
            factor, every, least = self.cooling
            if not (0 < factor <= 1 and 1 <= every < math.inf and 0 < least < math.inf):
                raise CondenseError(
                    f"cooling={self.cooling}: must be a factor up to 1, epochs from 1 on, and a temperature above 0"
                )
            if self.loss_kind != "kl":
                raise CondenseError("cooling: changes the temperature of distributions; set loss_kind=kl")
        self.kept = kept_pool_epochs(self.seed, self.shape[2], of, self.shape[0])
        self._latest: tuple[Any, MixedViews, Tensor] | None = None

    @property
    def epochs(self) -> int:
        """Number of labelled epochs E, of which K are kept."""
        return self.of

    @property
    def step_cost(self) -> str:  # type: ignore[override]
        return f"{self.code.step_cost}; the views of up to K epochs are drawn once an epoch"

    @classmethod
    def pruned(
        cls,
        labels: PerViewLabels,
        count: int,
        code: Code | None = None,
        hard: Tensor | None = None,
        cooling: Sequence[float] | None = None,
    ) -> PoolLabels:
        """Keeps ``count`` records of each class of ``labels``.

        Args:
            labels: Per-view labels with all epochs.
            count: Number of records K per class.
            code: Code whose settings are used for the values. Default: float16.
            hard: Classes of the images, int64 (N,), if the labels have none.
            cooling: See the class.

        Raises:
            CondenseError: K is not in 1..E.
        """
        hard = labels.hard if labels.hard is not None else hard
        _check_kept(count, labels.epochs)
        if hard is None:
            raise CondenseError("pool: needs the class of each image; give hard")
        kept = kept_pool_epochs(labels.seed, labels.shape[2], labels.epochs, count)
        epochs = kept[hard.cpu()].T.to(labels.logits.device)  # (K, N)
        records = labels.logits[epochs, torch.arange(len(hard), device=epochs.device)]
        encode = HalfCode.encode if code is None else code.like
        return cls.recorded(records, labels.epochs, encode, cooling, **{**labels.terms(), "hard": hard})

    @classmethod
    def recorded(
        cls,
        records: Tensor,
        of: int,
        encode: Callable[[Tensor], Code],
        cooling: Sequence[float] | None = None,
        **terms: Any,
    ) -> PoolLabels:
        """Makes labels from records (K, N, C) of ``of`` epochs, the result of :func:`compute_pool_logits`; ``terms``
        are the other arguments of ``PerViewLabels``."""
        uncoded = PerViewLabels(records, **terms)
        labels: PoolLabels = make_coded_labels(cls, uncoded, encode(uncoded.logits), of=of, cooling=cooling)
        return labels

    def temperature_at(self, epoch: int) -> float:
        if self.cooling is None:
            return self.temperature
        factor, every, least = self.cooling
        return max(min(least, self.temperature), self.temperature * factor ** (epoch // every))

    def labelled_groups(self, epoch: int, size: int) -> list[Tensor] | None:
        return None  # in a student's epoch each image has the view of another labelled epoch

    def mixed_batches(self, epoch: int, size: int) -> list[Tensor] | None:
        return None

    def training_batch(self, images: Tensor, ids: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        views, targets = super().training_batch(images, ids, epoch)
        if self.cooling is None:
            return views, targets
        return views, torch.cat([targets, targets.new_full((len(targets), 1), self.temperature_at(epoch))], 1)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        if self.cooling is None:
            return super().loss(logits, targets)
        return kl_loss(logits, targets[:, :-1], targets[0, -1], self.squared)  # all rows of a batch belong to one epoch

    def slots(self, epoch: int) -> Tensor:
        """Returns the index of the record that each class uses in a student's ``epoch``, int64 (C,)."""
        return rng.Draws(self.seed, "pool", epoch).integers(self.shape[0], self.shape[2])

    def _views_and_logits(self, images: Tensor, ids: Tensor, epoch: int) -> tuple[Tensor, Tensor, MixedViews, Tensor]:
        check_image_count(images, self)
        drawn, slots = self._epoch(epoch, images)
        ids = ids.to(images.device)
        return self.views.apply(images, ids, drawn), ids, drawn, self._read(slots[ids], ids).to(images.device)

    def _epoch(self, epoch: int, images: Tensor) -> tuple[MixedViews, Tensor]:
        """Returns the views of a student's epoch and the record (N,) of each image; cached for its batches."""
        assert self.hard is not None
        key = (epoch, images.shape, images.device)
        if self._latest is None or self._latest[0] != key:
            slots, classes = self.slots(epoch), on_host(self.hard)
            source = self.kept.gather(1, slots[:, None])[:, 0][classes]
            drawn = _joined(self.views, self.seed, source, (images.shape[2], images.shape[3]))
            self._latest = key, drawn.to(images.device), upload(slots[classes], images.device)
        return self._latest[1:]

    def arrays(self) -> dict[str, np.ndarray]:
        name = np.frombuffer(self.code.name.encode(), np.uint8)
        cooling = {} if self.cooling is None else {"cooling": np.array(self.cooling, np.float32)}
        return {**super().arrays(), "of": np.array([self.of], np.int64), "code": name, **cooling}

    def label_images(self, images: Tensor, teacher: nn.Module, seed: int, hard: Tensor | None = None) -> PoolLabels:
        """Labels only the records that the pool keeps."""
        hard = given_or_predicted_classes(images, teacher, hard)
        terms = {**self.terms(), "seed": seed, "hard": hard}
        records = compute_pool_logits(
            teacher,
            images,
            hard,
            self.of,
            self.views,
            seed,
            self.shape[0],
            classes=self.shape[2],
            statistics=self.statistics,
            micro=self.micro or 8,
        )
        return PoolLabels.recorded(records.to(images.device), self.of, self.code.like, self.cooling, **terms)

    def like(self, labels: PerViewLabels) -> CodedLabels:
        return PoolLabels.pruned(labels, self.shape[0], self.code, cooling=self.cooling)

    def cache_key(self) -> str:
        cooling = "" if self.cooling is None else f", cooling={self.cooling}"
        return f"{super().cache_key()}, pool of {self.shape[0]}{cooling}"

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], classes: int) -> PoolLabels:
        name = checked_array(arrays, "code", np.uint8, (None,)).tobytes().decode(errors="replace")
        if name not in CODES:
            raise CondenseError(f"labels/code names '{name[:20]}', which is none of {', '.join(CODES)}")
        (of,) = checked_array(arrays, "of", np.int64, (1,)).tolist()
        cooling = checked_array(arrays, "cooling", np.float32, (3,)).tolist() if "cooling" in arrays else None
        return cls(
            CODES[name].from_arrays(arrays, classes), of=of, cooling=cooling, **read_coded_kwargs(arrays, classes)
        )


def kept_pool_epochs(seed: int, classes: int, of: int, count: int) -> Tensor:
    """Returns the epochs, out of ``of``, that each class keeps: int64 (classes, count), sorted."""
    order = rng.Draws(seed, "pool-kept").bits((classes, of)).argsort(dim=1, stable=True)
    return order[:, :count].sort(1).values


@torch.no_grad()
def compute_pool_logits(
    teacher: nn.Module,
    images: Tensor,
    hard: Tensor,
    epochs: int,
    views: ViewRule,
    seed: int,
    count: int,
    *,
    classes: int,
    statistics: str = "running",
    micro: int = 8,
    batch_size: int = 256,
    start: int = 0,
    into: np.ndarray | None = None,
    report: Callable[[int], None] | None = None,
    quiet: bool = True,
) -> Tensor:
    """Computes the records of a pool: the teacher's logits on the views of the epochs that each image's class keeps.

    The teacher labels no other views, except those in the same micro-batch (see :func:`iter_epoch_logits`).

    Args:
        teacher, images, views, seed, classes, statistics, micro, batch_size, report, quiet: See
            :func:`condense.labels.compute_view_logits`.
        hard: Classes of the images, int64 (N,).
        epochs: Number of epochs E, of which each class keeps ``count``.
        count: Number of records K per class.
        start: First epoch to label; the logits of earlier epochs are in ``into``.
        into: float16 (count, N, classes) that receives each epoch as soon as it is labelled.

    Returns:
        float16 (count, N, classes) on the CPU, in the order of the epochs.

    Raises:
        CondenseError: The count is not in 1..E, or the teacher's logits have another shape.
    """
    _check_kept(count, epochs)
    kept = kept_pool_epochs(seed, classes, epochs, count)[hard.cpu()]  # (N, K)
    records = np.empty((count, len(images), classes), np.float16) if into is None else into
    batching: dict[str, Any] = {"statistics": statistics, "micro": micro, "batch_size": batch_size}
    progress = Progress("relabel", epochs, start, quiet)
    for epoch in range(start, epochs):
        is_kept, slot = (kept == epoch).max(1)
        if not bool(is_kept.any()):
            continue
        parts = iter_epoch_logits(teacher, images, views, seed, epoch, classes=classes, wanted=is_kept, **batching)
        for part, logits, _ in parts:
            selected = is_kept[part]
            rows = part[selected]
            records[slot[rows].numpy(), rows.numpy()] = (
                logits[selected.to(logits.device)].to("cpu", torch.float16).numpy()
            )
        if isinstance(records, np.memmap):
            records.flush()  # so that a kill loses no labelled epoch
        progress.update(epoch + 1)
        if report is not None:
            report(epoch + 1)
    progress.close()
    return torch.from_numpy(records)


def _check_kept(count: int, epochs: int) -> None:
    if not 1 <= count <= epochs:
        raise CondenseError(f"a pool of {count} epochs: must be 1 to {epochs}, the number of labelled epochs")


def _joined(rule: ViewRule, seed: int, source: Tensor, size: tuple[int, int]) -> MixedViews:
    """Combines views of several epochs, on the CPU: image i and its partner use their views of epoch ``source[i]``."""
    rows, count = torch.arange(len(source)), len(source)
    parts: list[tuple[Tensor, MixedViews, ViewBoxes | None]] = []
    for epoch in source.unique().tolist():
        images, drawn = rows[source == epoch], rule.draw(seed, epoch, count, size)
        partner_views = None if drawn.partner is None else drawn.views[drawn.partner[images]]
        parts.append((images, drawn, partner_views))
    order = torch.cat([images for images, _, _ in parts]).argsort()

    def concatenated(views: Sequence[ViewBoxes]) -> ViewBoxes:
        box, mirrored = (torch.cat([getattr(part, name) for part in views])[order] for name in ("box", "mirrored"))
        tiles = [part.tiles for part in views if part.tiles is not None]
        return ViewBoxes(size, box, mirrored, torch.cat(tiles)[order] if tiles else None)

    def joined(name: str) -> Tensor | None:
        values = [getattr(drawn, name) for _, drawn, _ in parts]
        if values[0] is None:
            return None
        return torch.cat([value[images] for value, (images, _, _) in zip(values, parts)])[order]

    partners = [views for _, _, views in parts if views is not None]
    return MixedViews(
        concatenated([drawn.views[images] for images, drawn, _ in parts]),
        joined("partner"),
        joined("share"),
        joined("patch"),
        concatenated(partners) if partners else None,
    )


@dataclass(frozen=True)
class PruningOptions:
    """Settings of pool labels; a mixin for the settings of everything that makes them."""

    keep: float = 0.1
    """Share of the labelled epochs that is kept for each class."""
    values: str = "half"
    """Code of the logits: half, int8, lowrank or topk."""
    k: int | None = None
    """Stored logits per view with values=topk. Default: a quarter of the classes, at most 10."""
    fill: str = "mrs"
    """Value of the other logits with values=topk: mrs (the view's smallest logit) or mr (no probability)."""
    rank: int | None = None
    """Number of axes, and bytes per view, with values=lowrank. Default: a quarter of the classes, at most 64."""
    cooling: float = 1.0
    """Factor on the temperature after every cool_epochs epochs of a student (LPQLD); 1: constant temperature."""
    cool_epochs: int = 30
    """Epochs of a student at the same temperature."""
    cool_least: float = 2.0
    """Minimum temperature of the cooling."""

    def check_pruning(self) -> None:
        """Checks ranges and choices of the settings; called by ``__post_init__`` of a subclass."""
        largest = sys.float_info.max
        require_one_of(self, values=CODES, fill=FILLS)
        require_range(
            self,
            k=(1, math.inf),
            rank=(1, math.inf),
            cooling=(1e-6, 1),
            cool_epochs=(1, math.inf),
            cool_least=(1e-6, largest),
        )
        if not 0 < self.keep <= 1:
            raise CondenseError(f"keep={self.keep:g}: must be above 0 and at most 1")

    def check_classes(self, classes: int) -> None:
        """Checks before the work that rank and k fit the number of classes."""
        setting, value = ("rank", self.rank) if self.values == "lowrank" else ("k", self.k)
        if value is not None and self.values in ("lowrank", "topk"):
            check_code_size(setting, value, classes)

    def count(self, epochs: int) -> int:
        """Returns the number of epochs that a class keeps out of ``epochs``, at least one."""
        return max(1, round(self.keep * epochs))

    def encode(self, logits: Tensor, means: bool = False) -> Code:
        """Encodes ``logits`` (E, N, C) as the settings say; for ``means`` see :class:`LowRankCode`."""
        classes = logits.shape[2]
        if self.values == "lowrank":
            return LowRankCode.encode(logits, self.rank or default_size(classes, DEFAULT_MAX_RANK), means)
        if self.values == "topk":
            return TopKCode.encode(logits, self.k or default_size(classes, DEFAULT_MAX_K), self.fill)
        code: Code = CODES[self.values].encode(logits)
        return code

    def cooled(self) -> tuple[float, float, float] | None:
        """Returns the argument ``cooling`` of :class:`PoolLabels`."""
        return None if self.cooling == 1 else (self.cooling, self.cool_epochs, self.cool_least)


LABEL_KINDS.add("pool", PoolLabels)
