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

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from condense.errors import CondenseError, did_you_mean
from condense.labels.arrays import checked_array, class_dtype, read_finite, to_numpy

FILLS = ("mrs", "mr")

MOST_RANK, MOST_KEPT = 64, 10


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


def code_to(code: Any, device: torch.device) -> Any:
    """The same code on ``device``."""
    moved = {field.name: getattr(code, field.name) for field in dataclasses.fields(code)}
    return type(code)(**{name: x.to(device) if isinstance(x, Tensor) else x for name, x in moved.items()})


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
        return {"values": to_numpy(self.values)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], classes: int) -> Half:
        return cls(read_finite(arrays, "values", np.float16, (None, None, classes)))

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
        return {"codes": to_numpy(self.codes), "least": to_numpy(self.least), "step": to_numpy(self.step)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], classes: int) -> Bytes:
        codes = checked_array(arrays, "codes", np.uint8, (None, None, classes))
        least, step = (read_finite(arrays, name, np.float16, codes.shape[:2]) for name in ("least", "step"))
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
        check_code_size("rank", rank, classes)
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
        return {name: to_numpy(getattr(self, name)) for name in names if getattr(self, name) is not None}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], classes: int) -> LowRank:
        basis = read_finite(arrays, "basis", np.float16, (None, classes))
        codes = checked_array(arrays, "codes", np.int8, (None, None, len(basis)))
        means = read_finite(arrays, "means", np.float16, codes.shape[:2]) if "means" in arrays else None
        scale = read_finite(arrays, "scale", np.float32, (len(basis),))
        return cls(torch.from_numpy(codes), scale, basis, read_finite(arrays, "centre", np.float16, (classes,)), means)

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
        check_code_size("k", k, classes)
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
        numbers = to_numpy(self.numbers)
        arrays = {
            "values": to_numpy(self.values),
            "numbers": numbers if numbers.dtype == np.uint8 else numbers.view(np.uint16),
        }
        return arrays if self.least is None else {**arrays, "least": to_numpy(self.least)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], classes: int) -> TopK:
        values = read_finite(arrays, "values", np.float16, (None, None, None))
        numbers = checked_array(arrays, "numbers", class_dtype(classes), tuple(values.shape))
        if numbers.size and int(numbers.max()) >= classes:
            raise CondenseError(f"labels/numbers has values outside 0..{classes - 1}")
        least = read_finite(arrays, "least", np.float16, tuple(values.shape[:2])) if "least" in arrays else None
        held = torch.from_numpy(numbers if numbers.dtype == np.uint8 else numbers.view(np.int16))
        return cls(values, held, least, classes)

    def __str__(self) -> str:
        return f"topk, k={self.values.shape[2]}, fill={FILLS[self.least is None]}"


CODES: dict[str, Any] = {code.name: code for code in (Half, Bytes, LowRank, TopK)}


def check_code_size(word: str, value: int, classes: int) -> None:
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
