"""Image-to-label projectors (HeLlO, ICCV 2025): a public network, low-rank changes of its weights, and a head.

``logits = scale * normalised(E(x)) @ W + bias``, where E is a public encoder whose weights of convolutions and linear
layers are ``W_0 + A B``, each as a matrix with one row for each output. Only A, B and the head are stored; the
encoder is identified by its name and does not change. The products are added to the weights when a projector is loaded,
so that a student's step costs one forward pass of the encoder.

=========================== ==========================================================================================
backbone                    weights
=========================== ==========================================================================================
NAME                        one of :data:`BUNDLED_BACKBONES`, included in this package
FILE.h5                     the first teacher of a file of ``condense teachers``
torchvision:NAME            the default public weights
torchvision:NAME@WEIGHTS    other public weights, e.g. IMAGENET1K_V1
timm:NAME                   the public weights
open_clip:NAME@TAG          a CLIP model with the weights TAG of open_clip; the text tower can make the head
LIBRARY:NAME@FILE           the same network with the weights of a file
=========================== ==========================================================================================
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condense import networks, rng
from condense.data import Standardise, Transform
from condense.errors import CondenseError
from condense.labels.arrays import checked_array
from condense.networks import Encoder

HEADS = ("text", "mean")


def adapted_weight_names(encoder: Encoder, pixels: Tensor) -> list[str]:
    """Returns the names of the weights of convolutions and linear layers, including attention, on which the encoder's
    features of ``pixels`` depend; weights of an unused classifier are omitted."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)
    weights = {
        f"{path}.{name}".lstrip("."): weight
        for path, layer in encoder.named_modules()
        if isinstance(layer, kinds)
        for name, weight in layer.named_parameters(recurse=False)
        if weight.ndim > 1
    }
    copies = {name: weight.detach().clone().requires_grad_() for name, weight in weights.items()}
    with torch.enable_grad():
        features = torch.func.functional_call(encoder, copies, (pixels,))
        gradients = torch.autograd.grad(features.float().square().sum(), list(copies.values()), allow_unused=True)
    return [name for name, gradient in zip(copies, gradients) if gradient is not None]


