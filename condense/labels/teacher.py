"""Teacher labels: the teachers' weights are stored, and they label the student's views in each step."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from condense import networks, rng
from condense.augment import CropViews, ViewRule
from condense.errors import CondenseError
from condense.labels.arrays import (
    checked_array,
    read_finite,
    read_image_count,
    read_teacher_networks,
    read_views,
    to_numpy,
    view_arrays,
)
from condense.labels.base import (
    LABEL_KINDS,
    Labels,
    checked_temperature,
    epoch_views,
    kl_loss,
    statistics_text,
    total_nbytes,
)
from condense.labels.teacher_logits import check_statistics, compute_logits, grouping_version
from condense.networks import MeanLogits


class TeacherLabels(Labels):
    """Targets computed by the teachers in each step on the student's views. Only the teachers' weights are stored.

    The target is softmax(logits / T), float32 (B, C), of the teachers' mean logits; the loss is its KL divergence to
    the student's softmax at T. The file contains the networks' weights, which count as bytes of the labels; networks
    that cannot be built from a name (``names`` is empty) count as external, and the labels cannot be stored.

    Every epoch has its own views. With ``statistics="batch"`` BatchNorm uses the statistics of ``micro`` consecutive
    views of the student's batch (BSSL, CV-DD), so that targets depend on the batch.

    Args:
        members: One network or several with the same classes; put into eval mode.
        images: Number of images N that the labels are for.
        seed: Seed of the views.
        views: Distribution of the views. Default: crops with CutMix.
        temperature: T of the targets and the loss, rounded to float32.
        squared: Whether the loss is multiplied by T^2.
        weights: Weights of the members' logits, normalised to sum 1. Default: equal.
        names: Names of the members' architectures for :func:`condense.networks.build`.
        shape: (C,H,W) of the images that the members were built for; needed with names.
        statistics: ``running`` or ``batch``.
        micro: Views per micro-batch with ``statistics="batch"``.

    Raises:
        CondenseError: An invalid value, or different numbers of members, weights and names.
    """

    kind = "teacher"
    per_view = True
    exactness = "exact"
    step_cost = "a forward pass of the teachers"

    def __init__(
        self,
        members: nn.Module | Sequence[nn.Module],
        images: int,
        seed: int,
        views: CropViews | ViewRule | None = None,
        temperature: float = 20.0,
        squared: bool = True,
        *,
        weights: Sequence[float] | None = None,
        names: Sequence[str] = (),
        shape: networks.Shape | None = None,
        statistics: str = "running",
        micro: int = 8,
    ) -> None:
        members = [members] if isinstance(members, nn.Module) else list(members)
        self.teacher = MeanLogits(members, weights).eval()
        self._settle(images, seed, views, temperature, squared, statistics, micro)
        self.names, self.shape = tuple(names), shape
        if names and (len(names) != len(members) or shape is None):
            raise CondenseError(f"{len(members)} teachers but {len(names)} names, images of {shape}: give all of them")

    def _settle(
        self,
        images: int,
        seed: int,
        views: CropViews | ViewRule | None,
        temperature: float,
        squared: bool,
        statistics: str = "running",
        micro: int = 8,
    ) -> None:
        """Sets everything except the teachers."""
        self.images, self.seed = images, seed
        self.views = ViewRule(mix="cutmix") if views is None else ViewRule.of(views)
        self.temperature, self.squared = checked_temperature(temperature), squared
        self.statistics, self.micro = check_statistics(statistics, micro)

    def __len__(self) -> int:
        return self.images

    @property
    def target_version(self) -> str:  # type: ignore[override]
        return grouping_version(self.statistics)

    def training_batch(self, images: Tensor, ids: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        views, _, _ = epoch_views(self, images, ids, epoch)
        logits = compute_logits(self.teacher, views, statistics=self.statistics, micro=self.micro)
        return views, (logits / self.temperature).softmax(-1)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return kl_loss(logits, targets, self.temperature, self.squared)

    def arrays(self) -> dict[str, np.ndarray]:
        if not self.names:
            raise CondenseError("the teachers of these labels cannot be stored: give the names of their architectures")
        description = json.dumps({"names": self.names, "shape": self.shape}).encode()
        return {**self._settings(), "networks": np.frombuffer(description, np.uint8), **self._members()}

    def _settings(self) -> dict[str, np.ndarray]:
        return {
            "images": np.array([self.images], np.int64),
            "loss": np.array([self.temperature], np.float32),
            "flags": np.array([self.squared], np.uint8),
            **view_arrays(self.views, self.seed, self.statistics, self.micro),
        }

    def _members(self) -> dict[str, np.ndarray]:
        """Returns weights and buffers as ``member0.NAME`` and so on, and the weights of the members' logits."""
        arrays = {"weights": self.teacher.weights.cpu().numpy()}
        for k, member in enumerate(self.teacher.members):
            arrays |= {f"member{k}.{name}": x.detach().cpu().numpy() for name, x in member.state_dict().items()}
        return arrays

    def nbytes(self) -> int:
        """Returns the bytes of the networks' weights and buffers, and of the settings of the views and the loss."""
        return total_nbytes(self.arrays() if self.names else self._settings())

    def external_nbytes(self) -> int:
        return 0 if self.names else total_nbytes(self._members())

    def to(self, device: torch.device) -> TeacherLabels:
        if self.teacher.weights.device == torch.device(device):
            return self
        moved = copy.copy(self)
        moved.teacher = copy.deepcopy(self.teacher).to(device)
        return moved

    def label_images(self, images: Tensor, teacher: nn.Module, seed: int, hard: Tensor | None = None) -> TeacherLabels:
        return type(self)(
            teacher,
            len(images),
            seed,
            self.views,
            self.temperature,
            self.squared,
            statistics=self.statistics,
            micro=self.micro,
        )

    def relabelling_teacher(self, teacher: nn.Module | None) -> nn.Module | None:
        return self.teacher if teacher is None else teacher

    def own_teacher(
        self, device: torch.device, *, original: bool
    ) -> tuple[nn.Module, dict[str, Any] | None, tuple[str, ...]] | None:
        return (self.to(device).teacher, None, self.names) if self.names else None

    def cache_key(self) -> str:
        return f"{self.views}, {statistics_text(self)}, T={self.temperature}, squared={self.squared}"

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], classes: int) -> TeacherLabels:
        views, seed, statistics, micro = read_views(arrays)
        count = read_image_count(arrays)
        (temperature,) = checked_array(arrays, "loss", np.float32, (1,)).tolist()
        (squared,) = checked_array(arrays, "flags", np.uint8, (1,)).tolist()
        names, shape = read_teacher_networks(checked_array(arrays, "networks", np.uint8, (None,)).tobytes())
        members = []
        for k, name in enumerate(names):
            prefix = f"member{k}."
            state = {
                key.removeprefix(prefix): torch.from_numpy(np.asarray(x))
                for key, x in arrays.items()
                if key.startswith(prefix)
            }
            network, misfit = networks.build_from_state(name, shape, classes, state)
            if misfit:
                raise CondenseError(
                    f"labels/{prefix}*: not the weights of {name} ({misfit}); copy or make the set again"
                )
            members.append(network)
        weights = torch.from_numpy(checked_array(arrays, "weights", np.float32, (len(names),)))
        if not bool((weights >= 0).all()) or not math.isclose(float(weights.sum()), 1, abs_tol=1e-3):
            raise CondenseError(f"labels/weights must be shares of 1, not {weights.tolist()}")
        labels = cls(
            members,
            count,
            seed,
            views,
            temperature,
            bool(squared),
            names=names,
            shape=shape,
            statistics=statistics,
            micro=micro,
        )
        labels.teacher.weights.copy_(weights)  # exactly as stored: normalising them again would round
        probe = torch.randn(2, *shape, generator=rng.generator("probe"))
        if not bool(compute_logits(labels.teacher, probe).isfinite().all()):
            raise CondenseError("labels/member*: the teachers' logits are not finite; copy or make the set again")
        return labels


