"""Light labels: per-view logits in codes, of fewer epochs, and teachers in 8 bits.

A code keeps logits, never probabilities: softmax(z / 20) is so flat that its largest entries hold little of it, while
the KL divergence at such a temperature is the squared difference of centred logits up to scale.

============= ============================== ===================================================================
code          bytes per view of C classes    what comes back
============= ============================== ===================================================================
:class:`Half` 2 C                            float16 logits
:class:`Bytes` C + 4                         256 steps between the smallest and the largest logit of the view
:class:`LowRank` r (+ 2)                     a sum of r vectors that all views share, with coefficients in 8 bits
:class:`TopK` k (2 + 1 or 2) (+ 2)           the k largest logits; the others at their minimum, or left out
============= ============================== ===================================================================

:class:`LowRankLabels` and :class:`TopKLabels` are :class:`condense.labels.PerViewLabels` that read from a code,
:class:`PoolLabels` such with few epochs, from which every epoch of a student is drawn anew.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from condense import rng
from condense.augment import MixedViews, ViewRule, Views, single
from condense.config import one_of, require
from condense.errors import CondenseError, did_you_mean
from condense.labels import (
    PROVIDERS,
    PerViewLabels,
    TeacherLabels,
    _array,
    _classes,
    _kl,
    _moved,
    _nbytes,
    _terms_from,
    epoch_answers,
    view_answers,
)
from condense.tracking import Progress

FILLS = ("mrs", "mr")
MOST_RANK, MOST_KEPT = 64, 10
MOST_RECORDS = 1 << 27
"""Classes times labelled epochs, of a pool."""


@dataclass(frozen=True)
class Fidelity:
    """How far decoded logits z' are from those that were encoded, z; both centred, which no softmax notices."""

    largest: float
    """Bound of |z - z'| over all views and classes; of ``fill=mr`` over the classes that are kept."""
    relative: float
    """Bound of sum |z - z'|^2 / sum |z|^2, over the same."""
    moved: float
    """Mean over views of half of sum |p - p'|, the share of the targets' probability that lies elsewhere, at T."""

    def array(self) -> np.ndarray:
        """float32 (3,)."""
        return np.array(dataclasses.astuple(self), np.float32)


# Codes ----------------------------------------------------------------------------------------------------------------


class Code(Protocol):
    """Logits (E, N, C) kept in some other way. Settings that encode others alike are in the instance."""

    name: ClassVar[str]
    exactness: ClassVar[str]
    step_cost: ClassVar[str]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, N, C)."""

    def read(self, epochs: Tensor, ids: Tensor) -> Tensor:
        """Logits, float32 (B, C), of images ``ids`` (B,) in ``epochs`` (B,), both on the device of the code; -inf where
        a class has no probability."""

    def like(self, logits: Tensor) -> Code:
        """Other logits (E', N', C) with the same settings."""

    def arrays(self) -> dict[str, np.ndarray]:
        """What is written; ``from_arrays`` reads it."""


def _on(code: Any, device: torch.device) -> Any:
    """The same code on ``device``."""
    moved = {field.name: getattr(code, field.name) for field in dataclasses.fields(code)}
    return type(code)(**{name: x.to(device) if isinstance(x, Tensor) else x for name, x in moved.items()})


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()


def _finite(arrays: Mapping[str, np.ndarray], name: str, kind: Any, shape: tuple[int | None, ...]) -> Tensor:
    """A stranger's array of numbers."""
    found = torch.from_numpy(_array(arrays, name, kind, shape))
    if not bool(found.isfinite().all()):
        raise CondenseError(f"labels/{name} has values that are not finite; copy or make the set again")
    return found


@dataclass(frozen=True, eq=False)
class Half:
    """Logits as they are."""

    name: ClassVar[str] = "half"
    exactness: ClassVar[str] = "exact"
    step_cost: ClassVar[str] = "reading 2 C bytes a view"

    values: Tensor
    """(E, N, C) float16."""

    @classmethod
    def encode(cls, logits: Tensor) -> Half:
        return cls(logits.half())

    @property
    def shape(self) -> tuple[int, int, int]:
        epochs, images, classes = self.values.shape
        return epochs, images, classes

    def read(self, epochs: Tensor, ids: Tensor) -> Tensor:
        return self.values[epochs, ids].float()

    def like(self, logits: Tensor) -> Half:
        return Half.encode(logits)

    def arrays(self) -> dict[str, np.ndarray]:
        return {"values": _numpy(self.values)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], classes: int) -> Half:
        return cls(_finite(arrays, "values", np.float16, (None, None, classes)))

    def __str__(self) -> str:
        return "half"


