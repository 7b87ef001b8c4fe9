"""TODO-DOC."""

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
from condense.augment import MixedViews, ViewRule, Views, single
from condense.config import one_of, require
from condense.errors import CondenseError
from condense.labels.arrays import checked_array
from condense.labels.base import PROVIDERS, kl_loss
from condense.labels.coded import CodedLabels, make_coded_labels, read_coded_kwargs
from condense.labels.codes import (
    CODES,
    FILLS,
    MOST_KEPT,
    MOST_RANK,
    Code,
    Fidelity,
    Half,
    LowRank,
    TopK,
    check_code_size,
    usual,
)
from condense.labels.per_view import PerViewLabels
from condense.labels.teacher_logits import epoch_answers, given_or_predicted_classes
from condense.tracking import Progress

MOST_RECORDS = 1 << 27
"""Classes times labelled epochs, of a pool."""


class PoolLabels(CodedLabels):
    """A pool of few labelled epochs, from which each epoch of a student is drawn anew (LPLD, NeurIPS 2024).

    A record is the views of one class's images in one of the E labelled epochs. Of each class K records are kept, those
    of random epochs; in a student's epoch e all images of a class show one of its records, drawn with equal chances and
    put back. Which are kept and which is drawn follow from the seed alone, so nothing but the logits is stored:

        kept(c)    the K first of a random order of the E epochs, sorted
        slot(e, c) uniform on 0..K-1, by (seed, e)

    An image's partner enters by the view that it had in the record's epoch: the teacher saw that. The released program
    keeps records of its loader's batches, which hold mixed classes; batches of ours are free, so the class takes their
    place. With values in another code this is LPQLD's pruning and quantisation.

    ``cooling=(factor, every, least)`` is LPQLD's dynamic knowledge reuse: in a student's epoch e the temperature of
    targets and loss is T * factor^(e // every), but not below ``least`` (or T, where that is lower), so that a record
    that comes again teaches something else. Targets then are (B, C + 1), the temperature behind the classes.

    Args:
        code: of logits (K, N, C).
        error: how far it is from what was encoded.
        of: E, labelled epochs.
        cooling: None or three numbers.
        terms: what :meth:`PerViewLabels.terms` gives, with ``hard``.

    Raises:
        CondenseError: as ``PerViewLabels``, or no classes, or K is not in 1..E, or a cooling that cannot be.
    """

    kind = "pool"

    def __init__(
        self, code: Code, error: Fidelity, of: int, cooling: Sequence[float] | None = None, **terms: Any
    ) -> None:
        super().__init__(code, error, **terms)
        if self.hard is None:
            raise CondenseError("pool: needs the class of each image; give hard")
        if not code.shape[0] <= of <= MOST_RECORDS // self.shape[2]:  # a stranger's file must not claim the memory
            raise CondenseError(f"a pool of {code.shape[0]} epochs cannot be of {of}")
        self.of, self.cooling = of, None if cooling is None else tuple(single(x) for x in cooling)
        if self.cooling is not None:
            factor, every, least = self.cooling
            if not (0 < factor <= 1 and 1 <= every < math.inf and 0 < least < math.inf):
                raise CondenseError(
                    f"cooling={self.cooling}: must be a factor up to 1, epochs from 1 on, and a temperature above 0"
                )
            if self.loss_kind != "kl":
                raise CondenseError("cooling: needs distributions at a temperature; take loss_kind=kl")
        self.kept = pooled_epochs(self.seed, self.shape[2], of, self.shape[0])
        self._latest: tuple[Any, MixedViews, Tensor] | None = None

    @property
    def epochs(self) -> int:
        """Labelled epochs E, of which some are kept."""
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
        """``count`` records of each class of ``labels``.

        Args:
            labels: with all their epochs.
            count: K.
            code: whose settings the values are kept with; float16 when None.
            hard: int64 (N,), classes of the images, where the labels have none.
            cooling: of the pool.

        Raises:
            CondenseError: K is not in 1..E.
        """
        hard = labels.hard if labels.hard is not None else hard
        _check_kept(count, labels.epochs)
        if hard is None:
            raise CondenseError("pool: needs the class of each image; give hard")
        kept = pooled_epochs(labels.seed, labels.shape[2], labels.epochs, count)
        epochs = kept[hard.cpu()].T.to(labels.logits.device)  # (K, N)
        records = labels.logits[epochs, torch.arange(len(hard), device=epochs.device)]
        encode = Half.encode if code is None else code.like
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
        """Labels of the records (K, N, C) of ``of`` epochs, as :func:`pool_answers` gives them; ``terms`` are those of
        ``PerViewLabels``."""
        part = PerViewLabels(records, **terms)
        made: PoolLabels = make_coded_labels(cls, part, encode(part.logits), of=of, cooling=cooling)
        return made

    def temperature_at(self, epoch: int) -> float:
        if self.cooling is None:
            return self.temperature
        factor, every, least = self.cooling
        return max(min(least, self.temperature), self.temperature * factor ** (epoch // every))

    def shown(self, images: Tensor, ids: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        views, targets = super().shown(images, ids, epoch)
        if self.cooling is None:
            return views, targets
        return views, torch.cat([targets, targets.new_full((len(targets), 1), self.temperature_at(epoch))], 1)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        if self.cooling is None:
            return super().loss(logits, targets)
        return kl_loss(logits, targets[:, :-1], targets[0, -1], self.squared)  # a batch is of one epoch

    def slots(self, epoch: int) -> Tensor:
        """Which of its records each class shows in a student's ``epoch``, int64 (C,)."""
        return rng.Draws(self.seed, "pool", epoch).integers(self.shape[0], self.shape[2])

    def _found(self, images: Tensor, ids: Tensor, epoch: int) -> tuple[Tensor, Tensor, MixedViews, Tensor]:
        if len(images) != len(self):
            raise CondenseError(f"{len(images)} images but {len(self)} pool labels; give those of their set")
        drawn, slots = self._epoch(epoch, images)
        ids = ids.to(images.device)
        return self.views.apply(images, ids, drawn), ids, drawn, self._read(slots[ids], ids).to(images.device)

    def _epoch(self, epoch: int, images: Tensor) -> tuple[MixedViews, Tensor]:
        """The views of a student's epoch and the record (N,) of each image, kept from batch to batch."""
        assert self.hard is not None
        key = (epoch, images.shape, images.device)
        if self._latest is None or self._latest[0] != key:
            slots, classes = self.slots(epoch), self.hard.cpu()
            source = self.kept.gather(1, slots[:, None])[:, 0][classes]
            drawn = _joined(self.views, self.seed, source, (images.shape[2], images.shape[3]))
            self._latest = key, drawn.to(images.device), slots[classes].to(images.device)
        return self._latest[1:]

    def arrays(self) -> dict[str, np.ndarray]:
        name = np.frombuffer(self.code.name.encode(), np.uint8)
        cooling = {} if self.cooling is None else {"cooling": np.array(self.cooling, np.float32)}
        return {**super().arrays(), "of": np.array([self.of], np.int64), "code": name, **cooling}

    def anew(self, images: Tensor, teacher: nn.Module, seed: int, hard: Tensor | None = None) -> PoolLabels:
        """Only what is kept is asked for."""
        hard = given_or_predicted_classes(images, teacher, hard)
        terms = {**self.terms(), "seed": seed, "hard": hard}
        records = pool_answers(
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

    def rule(self) -> str:
        cooled = "" if self.cooling is None else f", cooling={self.cooling}"
        return f"{super().rule()}, pool of {self.shape[0]}{cooled}"

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


def pooled_epochs(seed: int, classes: int, of: int, count: int) -> Tensor:
    """The epochs, of ``of``, that each class keeps: int64 (classes, count), sorted."""
    order = rng.Draws(seed, "pool-kept").bits((classes, of)).argsort(dim=1, stable=True)
    return order[:, :count].sort(1).values


@torch.no_grad()
def pool_answers(
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
    """The records of a pool, float16 (count, N, classes) on the CPU: the teacher's logits on the views of those epochs
    that the class of each image keeps, in their order. It is asked about nothing else, but for what its statistics need
    (see :func:`condense.labels.epoch_answers`).

    Args:
        teacher, images, views, seed, classes, statistics, micro, batch_size, report, quiet: see
            :func:`condense.labels.view_answers`.
        hard: int64 (N,), classes of the images.
        epochs: E, of which ``count`` are kept of each class.
        start: first epoch to label; what those before gave is in ``into``.
        into: float16 (count, N, classes) that takes each epoch when it is done.

    Raises:
        CondenseError: the count is not in 1..E, or answers that are no such logits.
    """
    _check_kept(count, epochs)
    kept = pooled_epochs(seed, classes, epochs, count)[hard.cpu()]  # (N, K)
    records = np.empty((count, len(images), classes), np.float16) if into is None else into
    asked: dict[str, Any] = {"statistics": statistics, "micro": micro, "batch_size": batch_size}
    progress = Progress("relabel", epochs, start, quiet)
    for epoch in range(start, epochs):
        wanted, slot = (kept == epoch).max(1)
        if not bool(wanted.any()):
            continue
        parts = epoch_answers(teacher, images, views, seed, epoch, classes=classes, wanted=wanted, **asked)
        for part, logits, _ in parts:
            mine = wanted[part]
            rows = part[mine]
            records[slot[rows].numpy(), rows.numpy()] = logits[mine.to(logits.device)].to("cpu", torch.float16).numpy()
        if isinstance(records, np.memmap):
            records.flush()  # what a kill must not lose
        progress.update(epoch + 1)
        if report is not None:
            report(epoch + 1)
    progress.close()
    return torch.from_numpy(records)


def _check_kept(count: int, epochs: int) -> None:
    if not 1 <= count <= epochs:
        raise CondenseError(f"a pool of {count} epochs: must be 1 to {epochs}, those that are labelled")


def _joined(rule: ViewRule, seed: int, source: Tensor, size: tuple[int, int]) -> MixedViews:
    """Views on the CPU in which image i shows what it shows in epoch ``source[i]``, partner included."""
    rows, count = torch.arange(len(source)), len(source)
    parts: list[tuple[Tensor, MixedViews, Views | None]] = []
    for epoch in source.unique().tolist():
        mine, drawn = rows[source == epoch], rule.draw(seed, epoch, count, size)
        entering = None if drawn.partner is None else drawn.views[drawn.partner[mine]]
        parts.append((mine, drawn, entering))
    order = torch.cat([mine for mine, _, _ in parts]).argsort()

    def views(each: Sequence[Views]) -> Views:
        box, mirrored = (torch.cat([getattr(one, name) for one in each])[order] for name in ("box", "mirrored"))
        return Views(size, box, mirrored)

    def joined(name: str) -> Tensor | None:
        found = [getattr(drawn, name) for _, drawn, _ in parts]
        return None if found[0] is None else torch.cat([x[mine] for x, (mine, _, _) in zip(found, parts)])[order]

    partners = [one for _, _, one in parts if one is not None]
    return MixedViews(
        views([drawn.views[mine] for mine, drawn, _ in parts]),
        joined("partner"),
        joined("share"),
        joined("patch"),
        views(partners) if partners else None,
    )


@dataclass(frozen=True)
class Pruning:
    """Settings of pools, mixed into the settings of what makes some."""

    keep: float = 0.1
    """Share of the labelled epochs that is kept of each class."""
    values: str = "half"
    """What logits are kept as: half, int8, lowrank or topk."""
    k: int | None = None
    """values=topk: logits that are kept; otherwise a quarter of the classes, at most 10."""
    fill: str = "mrs"
    """values=topk: what stands for the others: mrs (the view's smallest logit) or mr (nothing; the k share all
    probability)."""
    rank: int | None = None
    """values=lowrank: axes, and bytes a view; otherwise a quarter of the classes, at most 64."""
    cooling: float = 1.0
    """Factor on the temperature after every cool_epochs epochs of a student (LPQLD); 1: it stays."""
    cool_epochs: int = 30
    """Epochs of a student at one temperature."""
    cool_least: float = 2.0
    """Temperature below which it does not fall."""

    def check_pruning(self) -> None:
        """For ``__post_init__``: refuses settings out of range, and words that are none."""
        largest = sys.float_info.max
        one_of(self, values=CODES, fill=FILLS)
        require(
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
        """Finds before the work what does not fit so many classes."""
        word, value = ("rank", self.rank) if self.values == "lowrank" else ("k", self.k)
        if value is not None and self.values in ("lowrank", "topk"):
            check_code_size(word, value, classes)

    def count(self, epochs: int) -> int:
        """Epochs that a class keeps of those that are labelled, at least one."""
        return max(1, round(self.keep * epochs))

    def encode(self, logits: Tensor, means: bool = False) -> Code:
        """``logits`` (E, N, C) as they are kept; ``means``: see :class:`LowRank`."""
        classes = logits.shape[2]
        if self.values == "lowrank":
            return LowRank.encode(logits, self.rank or usual(classes, MOST_RANK), means)
        if self.values == "topk":
            return TopK.encode(logits, self.k or usual(classes, MOST_KEPT), self.fill)
        code: Code = CODES[self.values].encode(logits)
        return code

    def cooled(self) -> tuple[float, float, float] | None:
        """What :class:`PoolLabels` call ``cooling``."""
        return None if self.cooling == 1 else (self.cooling, self.cool_epochs, self.cool_least)


PROVIDERS.add("pool", PoolLabels)