LABEL_KINDS.add("teacher", TeacherLabels)


class Int8TeacherLabels(TeacherLabels):
    """Teacher labels whose convolutions and linear layers have 8-bit weights and a float32 scale per output channel;
    everything else is stored unchanged. Targets are computed with the decoded weights.

    Arguments are those of ``TeacherLabels``; the given networks do not change.
    """

    kind = "teacher-int8"
    exactness = "lossy"

    def __init__(self, members: nn.Module | Sequence[nn.Module], *terms: Any, **more: Any) -> None:
        copies = [copy.deepcopy(net) for net in ([members] if isinstance(members, nn.Module) else members)]
        for net in copies:
            _round_weights(net)
        super().__init__(copies, *terms, **more)

    def _members(self) -> dict[str, np.ndarray]:
        arrays = {"weights": to_numpy(self.teacher.weights)}
        for k, member in enumerate(self.teacher.members):
            layers = _layers(member)
            for name, value in member.state_dict().items():
                if name in layers:
                    codes, scale = quantise(value)
                    arrays |= {f"member{k}.{name}": to_numpy(codes), f"scale{k}.{name}": to_numpy(scale)}
                else:
                    arrays[f"member{k}.{name}"] = to_numpy(value)
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], classes: int) -> Int8TeacherLabels:
        restored = dict(arrays)
        for name, codes in arrays.items():
            if name.startswith("member") and codes.dtype == np.int8:
                scale = f"scale{name.removeprefix('member')}"
                if scale not in arrays or not codes.ndim:
                    raise CondenseError(f"labels/{name}: 8-bit weights without their scales; make the set again")
                scales = read_finite(arrays, scale, np.float32, codes.shape[:1])
                restored[name] = to_numpy(dequantise(torch.from_numpy(codes), scales))
        labels = super().from_arrays(restored, classes)
        assert isinstance(labels, Int8TeacherLabels)
        return labels


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Returns int8 codes of a weight (out, ...) and the float32 scale (out,) of each output channel.

    Scales are rounded to 17 significant bits, so that 127 times a scale is exact in float32 and quantising the decoded
    weights gives the same codes.
    """
    rows = weight.detach().float().flatten(1)
    mantissa, exponent = torch.frexp(rows.abs().amax(1) / 127)
    scale = torch.ldexp((mantissa * 2.0**16).round() * 2.0**-16, exponent)
    steps = rows / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    return steps.round().clamp(-127, 127).to(torch.int8).view(weight.shape), scale


def dequantise(codes: Tensor, scale: Tensor) -> Tensor:
    """Returns the float32 weights that :func:`quantised` encoded."""
    return codes.float() * scale.view(-1, *[1] * (codes.ndim - 1))


def _layers(net: nn.Module) -> set[str]:
    """Returns the names of the weights of convolutions and linear layers."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return {f"{name}.weight".lstrip(".") for name, layer in net.named_modules() if isinstance(layer, kinds)}


@torch.no_grad()
def _round_weights(net: nn.Module) -> None:
    """Replaces the weights of convolutions and linear layers by their 8-bit approximation."""
    layers = _layers(net)
    for name, value in net.state_dict().items():  # the tensors share memory with the network
        if name in layers:
            value.copy_(dequantise(*quantise(value)))


LABEL_KINDS.add("teacher-int8", Int8TeacherLabels)