@dataclass(frozen=True, eq=False)
class Bytes:
    """256 equal steps from the smallest logit of a view to its largest."""

    name: ClassVar[str] = "int8"
    exactness: ClassVar[str] = "lossy"
    step_cost: ClassVar[str] = "reading C + 4 bytes a view"

    codes: Tensor
    """(E, N, C) uint8."""
    least: Tensor
    """(E, N) float16."""
    step: Tensor
    """(E, N) float16."""

    @classmethod
    def encode(cls, logits: Tensor) -> Bytes:
        codes, least, step = [], [], []
        for epoch in logits.float():
            low = epoch.amin(-1).half()
            width = ((epoch.amax(-1) - low.float()) / 255).half()
            width = torch.where(width > 0, width, torch.finfo(torch.float16).tiny)  # of a view of equal logits
            steps = (epoch - low.float()[:, None]) / width.float()[:, None]
            codes.append(steps.round().clamp(0, 255).to(torch.uint8))
            least.append(low)
            step.append(width)
        return cls(torch.stack(codes), torch.stack(least), torch.stack(step))

    @property
    def shape(self) -> tuple[int, int, int]:
        epochs, images, classes = self.codes.shape
        return epochs, images, classes

    def read(self, epochs: Tensor, ids: Tensor) -> Tensor:
        least, step = (x[epochs, ids].float()[:, None] for x in (self.least, self.step))
        return least + step * self.codes[epochs, ids].float()

    def like(self, logits: Tensor) -> Bytes:
        return Bytes.encode(logits)

    def arrays(self) -> dict[str, np.ndarray]:
        return {"codes": _numpy(self.codes), "least": _numpy(self.least), "step": _numpy(self.step)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], classes: int) -> Bytes:
        codes = _array(arrays, "codes", np.uint8, (None, None, classes))
        least, step = (_finite(arrays, name, np.float16, codes.shape[:2]) for name in ("least", "step"))
        return cls(torch.from_numpy(codes), least, step)

    def __str__(self) -> str:
        return "int8"


@dataclass(frozen=True, eq=False)
class LowRank:
    """Centred logits as their mean over views plus r coefficients in 8 bits on the first r principal axes.

    Logits of a network that ends in a linear layer of d features have a rank of at most d + 1. The mean of a view's own
    logits changes no softmax; it is kept where the loss is of the logits themselves. Encoding needs 16 C^2 bytes.
    """

    name: ClassVar[str] = "lowrank"
    exactness: ClassVar[str] = "lossy"
    step_cost: ClassVar[str] = "r C multiplications a view"

    codes: Tensor
    """(E, N, r) int8."""
    scale: Tensor
    """(r,) float32: of the coefficients."""
    basis: Tensor
    """(r, C) float16."""
    centre: Tensor
    """(C,) float16."""
    means: Tensor | None = None
    """(E, N) float16: each view's mean logit."""

    @classmethod
    def encode(cls, logits: Tensor, rank: int, means: bool = False) -> LowRank:
        """``logits`` (E, N, C) on ``rank`` axes.

        Raises:
            CondenseError: the rank is not in 1..C.
        """
        classes = logits.shape[2]
        _check_size("rank", rank, classes)
        with torch.autocast(logits.device.type, enabled=False):
            total = torch.zeros(classes, dtype=torch.float64, device=logits.device)
            square = torch.zeros(classes, classes, dtype=torch.float64, device=logits.device)
            for epoch in logits:  # by epoch: all of them as float32 may exceed the memory
                rows = _centred(epoch.float())
                total += rows.sum(0)
                square += rows.T @ rows
            centre = total / (logits.shape[0] * logits.shape[1])
            spread = square / (logits.shape[0] * logits.shape[1]) - centre.outer(centre)
            axes = torch.linalg.eigh(spread.cpu()).eigenvectors[:, -rank:].flip(1).T.to(logits.device)
            basis, kept = axes.half(), centre.half()
            # Coefficients fit the basis and the mean as they are stored, so that their rounding costs nothing twice.
            solve = torch.linalg.pinv(basis.double()).float()
            parts = [(_centred(epoch.float()) - kept.float()) @ solve for epoch in logits]
            scale = torch.stack([part.abs().amax(0) for part in parts]).amax(0) / 127
            scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
            codes = torch.stack([(part / scale).round().clamp(-127, 127).to(torch.int8) for part in parts])
            own = torch.stack([epoch.float().mean(-1).half() for epoch in logits]) if means else None
        return cls(codes, scale, basis, kept, own)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.codes.shape[0], self.codes.shape[1], self.basis.shape[1]

    def read(self, epochs: Tensor, ids: Tensor) -> Tensor:
        with torch.autocast(self.codes.device.type, enabled=False):  # a product in bf16 would break the stated error
            logits = self.centre.float() + (self.codes[epochs, ids].float() * self.scale) @ self.basis.float()
        return logits if self.means is None else logits + self.means[epochs, ids].float()[:, None]

    def like(self, logits: Tensor) -> LowRank:
        return LowRank.encode(logits, len(self.basis), self.means is not None)

    def arrays(self) -> dict[str, np.ndarray]:
        names = ("codes", "scale", "basis", "centre", "means")
        return {name: _numpy(getattr(self, name)) for name in names if getattr(self, name) is not None}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], classes: int) -> LowRank:
        basis = _finite(arrays, "basis", np.float16, (None, classes))
        codes = _array(arrays, "codes", np.int8, (None, None, len(basis)))
        means = _finite(arrays, "means", np.float16, codes.shape[:2]) if "means" in arrays else None
        scale = _finite(arrays, "scale", np.float32, (len(basis),))
        return cls(torch.from_numpy(codes), scale, basis, _finite(arrays, "centre", np.float16, (classes,)), means)

    def __str__(self) -> str:
        return f"lowrank, rank={len(self.basis)}, means={self.means is not None}"