class Projector(networks.Network):
    """Network from images in a set's training space to logits (B, classes). Parameters that require grad are stored.

    Args:
        encoder: Frozen encoder.
        names: Names of its adapted weights.
        rank: Rank r of their changes A B, limited by the size of the matrix. A starts at 0, so that training starts at
            the public weights.
        start: Initial head (D, classes), from text or from the classes' mean features.
        head_rank: Rank of the head's change; 0: the head itself is learned and stored, as for mean features.
        scale: Initial factor of the cosines.
        transform: Map from pixels to the training space of the set.
        seed: Seed of the initial values of B.
    """

    def __init__(
        self,
        encoder: Encoder,
        names: Sequence[str],
        rank: int,
        start: Tensor,
        head_rank: int,
        scale: float,
        transform: Standardise,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.encoder, self.names, self.transform = encoder, list(names), transform
        self.low, self.high = nn.ParameterList(), nn.ParameterList()
        weights = dict(encoder.named_parameters())
        with rng.seeded(seed, "projector"):
            for name in self.names:
                rows, columns = weights[name].flatten(1).shape
                self._pair(rows, columns, rank, start.device, self.low, self.high)
            self.start: Tensor
            self.head: nn.Parameter | None = None
            self.head_pair = nn.ParameterList()
            if head_rank:
                self.register_buffer("start", start, persistent=False)
                self._pair(start.shape[0], start.shape[1], head_rank, start.device, self.head_pair, self.head_pair)
            else:
                self.head = nn.Parameter(start.clone())
        self.bias = nn.Parameter(torch.zeros(start.shape[1], device=start.device))
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale), device=start.device))

    @staticmethod
    def _pair(rows: int, columns: int, rank: int, device: torch.device, a: Any, b: Any) -> None:
        rank = min(rank, rows, columns)
        a.append(nn.Parameter(torch.zeros(rows, rank, device=device)))
        values = torch.empty(rank, columns).uniform_(-1, 1) * columns**-0.5
        b.append(nn.Parameter(values.to(device)))

    def weights(self) -> dict[str, Tensor]:
        """Returns the adapted weights of the encoder by name."""
        own = dict(self.encoder.named_parameters())
        with torch.autocast(self.bias.device.type, enabled=False):
            return {
                name: own[name] + (a @ b).view(own[name].shape) for name, a, b in zip(self.names, self.low, self.high)
            }

    def columns(self) -> Tensor:
        """Returns the head (D, classes)."""
        if self.head is not None:
            return self.head
        a, b = self.head_pair
        with torch.autocast(a.device.type, enabled=False):
            return self.start + a @ b

    def embed(self, x: Tensor, maps: list[Tensor] | None = None) -> Tensor:
        """Maps (B,C,H,W) in training space to features (B, D); appends no maps."""
        if self.transform.mean.device != x.device:
            self.transform = self.transform.to(x.device)
        pixels = self.transform.inverse(x)
        features: Tensor = torch.func.functional_call(self.encoder, self.weights(), (pixels,))
        return features

    def classify(self, embedding: Tensor) -> Tensor:
        """Maps features to float32 logits (B, classes)."""
        return cosine_logits(embedding, self.columns(), self.log_scale.exp(), self.bias)

    @torch.no_grad()
    def rounded(self) -> Projector:
        """Rounds the stored matrices to float16 in place, as the file stores them, and returns itself."""
        for parameter in self.parameters():
            if parameter.requires_grad and parameter.ndim > 1:
                parameter.copy_(parameter.half().float())
        return self

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns the arrays to store."""
        half = {f"a{k}": a for k, a in enumerate(self.low)} | {f"b{k}": b for k, b in enumerate(self.high)}
        half |= {"head": self.head} if self.head is not None else dict(zip(("head_a", "head_b"), self.head_pair))
        return {
            **{name: x.detach().half().cpu().numpy() for name, x in half.items()},
            "bias": self.bias.detach().cpu().numpy(),
            "scale": self.log_scale.detach().exp().cpu().numpy()[None],
        }

    @torch.no_grad()
    def load(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Loads the result of :meth:`arrays`.

        Raises:
            CondenseError: The shapes do not fit this encoder.
        """
        targets: dict[str, Tensor] = {f"a{k}": a for k, a in enumerate(self.low)}
        targets |= {f"b{k}": b for k, b in enumerate(self.high)}
        targets |= {"head": self.head} if self.head is not None else dict(zip(("head_a", "head_b"), self.head_pair))
        for name, target in targets.items():
            array = arrays.get(name)
            if array is None or array.dtype != np.float16 or array.shape != tuple(target.shape):
                actual = "missing" if array is None else f"{array.dtype} {array.shape}"
                raise CondenseError(
                    f"labels/{name}: does not fit the backbone ({actual}, not float16 "
                    f"{tuple(target.shape)}); give the backbone that the labels were made with"
                )
            target.copy_(torch.from_numpy(array))
        self.bias.copy_(torch.from_numpy(checked_array(arrays, "bias", np.float32, tuple(self.bias.shape))))
        self.log_scale.fill_(math.log(checked_array(arrays, "scale", np.float32, (1,))[0]))


class MergedProjector(nn.Module):
    """A projector whose low-rank changes are added to its weights; see :class:`Projector`."""

    def __init__(self, projector: Projector) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(projector.encoder)
        with torch.no_grad():
            for name, weight in projector.weights().items():
                self.encoder.get_parameter(name).copy_(weight)
        self.transform = projector.transform
        self.columns: Tensor
        self.bias: Tensor
        self.scale: Tensor
        buffers = {"columns": projector.columns(), "bias": projector.bias, "scale": projector.log_scale.exp()}
        for name, value in buffers.items():
            self.register_buffer(name, value.detach().clone())
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Maps (B,C,H,W) in training space to float32 logits (B, classes)."""
        if self.transform.mean.device != images.device:
            self.transform = self.transform.to(images.device)
        return cosine_logits(self.encoder(self.transform.inverse(images)), self.columns, self.scale, self.bias)


def cosine_logits(features: Tensor, columns: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Returns ``scale * features / |features| @ columns + bias``, float32 (B, classes), for features (B, D)."""
    with torch.autocast(features.device.type, enabled=False):
        return scale * (F.normalize(features.float(), dim=1) @ columns) + bias


def require_standardise(transform: Transform, setting: str) -> Standardise:
    """Returns the transform after checking that its inverse maps each pixel separately.

    Raises:
        CondenseError: It whitens. The message begins with ``setting``.
    """
    if not isinstance(transform, Standardise):
        raise CondenseError(f"{setting}: needs pixels, which zca=true mixes; leave zca out")
    return transform
