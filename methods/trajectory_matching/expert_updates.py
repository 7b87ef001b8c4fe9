"""Updates of the experts' training: GSAM for FTD, a gradient penalty for AST.

The text of these classes with their fields is part of the cache keys of experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from condense.training import TrainingStep

NORM_EPS = 1e-12
"""Added to norms in a denominator."""


def dot(a: Sequence[Tensor], b: Sequence[Tensor], stacked: bool) -> Tensor:
    """Inner product over all tensors; where ``stacked``, one for each index of the first axis."""
    products = [x * y for x, y in zip(a, b, strict=True)]
    return torch.stack([product.flatten(1).sum(1) if stacked else product.sum() for product in products]).sum(0)


def _align(scalar: Tensor, tensor: Tensor) -> Tensor:
    """A scalar, or one for each index of the first axis of ``tensor``, shaped to multiply it."""
    return scalar.reshape(*scalar.shape, *[1] * (tensor.dim() - scalar.dim()))


@dataclass(frozen=True)
class GSAM:
    """FTD's update: the gradient at the worst point nearby, minus ``coefficient`` times the plain gradient's part
    orthogonal to it.

    With g the gradient, e = rho * w^2 g / || |w| g || (adaptive) or rho * g / |g|, and s the gradient at w + e on the
    same batch: s - coefficient * (g - c |g| / |s| s), c their cosine. Zhuang et al., ICLR 2022, as FTD's program has
    it. Needs float32: e is far below bfloat16's rounding of the weights.
    """

    rho: float
    coefficient: float
    adaptive: bool = True

    def __call__(self, work: TrainingStep) -> list[Tensor]:
        plain = torch.autograd.grad(work.loss(), work.weights, materialize_grads=True)
        before = [weight.detach().clone() for weight in work.weights]
        scales = [weight.abs() if self.adaptive else torch.ones_like(weight) for weight in before]
        scaled = [scale * gradient for scale, gradient in zip(scales, plain)]
        factor = self.rho / (dot(scaled, scaled, work.stacked).sqrt() + NORM_EPS)
        with torch.no_grad():
            for weight, scale, direction in zip(work.weights, scales, scaled):
                weight.add_(_align(factor, weight) * scale * direction)
        sharp = torch.autograd.grad(work.loss(), work.weights, materialize_grads=True)
        with torch.no_grad():
            for weight, value in zip(work.weights, before):
                weight.copy_(value)
        lengths = [dot(g, g, work.stacked).sqrt() for g in (plain, sharp)]
        cosine = dot(plain, sharp, work.stacked) / (lengths[0] * lengths[1] + NORM_EPS)
        along = cosine * lengths[0] / (lengths[1] + NORM_EPS)
        return [s - self.coefficient * (g - _align(along, s) * s) for g, s in zip(plain, sharp)]


@dataclass(frozen=True)
class Smooth:
    """AST's update: a loss with a warm-up factor, plus ``penalty`` times a gradient penalty on the inputs.

    The factor on the loss grows from 0.5 by 0.05 per epoch (``warm``). The penalty is the mean of (norm - 1)^2 over
    pixels and images, where norm is that of the gradient of the sum of all logits, over the channels of a pixel of the
    batch without augmentation.
    """

    penalty: float
    warm: bool

    def __call__(self, work: TrainingStep) -> Sequence[Tensor]:
        factor = min(1.0, 0.5 + 0.05 * work.epoch) if self.warm else 1.0
        loss = factor * work.loss()
        if self.penalty:
            clean = work.clean.detach().requires_grad_()
            (slope,) = torch.autograd.grad(work.forward(clean).sum(), clean, create_graph=True)
            lengths = (slope.square().sum(-3) + NORM_EPS).sqrt()
            shares = (lengths - 1).square()
            loss = loss + self.penalty * (shares.flatten(1).mean(1).sum() if work.stacked else shares.mean())
        return torch.autograd.grad(loss, work.weights, materialize_grads=True)