@dataclass(frozen=True, eq=False)
class TopK:
    """The k largest logits of each view. Of the others ``fill="mrs"`` keeps the smallest, which stands for all of them;
    with ``"mr"`` they have no probability, and the k share all of it (LPQLD's two forms that keep logits)."""

    name: ClassVar[str] = "topk"
    exactness: ClassVar[str] = "lossy"
    step_cost: ClassVar[str] = "reading 4 k + 2 bytes a view"

    values: Tensor
    """(E, N, k) float16."""
    numbers: Tensor
    """(E, N, k) their classes: uint8 for up to 256 classes, else int16 that holds the bits of uint16."""
    least: Tensor | None
    """(E, N) float16: the smallest logit of each view; None for ``mr``."""
    classes: int
    """C."""

    @classmethod
    def encode(cls, logits: Tensor, k: int, fill: str = "mrs") -> TopK:
        """The ``k`` largest of ``logits`` (E, N, C).

        Raises:
            CondenseError: k is not in 1..C, an unknown fill, or there are more than 65,536 classes.
        """
        classes = logits.shape[2]
        _check_size("k", k, classes)
        if fill not in FILLS:
            raise CondenseError(f"fill={fill}: unknown{did_you_mean(fill, FILLS)}")
        if classes > 1 << 16:
            raise CondenseError(f"topk: numbers {classes} classes in 16 bits, which end at 65536; take lowrank")
        values, numbers = zip(*(epoch.float().topk(k) for epoch in logits))
        least = torch.stack([epoch.amin(-1).half() for epoch in logits]) if fill == "mrs" else None
        # int16 cannot count to 65,535, but keeps the bits; torch indexes no uint16.
        kind = torch.uint8 if classes <= 256 else torch.int16
        return cls(torch.stack(values).half(), torch.stack(numbers).to(kind), least, classes)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.values.shape[0], self.values.shape[1], self.classes

    def read(self, epochs: Tensor, ids: Tensor) -> Tensor:
        values = self.values[epochs, ids].float()
        if self.least is None:
            logits = torch.full((len(ids), self.classes), -math.inf, device=values.device)
        else:
            logits = self.least[epochs, ids].float()[:, None].repeat(1, self.classes)
        return logits.scatter(1, self.numbers[epochs, ids].long() & 0xFFFF, values)

    def like(self, logits: Tensor) -> TopK:
        return TopK.encode(logits, self.values.shape[2], FILLS[self.least is None])

    def arrays(self) -> dict[str, np.ndarray]:
        numbers = _numpy(self.numbers)
        arrays = {
            "values": _numpy(self.values),
            "numbers": numbers if numbers.dtype == np.uint8 else numbers.view(np.uint16),
        }
        return arrays if self.least is None else {**arrays, "least": _numpy(self.least)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], classes: int) -> TopK:
        values = _finite(arrays, "values", np.float16, (None, None, None))
        numbers = _array(arrays, "numbers", _small(classes), tuple(values.shape))
        if numbers.size and int(numbers.max()) >= classes:
            raise CondenseError(f"labels/numbers has values outside 0..{classes - 1}")
        least = _finite(arrays, "least", np.float16, tuple(values.shape[:2])) if "least" in arrays else None
        held = torch.from_numpy(numbers if numbers.dtype == np.uint8 else numbers.view(np.int16))
        return cls(values, held, least, classes)

    def __str__(self) -> str:
        return f"topk, k={self.values.shape[2]}, fill={FILLS[self.least is None]}"


