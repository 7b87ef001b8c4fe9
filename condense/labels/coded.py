"""Per-view labels whose logits are stored in a compressed code: ``lowrank`` and ``topk``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from condense.errors import CondenseError
from condense.labels.arrays import checked_array, class_dtype, read_init_kwargs
from condense.labels.base import LABEL_KINDS, Fidelity, copy_to, total_nbytes
from condense.labels.codes import CODES, Code, LowRankCode, TopKCode, code_to, fidelity
from condense.labels.per_view import PerViewLabels


class CodedLabels(PerViewLabels):
    """Per-view labels whose logits are decoded batch by batch; otherwise like ``PerViewLabels``.

    Args:
        code: Code of the logits (E, N, C).
        error: Difference between the code and the logits that were encoded.
        terms: The result of :meth:`PerViewLabels.terms`.

    Raises:
        CondenseError: As for ``PerViewLabels``; or ``loss_kind=mse`` with a code that lacks some logits.
    """

    stores_all_logits = False

    def __init__(self, code: Code, error: Fidelity, **terms: Any) -> None:
        self.code, self.error = code, error
        if not code.shape[0]:
            raise CondenseError(f"{self.kind} labels without epochs")
        self._settle(code.shape, **terms)
        if self.loss_kind == "mse" and isinstance(code, TopKCode) and code.least is None:
            raise CondenseError("fill=mr: loss_kind=mse needs the logits of all classes; set fill=mrs")

    @property
    def exactness(self) -> str:  # type: ignore[override]
        return self.code.exactness

    @property
    def step_cost(self) -> str:  # type: ignore[override]
        return self.code.step_cost

    def _read(self, epochs: Tensor, ids: Tensor) -> Tensor:
        device = next(x for x in vars(self.code).values() if isinstance(x, Tensor)).device
        return self.code.read(epochs.to(device), ids.to(device))

    def arrays(self) -> dict[str, np.ndarray]:
        assert self.error is not None
        arrays = {**self.code.arrays(), "error": self.error.array(), **self._setting_arrays()}
        if self.hard is not None:
            arrays["hard"] = arrays["hard"].astype(class_dtype(self.shape[2]))
        return arrays

    def nbytes(self) -> int:
        """Returns the bytes of the code, of the settings of views and loss, and 1 or 2 N if the classes are needed."""
        return total_nbytes(self.arrays())

    def to(self, device: torch.device) -> CodedLabels:
        moved = copy_to(self, device, "hard")
        moved.code = code_to(self.code, device)
        return moved

    def label_images(self, images: Tensor, teacher: nn.Module, seed: int, hard: Tensor | None = None) -> PerViewLabels:
        """Labels all epochs with the teacher, then encodes the logits with the same settings."""
        return self.like(super().label_images(images, teacher, seed, hard))

    def like(self, labels: PerViewLabels) -> CodedLabels:
        """Encodes other per-view labels with the same settings."""
        return make_coded_labels(type(self), labels, self.code.like(labels.logits))

    def cache_key(self) -> str:
        return f"{super().cache_key()}, {self.code}"

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], classes: int) -> CodedLabels:
        return cls(CODES[cls.kind].from_arrays(arrays, classes), **read_coded_kwargs(arrays, classes))


def make_coded_labels(kind: Any, labels: PerViewLabels, code: Code, **more: Any) -> Any:
    """Makes labels of ``kind`` from ``code``, which encodes ``labels``, and measures its error."""
    temperature = labels.temperature if labels.loss_kind == "kl" else 1.0
    return kind(code, fidelity(code, labels.logits, temperature), **more, **labels.terms())


def read_coded_kwargs(arrays: Mapping[str, np.ndarray], classes: int) -> dict[str, Any]:
    """Reads the stated error and the other arguments of coded labels from an untrusted file."""
    error = checked_array(arrays, "error", np.float32, (3,))
    if not (np.isfinite(error).all() and (error >= 0).all()):
        raise CondenseError(f"labels/error must be finite and at least 0, not {error.tolist()}")
    if "hard" in arrays:
        arrays = {**arrays, "hard": checked_array(arrays, "hard", class_dtype(classes), (None,)).astype(np.int64)}
    return {"error": Fidelity(*error.tolist()), **read_init_kwargs(arrays, classes)}


class LowRankLabels(CodedLabels):
    """Per-view labels as coefficients on r axes that all views share; see :class:`LowRankCode`."""

    kind = "lowrank"

    @classmethod
    def of(cls, labels: PerViewLabels, rank: int = 64) -> LowRankLabels:
        """Projects ``labels`` on ``rank`` axes. Each view's mean logit is stored only for ``loss_kind=mse``."""
        return make_coded_labels(cls, labels, LowRankCode.encode(labels.logits, rank, labels.loss_kind == "mse"))


class TopKLabels(CodedLabels):
    """Per-view labels of the k largest logits; see :class:`TopKCode`."""

    kind = "topk"

    @classmethod
    def of(cls, labels: PerViewLabels, k: int = 10, fill: str = "mrs") -> TopKLabels:
        """Keeps the ``k`` largest logits of each view; ``fill`` determines the other ones."""
        return make_coded_labels(cls, labels, TopKCode.encode(labels.logits, k, fill))


LABEL_KINDS.add("lowrank", LowRankLabels)

LABEL_KINDS.add("topk", TopKLabels)
