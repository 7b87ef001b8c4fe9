"""Codes that store the logits of views in fewer bytes.

A code stores logits, never probabilities: softmax(z / 20) is so flat that its largest entries contain little of its
mass, while the KL divergence at such a temperature is, up to a factor, the squared difference of centred logits.

============= ============================== ===================================================================
code          bytes per view of C classes    decoded values
============= ============================== ===================================================================
:class:`Half` 2 C                            float16 logits
:class:`Bytes` C + 4                         256 steps between the smallest and the largest logit of the view
:class:`LowRankCode` r (+ 2)                     a sum of r vectors that all views share, with 8-bit coefficients
:class:`TopKCode` k (2 + 1 or 2) (+ 2)           the k largest logits; the others at their minimum, or omitted
============= ============================== ===================================================================

:class:`LowRankLabels` and :class:`TopKLabels` are :class:`condense.labels.PerViewLabels` that decode their logits;
:class:`PoolLabels` also store only some epochs and sample the epochs of a student from these.
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
from condense.labels.base import Fidelity

FILLS = ("mrs", "mr")

DEFAULT_MAX_RANK, DEFAULT_MAX_K = 64, 10


class Code(Protocol):
    """Encoded logits (E, N, C). The instance contains the settings that encode other logits in the same way."""

    name: ClassVar[str]
    exactness: ClassVar[str]
    step_cost: ClassVar[str]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, N, C)."""

    def read(self, epochs: Tensor, ids: Tensor) -> Tensor:
        """Decodes logits, float32 (B, C), of images ``ids`` (B,) in ``epochs`` (B,), both on the device of the code;
        -inf for a class without probability."""

    def like(self, logits: Tensor) -> Code:
        """Encodes other logits (E', N', C) with the same settings."""

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns the arrays to store; ``from_arrays`` reads them."""


def code_to(code: Any, device: torch.device) -> Any:
    """Returns the same code on ``device``."""
    values = {field.name: getattr(code, field.name) for field in dataclasses.fields(code)}
    return type(code)(**{name: x.to(device) if isinstance(x, Tensor) else x for name, x in values.items()})


@dataclass(frozen=True, eq=False)
class HalfCode:
    """Logits as float16."""

    name: ClassVar[str] = "half"
    exactness: ClassVar[str] = "exact"
    step_cost: ClassVar[str] = "reading 2 C bytes a view"

    values: Tensor
    """(E, N, C) float16."""

    @classmethod
    def encode(cls, logits: Tensor) -> HalfCode:
        return cls(logits.half())

    @property
    def shape(self) -> tuple[int, int, int]:
        epochs, images, classes = self.values.shape
        return epochs, images, classes

    def read(self, epochs: Tensor, ids: Tensor) -> Tensor:
        return self.values[epochs, ids].float()

    def like(self, logits: Tensor) -> HalfCode:
        return HalfCode.encode(logits)

    def arrays(self) -> dict[str, np.ndarray]:
        return {"values": to_numpy(self.values)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], classes: int) -> HalfCode:
        return cls(read_finite(arrays, "values", np.float16, (None, None, classes)))

    def __str__(self) -> str:
        return "half"


@dataclass(frozen=True, eq=False)
class Int8Code:
    """Logits in 8 bits: 256 equal steps from the smallest to the largest logit of each view."""

    name: ClassVar[str] = "int8"
    exactness: ClassVar[str] = "lossy"
    step_cost: ClassVar[str] = "reading C + 4 bytes a view"

    codes: Tensor
    """(E, N, C) uint8."""
    least: Tensor
    """Smallest logit of each view, (E, N) float16."""
    step: Tensor
    """Step size of each view, (E, N) float16."""

    @classmethod
    def encode(cls, logits: Tensor) -> Int8Code:
        codes, least, step = [], [], []
        for epoch in logits.float():
            low = epoch.amin(-1).half()
            width = ((epoch.amax(-1) - low.float()) / 255).half()
            width = torch.where(width > 0, width, torch.finfo(torch.float16).tiny)  # if all logits of a view are equal
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

    def like(self, logits: Tensor) -> Int8Code:
        return Int8Code.encode(logits)

    def arrays(self) -> dict[str, np.ndarray]:
        return {"codes": to_numpy(self.codes), "least": to_numpy(self.least), "step": to_numpy(self.step)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], classes: int) -> Int8Code:
        codes = checked_array(arrays, "codes", np.uint8, (None, None, classes))
        least, step = (read_finite(arrays, name, np.float16, codes.shape[:2]) for name in ("least", "step"))
        return cls(torch.from_numpy(codes), least, step)

    def __str__(self) -> str:
        return "int8"


@dataclass(frozen=True, eq=False)
class LowRankCode:
    """Centred logits as their mean over views plus r 8-bit coefficients on the first r principal axes.

    The logits of a network that ends in a linear layer with d inputs have rank d + 1 at most. The mean logit of a view
    changes no softmax; it is stored only if the loss depends on it. Encoding needs 16 C^2 bytes.
    """

    name: ClassVar[str] = "lowrank"
    exactness: ClassVar[str] = "lossy"
    step_cost: ClassVar[str] = "r C multiplications a view"

    codes: Tensor
    """(E, N, r) int8."""
    scale: Tensor
    """Scale of the coefficients, (r,) float32."""
    basis: Tensor
    """(r, C) float16."""
    centre: Tensor
    """Mean of the centred logits over views, (C,) float16."""
    means: Tensor | None = None
    """Mean logit of each view, (E, N) float16."""

    @classmethod
    def encode(cls, logits: Tensor, rank: int, means: bool = False) -> LowRankCode:
        """Projects ``logits`` (E, N, C) on ``rank`` axes; ``means`` also stores each view's mean logit.

        Raises:
            CondenseError: The rank is not in 1..C.
        """
        classes = logits.shape[2]
        check_code_size("rank", rank, classes)
        with torch.autocast(logits.device.type, enabled=False):
            total = torch.zeros(classes, dtype=torch.float64, device=logits.device)
            square = torch.zeros(classes, classes, dtype=torch.float64, device=logits.device)
            for epoch in logits:  # by epoch: float32 copies of all may exceed the memory
                rows = _centred(epoch.float())
                total += rows.sum(0)
                square += rows.T @ rows
            centre = total / (logits.shape[0] * logits.shape[1])
            spread = square / (logits.shape[0] * logits.shape[1]) - centre.outer(centre)
            axes = torch.linalg.eigh(spread.cpu()).eigenvectors[:, -rank:].flip(1).T.to(logits.device)
            basis, mean = axes.half(), centre.half()
            # Coefficients are computed for the rounded basis and mean, so that their rounding adds no error.
            solve = torch.linalg.pinv(basis.double()).float()
            parts = [(_centred(epoch.float()) - mean.float()) @ solve for epoch in logits]
            scale = torch.stack([part.abs().amax(0) for part in parts]).amax(0) / 127
            scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
            codes = torch.stack([(part / scale).round().clamp(-127, 127).to(torch.int8) for part in parts])
            view_means = torch.stack([epoch.float().mean(-1).half() for epoch in logits]) if means else None
        return cls(codes, scale, basis, mean, view_means)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.codes.shape[0], self.codes.shape[1], self.basis.shape[1]

    def read(self, epochs: Tensor, ids: Tensor) -> Tensor:
        with torch.autocast(self.codes.device.type, enabled=False):  # a product in bf16 would exceed the stated error
            logits = self.centre.float() + (self.codes[epochs, ids].float() * self.scale) @ self.basis.float()
        return logits if self.means is None else logits + self.means[epochs, ids].float()[:, None]

    def like(self, logits: Tensor) -> LowRankCode:
        return LowRankCode.encode(logits, len(self.basis), self.means is not None)

    def arrays(self) -> dict[str, np.ndarray]:
        names = ("codes", "scale", "basis", "centre", "means")
        return {name: to_numpy(getattr(self, name)) for name in names if getattr(self, name) is not None}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], classes: int) -> LowRankCode:
        basis = read_finite(arrays, "basis", np.float16, (None, classes))
        codes = checked_array(arrays, "codes", np.int8, (None, None, len(basis)))
        means = read_finite(arrays, "means", np.float16, codes.shape[:2]) if "means" in arrays else None
        scale = read_finite(arrays, "scale", np.float32, (len(basis),))
        if not bool((128 * scale.abs() @ basis.float().abs()).isfinite().all()):
            raise CondenseError("labels/scale gives logits that are not finite; copy or make the set again")
        return cls(torch.from_numpy(codes), scale, basis, read_finite(arrays, "centre", np.float16, (classes,)), means)

    def __str__(self) -> str:
        return f"lowrank, rank={len(self.basis)}, means={self.means is not None}"


@dataclass(frozen=True, eq=False)
class TopKCode:
    """The k largest logits of each view. With ``fill="mrs"`` all other logits are decoded as the smallest one; with
    ``"mr"`` the other classes have no probability (the two forms of LPQLD that store logits)."""

    name: ClassVar[str] = "topk"
    exactness: ClassVar[str] = "lossy"
    step_cost: ClassVar[str] = "reading 4 k + 2 bytes a view"

    values: Tensor
    """(E, N, k) float16."""
    numbers: Tensor
    """Classes of the values, (E, N, k): uint8 for up to 256 classes, else the bits of uint16 as int16."""
    least: Tensor | None
    """Smallest logit of each view, (E, N) float16; None for ``mr``."""
    classes: int
    """Number of classes C."""

    @classmethod
    def encode(cls, logits: Tensor, k: int, fill: str = "mrs") -> TopKCode:
        """Keeps the ``k`` largest of ``logits`` (E, N, C).

        Raises:
            CondenseError: k is not in 1..C, an unknown fill, or there are more than 65,536 classes.
        """
        classes = logits.shape[2]
        check_code_size("k", k, classes)
        if fill not in FILLS:
            raise CondenseError(f"fill={fill}: unknown{did_you_mean(fill, FILLS)}")
        if classes > 1 << 16:
            raise CondenseError(f"topk: {classes} classes exceed the 65536 that 16 bits can index; use lowrank")
        values, numbers = zip(*(epoch.float().topk(k) for epoch in logits))
        least = torch.stack([epoch.float().amin(-1) for epoch in logits]).half() if fill == "mrs" else None
        # torch cannot index with uint16; int16 has the same bits.
        dtype = torch.uint8 if classes <= 256 else torch.int16
        return cls(torch.stack(values).half(), torch.stack(numbers).to(dtype), least, classes)

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

    def like(self, logits: Tensor) -> TopKCode:
        return TopKCode.encode(logits, self.values.shape[2], FILLS[self.least is None])

    def arrays(self) -> dict[str, np.ndarray]:
        numbers = to_numpy(self.numbers)
        arrays = {
            "values": to_numpy(self.values),
            "numbers": numbers if numbers.dtype == np.uint8 else numbers.view(np.uint16),
        }
        return arrays if self.least is None else {**arrays, "least": to_numpy(self.least)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], classes: int) -> TopKCode:
        values = read_finite(arrays, "values", np.float16, (None, None, None))
        numbers = checked_array(arrays, "numbers", class_dtype(classes), tuple(values.shape))
        if numbers.size and int(numbers.max()) >= classes:
            raise CondenseError(f"labels/numbers has values outside 0..{classes - 1}")
        least = read_finite(arrays, "least", np.float16, tuple(values.shape[:2])) if "least" in arrays else None
        indices = torch.from_numpy(numbers if numbers.dtype == np.uint8 else numbers.view(np.int16))
        return cls(values, indices, least, classes)

    def __str__(self) -> str:
        return f"topk, k={self.values.shape[2]}, fill={FILLS[self.least is None]}"


CODES: dict[str, Any] = {code.name: code for code in (HalfCode, Int8Code, LowRankCode, TopKCode)}


def check_code_size(setting: str, value: int, classes: int) -> None:
    """Checks that the rank or k is between 1 and the number of classes."""
    if not 1 <= value <= classes:
        raise CondenseError(f"{setting}={value}: must be 1 to {classes}, the number of classes")


def default_size(classes: int, most: int) -> int:
    """Returns the default number of axes or logits: a quarter of the classes, at most ``most``."""
    return min(most, max(1, classes // 4))


def _centred(rows: Tensor) -> Tensor:
    """Subtracts from each row of (B, C) the mean of its finite values."""
    finite = rows.isfinite()
    mean = rows.where(finite, 0.0).sum(-1, keepdim=True) / finite.sum(-1, keepdim=True)
    return rows - mean


def fidelity(code: Code, logits: Tensor, temperature: float) -> Fidelity:
    """Measures the difference between ``code`` and ``logits`` (E, N, C) on its device, with targets at ``temperature``.

    The two bounds include a margin for float32 sums in another order.
    """
    largest, error, size, moved, highest = 0.0, 0.0, 0.0, 0.0, 0.0
    ids = torch.arange(logits.shape[1], device=logits.device)
    for number, epoch in enumerate(logits):
        true, decoded = epoch.float(), code.read(torch.full_like(ids, number), ids)
        gap = (true / temperature).softmax(-1) - (decoded / temperature).softmax(-1)
        moved += float(gap.abs().sum().double()) / 2
        finite = decoded.isfinite()
        true = _centred(true.where(finite, -math.inf)).where(finite, 0.0)
        difference = true - _centred(decoded).where(finite, 0.0)
        if difference.numel():
            largest, highest = max(largest, float(difference.abs().max())), max(highest, float(true.abs().max()))
        error, size = error + float(difference.double().square().sum()), size + float(true.double().square().sum())
    margin, rounding = 1 + 2.0**-10, 2.0**-20
    relative = error / size * margin + rounding if size else 0.0
    return Fidelity(largest * margin + rounding * highest, relative, moved / max(1, math.prod(logits.shape[:2])))