CODES: dict[str, Any] = {code.name: code for code in (Half, Bytes, LowRank, TopK)}


def _check_size(word: str, value: int, classes: int) -> None:
    if not 1 <= value <= classes:
        raise CondenseError(f"{word}={value}: must be 1 to {classes}, the number of classes")


def usual(classes: int, most: int) -> int:
    """How many axes or logits are kept where nobody says: a quarter of the classes, at most ``most``."""
    return min(most, max(1, classes // 4))


def _centred(rows: Tensor) -> Tensor:
    """Rows (B, C) minus their means, over what is finite."""
    known = rows.isfinite()
    mean = rows.where(known, 0.0).sum(-1, keepdim=True) / known.sum(-1, keepdim=True)
    return rows - mean


def _small(classes: int) -> Any:
    """The smallest type that numbers so many classes."""
    return np.uint8 if classes <= 1 << 8 else np.uint16 if classes <= 1 << 16 else np.int64


def fidelity(code: Code, logits: Tensor, temperature: float) -> Fidelity:
    """How far ``code`` is from ``logits`` (E, N, C) on its device; the targets are at ``temperature``.

    The two bounds are widened by more than another order of float32 sums can change.
    """
    largest, error, size, moved, highest = 0.0, 0.0, 0.0, 0.0, 0.0
    ids = torch.arange(logits.shape[1], device=logits.device)
    for number, epoch in enumerate(logits):
        true, read = epoch.float(), code.read(torch.full_like(ids, number), ids)
        gap = (true / temperature).softmax(-1) - (read / temperature).softmax(-1)
        moved += float(gap.abs().sum().double()) / 2
        known = read.isfinite()
        true = _centred(true.where(known, -math.inf)).where(known, 0.0)
        apart = true - _centred(read).where(known, 0.0)
        if apart.numel():
            largest, highest = max(largest, float(apart.abs().max())), max(highest, float(true.abs().max()))
        error, size = error + float(apart.double().square().sum()), size + float(true.double().square().sum())
    wider, rounding = 1 + 2.0**-10, 2.0**-20
    relative = error / size * wider + rounding if size else 0.0
    return Fidelity(largest * wider + rounding * highest, relative, moved / max(1, math.prod(logits.shape[:2])))


# Labels that read from a code -----------------------------------------------------------------------------------------


class CodedLabels(PerViewLabels):
    """Labels of views whose logits are decoded when they are asked for; all else is as in ``PerViewLabels``.

    Args:
        code: of the logits (E, N, C).
        error: how far it is from what was encoded.
        terms: what :meth:`PerViewLabels.terms` gives.

    Raises:
        CondenseError: as ``PerViewLabels``; or the loss is of the logits themselves, and the code has not all of them.
    """

    def __init__(self, code: Code, error: Fidelity, **terms: Any) -> None:
        self.code, self.error = code, error
        if not code.shape[0]:
            raise CondenseError(f"{self.kind} labels of no epochs")
        self._settle(code.shape, **terms)
        if self.loss_kind == "mse" and isinstance(code, TopK) and code.least is None:
            raise CondenseError("fill=mr: loss_kind=mse needs the logits of all classes; take fill=mrs")

    @property
    def exactness(self) -> str:  # type: ignore[override]
        return self.code.exactness

    @property
    def step_cost(self) -> str:  # type: ignore[override]
        return self.code.step_cost

    def _read(self, epochs: Tensor, ids: Tensor) -> Tensor:
        where = next(x for x in vars(self.code).values() if isinstance(x, Tensor)).device
        return self.code.read(epochs.to(where), ids.to(where))

    def arrays(self) -> dict[str, np.ndarray]:
        arrays = {**self.code.arrays(), "error": self.error.array(), **self._settled()}
        if self.hard is not None:
            arrays["hard"] = arrays["hard"].astype(_small(self.shape[2]))
        return arrays

    def nbytes(self) -> int:
        """Those of the code, some that the views and the loss follow from, and 1 or 2 N where classes are needed."""
        return _nbytes(self.arrays())

    def to(self, device: torch.device) -> CodedLabels:
        moved = _moved(self, device, "hard")
        moved.code = _on(self.code, device)
        return moved

    def anew(self, images: Tensor, teacher: nn.Module, seed: int, hard: Tensor | None = None) -> PerViewLabels:
        """All epochs are asked for, whatever is kept of them."""
        logits = view_answers(
            teacher, images, self.epochs, self.views, seed,
            classes=self.shape[2], statistics=self.statistics, micro=self.micro or 8,
        )  # fmt: skip
        hard = None if self.hard is None else _classes(images, teacher, hard)
        terms = {**self.terms(), "seed": seed, "hard": hard}
        return self.like(PerViewLabels(logits.to(images.device), **terms))

    def like(self, labels: PerViewLabels) -> CodedLabels:
        """Other labels in the same code."""
        return _coded(type(self), labels, self.code.like(labels.logits))

    def rule(self) -> str:
        return f"{super().rule()}, {self.code}"

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], classes: int) -> CodedLabels:
        return cls(CODES[cls.kind].from_arrays(arrays, classes), **_known(arrays, classes))


