"""Projector labels (HeLlO): a public network with stored low-rank changes labels the student's views in each step."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condense.augment import ViewRule, float32_decimal
from condense.data import Standardise
from condense.errors import CondenseError
from condense.files import tensors_sha256
from condense.labels.adapters import HEADS, MergedProjector, Projector
from condense.labels.arrays import checked_array, read_hard_labels, read_image_count, read_views
from condense.labels.base import (
    LABEL_KINDS,
    LOSSES,
    check_hard_labels,
    check_loss,
    epoch_views,
    logit_mse_loss,
    mix_rows,
    total_nbytes,
)
from condense.labels.teacher import TeacherLabels
from condense.labels.teacher_logits import compute_logits, given_or_predicted_classes
from condense.networks import find_backbone, is_normalisation

_HEAD = ("head", "head_a", "head_b", "bias", "scale")


class ProjectorLabels(TeacherLabels):
    """Targets computed by a projector in each step on the student's views.

    The public network is loaded when the first targets are computed, so a set can be opened and its images used without
    it. It counts as external bytes, including the text tower if that determines the head.

    Args:
        known: Description in the file: ``backbone`` (name, sha256, bytes), ``names``, ``rank``, ``head_rank``, ``head``
            (kind), ``shape``, ``mean`` and ``std``, and for a text head ``classes`` and ``prompts``.
        parts: The arrays of :meth:`Projector.arrays`.
        images, seed, views, temperature, squared: See ``TeacherLabels``.
        loss_kind, gamma, hard: See ``PerViewLabels``; the paper uses ``mse`` and does not state gamma.
        projector: The projector with merged weights, if it is already in memory.

    Raises:
        CondenseError: An invalid value.
    """

    kind = "projector"
    exactness = "approximate"
    step_cost = "a forward pass of the public network"

    def __init__(
        self,
        known: Mapping[str, Any],
        parts: Mapping[str, np.ndarray],
        images: int,
        seed: int,
        views: ViewRule | None = None,
        temperature: float = 20.0,
        squared: bool = True,
        *,
        loss_kind: str = "kl",
        gamma: float = 0.0,
        hard: Tensor | None = None,
        projector: MergedProjector | None = None,
    ) -> None:
        self.known, self.parts = dict(known), dict(parts)
        self.device, self._merged = torch.device("cpu"), projector
        self.names, self.shape = (), None  # the network is not built from the name of an architecture
        self._settle(images, seed, views, temperature, squared)
        self.loss_kind, self.gamma, self.hard = loss_kind, float32_decimal(gamma), hard
        check_loss(loss_kind, self.gamma, hard)
        if hard is not None:
            check_hard_labels(hard, images, len(self.parts["bias"]))

    @classmethod
    def of(cls, projector: Projector, known: Mapping[str, Any], *terms: Any, **more: Any) -> ProjectorLabels:
        """Makes labels from a trained projector and its description ``known``; rounds the projector to float16."""
        arrays = projector.rounded().arrays()
        return cls(known, arrays, *terms, **more, projector=MergedProjector(projector).cpu())

    @property
    def teacher(self) -> MergedProjector:  # type: ignore[override]
        """The projector with merged weights; loads the public network on first use.

        Raises:
            CondenseError: The public network is missing or a different one, or the stored arrays do not fit it.
        """
        if self._merged is None:
            self._merged = MergedProjector(build_projector(self.known, self.parts, self.device))
        return self._merged

    def training_batch(self, images: Tensor, ids: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        views, ids, drawn = epoch_views(self, images, ids, epoch)
        logits = compute_logits(self.teacher, views)
        if self.loss_kind == "kl":
            return views, (logits / self.temperature).softmax(-1)
        if self.hard is None or not self.gamma:
            return views, logits
        truth = F.one_hot(self.hard.to(ids.device), logits.shape[1]).float()
        return views, torch.stack([logits, mix_rows(truth, ids, drawn)], 1)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return super().loss(logits, targets) if self.loss_kind == "kl" else logit_mse_loss(logits, targets, self.gamma)

    def arrays(self) -> dict[str, np.ndarray]:
        text = json.dumps(self.known, separators=(",", ":")).encode()
        hard = {} if self.hard is None else {"hard": self.hard.cpu().numpy()}
        return {**self._settings(), "projector": np.frombuffer(text, np.uint8), **hard, **self.parts}

    def _settings(self) -> dict[str, np.ndarray]:
        return {
            **super()._settings(),
            "loss": np.array([self.temperature, self.gamma], np.float32),
            "flags": np.array([self.squared, LOSSES.index(self.loss_kind)], np.uint8),
        }

    def nbytes(self) -> int:
        """Returns the bytes of adapters, head, and the settings of backbone, views and loss."""
        return total_nbytes(self.arrays())

    def external_nbytes(self) -> int:
        """Returns the bytes of the public network."""
        return int(self.known["backbone"]["bytes"])

    def to(self, device: torch.device) -> ProjectorLabels:
        device = torch.device(device)
        if self.device == device:
            return self
        moved = copy.copy(self)
        moved.device = device
        moved._merged = None if self._merged is None else copy.deepcopy(self._merged).to(device)
        return moved

    def label_images(
        self, images: Tensor, teacher: nn.Module, seed: int, hard: Tensor | None = None
    ) -> ProjectorLabels:
        """Labels other images with the same projector; ``teacher`` is not used."""
        labels = copy.copy(self.to(images.device))
        labels.images, labels.seed = len(images), seed
        labels.hard = None if self.hard is None else given_or_predicted_classes(images, labels.teacher, hard)
        return labels

    def relabelling_teacher(self, teacher: nn.Module | None) -> nn.Module | None:
        return self.teacher

    def own_teacher(
        self, device: torch.device, *, original: bool
    ) -> tuple[nn.Module, dict[str, Any] | None, tuple[str, ...]] | None:
        if original:
            return None
        net = self.to(device).teacher
        network = f"projector of {self.known['backbone']['name']}"
        return net, {"network": network, "sha256": tensors_sha256(net.state_dict())}, ()

    def loss_settings(self) -> dict[str, Any]:
        return {"loss_kind": self.loss_kind, "gamma": self.gamma, "hard": self.hard}

    def cache_key(self) -> str:
        return f"{super().cache_key()}, {self.loss_kind}, gamma={self.gamma}"

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], classes: int) -> ProjectorLabels:
        views, seed, _, _ = read_views(arrays)
        count = read_image_count(arrays)
        temperature, gamma = checked_array(arrays, "loss", np.float32, (2,)).tolist()
        squared, loss = checked_array(arrays, "flags", np.uint8, (2,)).tolist()
        if squared > 1 or loss >= len(LOSSES):
            raise CondenseError(f"labels/flags must be 0 or 1, not {squared} and {loss}")
        hard = read_hard_labels(arrays, classes) if "hard" in arrays else None
        known = _parse_description(checked_array(arrays, "projector", np.uint8, (None,)).tobytes(), classes)
        parts = {name: np.asarray(x) for name, x in arrays.items() if name in _HEAD or name[1:].isdigit()}
        checked_array(parts, "bias", np.float32, (classes,))
        for name, part in parts.items():
            if part.dtype not in (np.float16, np.float32) or not np.isfinite(part).all():
                raise CondenseError(f"labels/{name} must be finite floats; copy or make the set again")
        (scale,) = checked_array(parts, "scale", np.float32, (1,)).tolist()
        if scale <= 0:
            raise CondenseError(f"labels/scale must be above 0, not {scale}")
        return cls(
            known,
            parts,
            count,
            seed,
            views,
            temperature,
            bool(squared),
            loss_kind=LOSSES[loss],
            gamma=gamma,
            hard=hard,
        )


def _parse_description(text: bytes, classes: int) -> dict[str, Any]:
    """Parses the description of a projector in an untrusted file and checks all fields."""
    try:
        known = json.loads(text)
        kinds = {
            "backbone": dict,
            "names": list,
            "rank": int,
            "head_rank": int,
            "head": str,
            "shape": list,
            "mean": list,
            "std": list,
        }
        backbone, shape = known["backbone"], known["shape"]
        texts = [backbone["name"], backbone["sha256"], backbone.get("path", ""), *known["names"]]
        fits = all(isinstance(known[key], kind) for key, kind in kinds.items()) and known["head"] in HEADS
        fits = fits and all(isinstance(text, str) and text.isprintable() for text in texts)
        fits = fits and len(set(known["names"])) == len(known["names"])  # each name needs memory
        fits = fits and isinstance(backbone["bytes"], int) and 0 <= backbone["bytes"] < 1 << 63
        fits = fits and len(shape) == 3 and all(isinstance(size, int) and size > 0 for size in shape)
        fits = fits and known["rank"] > 0 and known["head_rank"] >= 0 and is_normalisation(known, shape[0])
        if fits and known["head"] == "text":
            fits = isinstance(known["classes"], list) and len(known["classes"]) == classes
            fits = fits and all(isinstance(name, str) for name in known["classes"])
            fits = fits and bool(known["prompts"]) and all("{}" in prompt for prompt in known["prompts"])
            fits = fits and all(isinstance(prompt, str) for prompt in known["prompts"])
        if not fits:
            raise ValueError("no projector")
        return dict(known)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as fault:
        raise CondenseError("labels/projector is not a valid description; copy or make the set again") from fault


def build_projector(known: Mapping[str, Any], parts: Mapping[str, np.ndarray], device: torch.device) -> Projector:
    """Builds the projector that a file describes, from the public network that it names.

    Args:
        known: Description, see :class:`ProjectorLabels`.
        parts: The arrays of :meth:`Projector.arrays`.
        device: Device of the projector.

    Raises:
        CondenseError: The network is missing or a different one, or the arrays do not fit it.
    """
    described, prefix = known["backbone"], "projector labels: backbone "
    backbone = None
    for name in dict.fromkeys([str(described["name"]), str(described.get("path", described["name"]))]):
        try:
            backbone = find_backbone(name, tuple(known["shape"]), device, prefix)
            break
        except CondenseError as fault:
            missing = fault
    if backbone is None:
        raise missing
    if (backbone.known["sha256"], backbone.external(known["head"])) != (described["sha256"], described["bytes"]):
        raise CondenseError(
            f"{prefix}{described['name']}: is another network than that of these labels (its checksum or "
            "size differs); restore it"
        )
    transform = Standardise(torch.tensor(known["mean"]), torch.tensor(known["std"]))
    names = [str(name) for name in known["names"]]
    matrices = {name for name, weight in backbone.encoder.named_parameters() if weight.ndim > 1}
    unknown = sorted(set(names) - matrices)
    if unknown:
        raise CondenseError(
            f"labels/projector: does not fit {described['name']}, which has no weights {unknown[0]}; give "
            "the backbone that the labels were made with"
        )
    classes = len(parts["bias"])
    if known["head"] == "text":
        if backbone.text is None:
            raise CondenseError(f"labels/projector: has a text head, but {described['name']} has no text tower")
        start = backbone.text(known["classes"], known["prompts"])
    else:
        with torch.no_grad():
            width = backbone.encoder(torch.zeros(1, *backbone.encoder.shape, device=device)).shape[1]
        start = torch.zeros(width, classes, device=device)
    ranks = int(known["rank"]), int(known["head_rank"])
    projector = Projector(backbone.encoder, names, ranks[0], start, ranks[1], backbone.scale, transform)
    projector.load(parts)
    return projector


LABEL_KINDS.add("projector", ProjectorLabels)
