"""TODO-DOC."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from condense.errors import CondenseError
from condense.labels.arrays import checked_array, class_dtype, read_init_kwargs
from condense.labels.base import PROVIDERS, copy_to, total_nbytes
from condense.labels.codes import CODES, Code, Fidelity, LowRank, TopK, code_to, fidelity
from condense.labels.per_view import PerViewLabels
from condense.labels.teacher_logits import given_or_predicted_classes, view_answers

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
            arrays["hard"] = arrays["hard"].astype(class_dtype(self.shape[2]))
        return arrays

    def nbytes(self) -> int:
        """Those of the code, some that the views and the loss follow from, and 1 or 2 N where classes are needed."""
        return total_nbytes(self.arrays())

    def to(self, device: torch.device) -> CodedLabels:
        moved = copy_to(self, device, "hard")
        moved.code = code_to(self.code, device)
        return moved

    def anew(self, images: Tensor, teacher: nn.Module, seed: int, hard: Tensor | None = None) -> PerViewLabels:
        """All epochs are asked for, whatever is kept of them."""
        logits = view_answers(
            teacher,
            images,
            self.epochs,
            self.views,
            seed,
            classes=self.shape[2],
            statistics=self.statistics,
            micro=self.micro or 8,
        )
        hard = None if self.hard is None else given_or_predicted_classes(images, teacher, hard)
        terms = {**self.terms(), "seed": seed, "hard": hard}
        return self.like(PerViewLabels(logits.to(images.device), **terms))

    def like(self, labels: PerViewLabels) -> CodedLabels:
        """Other labels in the same code."""
        return make_coded_labels(type(self), labels, self.code.like(labels.logits))

    def rule(self) -> str:
        return f"{super().rule()}, {self.code}"

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], classes: int) -> CodedLabels:
        return cls(CODES[cls.kind].from_arrays(arrays, classes), **read_coded_kwargs(arrays, classes))


def make_coded_labels(kind: Any, labels: PerViewLabels, code: Code, **more: Any) -> Any:
    """Labels of ``kind`` in ``code``, which was made of ``labels``, with the error that they have."""
    temperature = labels.temperature if labels.loss_kind == "kl" else 1.0
    return kind(code, fidelity(code, labels.logits, temperature), **more, **labels.terms())


def read_coded_kwargs(arrays: Mapping[str, np.ndarray], classes: int) -> dict[str, Any]:
    """The stated error and the terms of a stranger's coded labels."""
    error = checked_array(arrays, "error", np.float32, (3,))
    if not (np.isfinite(error).all() and (error >= 0).all()):
        raise CondenseError(f"labels/error must be finite and at least 0, not {error.tolist()}")
    if "hard" in arrays:
        arrays = {**arrays, "hard": checked_array(arrays, "hard", class_dtype(classes), (None,)).astype(np.int64)}
    return {"error": Fidelity(*error.tolist()), **read_init_kwargs(arrays, classes)}


class LowRankLabels(CodedLabels):
    """Per-view labels on r axes that all views share; see :class:`LowRank`."""

    kind = "lowrank"

    @classmethod
    def of(cls, labels: PerViewLabels, rank: int = 64) -> LowRankLabels:
        """``labels`` on ``rank`` axes. The means of views are kept where the loss is of the logits (``mse``)."""
        return make_coded_labels(cls, labels, LowRank.encode(labels.logits, rank, labels.loss_kind == "mse"))


class TopKLabels(CodedLabels):
    """Per-view labels of the k largest logits; see :class:`TopK`."""

    kind = "topk"

    @classmethod
    def of(cls, labels: PerViewLabels, k: int = 10, fill: str = "mrs") -> TopKLabels:
        """The ``k`` largest logits of ``labels``, and what stands for the others."""
        return make_coded_labels(cls, labels, TopK.encode(labels.logits, k, fill))


PROVIDERS.add("lowrank", LowRankLabels)

PROVIDERS.add("topk", TopKLabels)