def _coded(kind: Any, labels: PerViewLabels, code: Code, **more: Any) -> Any:
    """Labels of ``kind`` in ``code``, which was made of ``labels``, with the error that they have."""
    temperature = labels.temperature if labels.loss_kind == "kl" else 1.0
    return kind(code, fidelity(code, labels.logits, temperature), **more, **labels.terms())


def _known(arrays: Mapping[str, np.ndarray], classes: int) -> dict[str, Any]:
    """The stated error and the terms of a stranger's coded labels."""
    error = _array(arrays, "error", np.float32, (3,))
    if not (np.isfinite(error).all() and (error >= 0).all()):
        raise CondenseError(f"labels/error must be finite and at least 0, not {error.tolist()}")
    if "hard" in arrays:
        arrays = {**arrays, "hard": _array(arrays, "hard", _small(classes), (None,)).astype(np.int64)}
    return {"error": Fidelity(*error.tolist()), **_terms_from(arrays, classes)}


class LowRankLabels(CodedLabels):
    """Per-view labels on r axes that all views share; see :class:`LowRank`."""

    kind = "lowrank"

    @classmethod
    def of(cls, labels: PerViewLabels, rank: int = 64) -> LowRankLabels:
        """``labels`` on ``rank`` axes. The means of views are kept where the loss is of the logits (``mse``)."""
        return _coded(cls, labels, LowRank.encode(labels.logits, rank, labels.loss_kind == "mse"))


class TopKLabels(CodedLabels):
    """Per-view labels of the k largest logits; see :class:`TopK`."""

    kind = "topk"

    @classmethod
    def of(cls, labels: PerViewLabels, k: int = 10, fill: str = "mrs") -> TopKLabels:
        """The ``k`` largest logits of ``labels``, and what stands for the others."""
        return _coded(cls, labels, TopK.encode(labels.logits, k, fill))


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
                raise CondenseError(f"cooling={self.cooling}: must be a factor up to 1, epochs from 1 on, and a "
                                    "temperature above 0")  # fmt: skip
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
        made: PoolLabels = _coded(cls, part, encode(part.logits), of=of, cooling=cooling)
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
        return _kl(logits, targets[:, :-1], targets[0, -1], self.squared)  # a batch is of one epoch

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
        hard = _classes(images, teacher, hard)
        terms = {**self.terms(), "seed": seed, "hard": hard}
        records = pool_answers(
            teacher, images, hard, self.of, self.views, seed, self.shape[0],
            classes=self.shape[2], statistics=self.statistics, micro=self.micro or 8,
        )  # fmt: skip
        return PoolLabels.recorded(records.to(images.device), self.of, self.code.like, self.cooling, **terms)

    def like(self, labels: PerViewLabels) -> CodedLabels:
        return PoolLabels.pruned(labels, self.shape[0], self.code, cooling=self.cooling)

    def rule(self) -> str:
        cooled = "" if self.cooling is None else f", cooling={self.cooling}"
        return f"{super().rule()}, pool of {self.shape[0]}{cooled}"

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], classes: int) -> PoolLabels:
        name = _array(arrays, "code", np.uint8, (None,)).tobytes().decode(errors="replace")
        if name not in CODES:
            raise CondenseError(f"labels/code names '{name[:20]}', which is none of {', '.join(CODES)}")
        (of,) = _array(arrays, "of", np.int64, (1,)).tolist()
        cooling = _array(arrays, "cooling", np.float32, (3,)).tolist() if "cooling" in arrays else None
        return cls(CODES[name].from_arrays(arrays, classes), of=of, cooling=cooling, **_known(arrays, classes))


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
        views([drawn.views[mine] for mine, drawn, _ in parts]), joined("partner"), joined("share"), joined("patch"),
        views(partners) if partners else None,
    )  # fmt: skip


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
            self, k=(1, math.inf), rank=(1, math.inf), cooling=(1e-6, 1), cool_epochs=(1, math.inf),
            cool_least=(1e-6, largest),
        )  # fmt: skip
        if not 0 < self.keep <= 1:
            raise CondenseError(f"keep={self.keep:g}: must be above 0 and at most 1")

    def check_classes(self, classes: int) -> None:
        """Finds before the work what does not fit so many classes."""
        word, value = ("rank", self.rank) if self.values == "lowrank" else ("k", self.k)
        if value is not None and self.values in ("lowrank", "topk"):
            _check_size(word, value, classes)

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


# Teachers in 8 bits ---------------------------------------------------------------------------------------------------


class Int8TeacherLabels(TeacherLabels):
    """Teachers whose convolutions and linear layers keep 8 bits a weight, and a float32 scale for each output channel;
    everything else stays as it is. They answer with the weights that come back.

    Arguments are those of ``TeacherLabels``; the networks that are given do not change.
    """

    kind = "teacher-int8"
    exactness = "lossy"

    def __init__(self, members: nn.Module | Sequence[nn.Module], *terms: Any, **more: Any) -> None:
        kept = [copy.deepcopy(net) for net in ([members] if isinstance(members, nn.Module) else members)]
        for net in kept:
            _round(net)
        super().__init__(kept, *terms, **more)

    def _members(self) -> dict[str, np.ndarray]:
        arrays = {"weights": _numpy(self.teacher.weights)}
        for k, member in enumerate(self.teacher.members):
            layers = _layers(member)
            for name, value in member.state_dict().items():
                if name in layers:
                    codes, scale = quantised(value)
                    arrays |= {f"member{k}.{name}": _numpy(codes), f"scale{k}.{name}": _numpy(scale)}
                else:
                    arrays[f"member{k}.{name}"] = _numpy(value)
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], classes: int) -> Int8TeacherLabels:
        restored = dict(arrays)
        for name, codes in arrays.items():
            if name.startswith("member") and codes.dtype == np.int8:
                scale = f"scale{name.removeprefix('member')}"
                if scale not in arrays or not codes.ndim:
                    raise CondenseError(f"labels/{name}: 8-bit weights without their scales; make the set again")
                found = _finite(arrays, scale, np.float32, codes.shape[:1])
                restored[name] = _numpy(dequantised(torch.from_numpy(codes), found))
        made = super().from_arrays(restored, classes)
        assert isinstance(made, Int8TeacherLabels)
        return made


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes of a weight (out, ...), and the float32 scale (out,) of each output channel.

    Scales have 16 bits after the first, so that 127 scales are exact in float32 and what comes back has the same codes.
    """
    rows = weight.detach().float().flatten(1)
    mantissa, exponent = torch.frexp(rows.abs().amax(1) / 127)
    scale = torch.ldexp((mantissa * 2.0**16).round() * 2.0**-16, exponent)
    steps = rows / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    return steps.round().clamp(-127, 127).to(torch.int8).view(weight.shape), scale


def dequantised(codes: Tensor, scale: Tensor) -> Tensor:
    """float32 weights of :func:`quantised`."""
    return codes.float() * scale.view(-1, *[1] * (codes.ndim - 1))


def _layers(net: nn.Module) -> set[str]:
    """Names of the weights of convolutions and linear layers."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return {f"{name}.weight".lstrip(".") for name, layer in net.named_modules() if isinstance(layer, kinds)}


@torch.no_grad()
def _round(net: nn.Module) -> None:
    """Gives the network the weights that come back from 8 bits."""
    layers = _layers(net)
    for name, value in net.state_dict().items():  # shares memory with the network
        if name in layers:
            value.copy_(dequantised(*quantised(value)))


PROVIDERS.add("lowrank", LowRankLabels)
PROVIDERS.add("topk", TopKLabels)
PROVIDERS.add("pool", PoolLabels)
PROVIDERS.add("teacher-int8", Int8TeacherLabels)
