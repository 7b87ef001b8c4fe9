"""Distances between the BatchNorm moments of a batch and a teacher's statistics, as one autograd node per layer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from condense.methods.curriculum_synthesis.settings import RecoveryOptions
from condense.networks import Network

Moments = tuple[Tensor, Tensor]
"""Means and biased variances of channels, a row for each group or class."""


class _MatchedNormFunction(torch.autograd.Function):
    """BatchNorm with running statistics, and the distances of each group's moments to ``mean`` and ``variance`` ((C,)
    or one row per group), as one autograd node.

    The teacher is frozen, so the gradients of the distances are known in the forward pass, and backward is one pass
    over the map: dy * scale, plus the contributions of mean and variance.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, variance: Tensor, groups: int, weights: Any
    ) -> tuple[Tensor, Tensor]:
        dtype, count = torch.promote_types(x.dtype, torch.float32), len(x) // groups
        flat = x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)
        # Moments from sums: torch.var_mean is ten times slower on a CPU. The cancellation costs (mean / std)^2 of 10^7,
        # and the mean of a convolution's outputs is of the size of their std.
        values, size = flat.to(dtype), count * flat.shape[2]
        squares = torch.linalg.vector_norm(values, dim=2).square().view(groups, count, -1).sum(1) / size
        group_mean = values.sum(2).view(groups, count, -1).sum(1) / size
        group_variance = squares - group_mean.square()
        gaps = group_mean - mean.to(dtype), group_variance - variance.to(dtype)
        lengths = [gap.norm(dim=1) for gap in gaps]
        # The gradient of a length is a unit vector; 0 for a gap of length 0.
        mean_grad, variance_grad = (
            weight / size * gap / length.clamp(min=torch.finfo(dtype).tiny)[:, None]
            for weight, gap, length in zip(weights, gaps, lengths)
        )
        ctx.save_for_backward(x, scale, group_mean, mean_grad, 2 * variance_grad)
        shape = (1, x.shape[1], *[1] * (x.dim() - 2))
        y = (x * scale.to(x.dtype).view(shape)).add_(shift.to(x.dtype).view(shape))
        return y, weights[0] * lengths[0] + weights[1] * lengths[1]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, y_grad: Tensor, distance_grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, group_mean, mean_grad, variance_grad = ctx.saved_tensors
        factor = distance_grad[:, None] * variance_grad
        offset = distance_grad[:, None] * mean_grad - factor * group_mean
        shape = (len(x), x.shape[1], *[1] * (x.dim() - 2))
        count = len(x) // len(group_mean)
        factor, offset = (part.repeat_interleave(count, 0).view(shape).to(x.dtype) for part in (factor, offset))
        x_grad = (y_grad * scale.to(x.dtype).view(1, *shape[1:])).add_(offset).add_(x * factor)
        return (x_grad, *[None] * 6)


class MatchedNorm(nn.Module):
    """A BatchNorm of a frozen teacher in eval mode that records ``distances`` (groups,) of the moments of its input.

    The distance of a group is ``importance * (weights[0] * |mean - running mean| + weights[1] * |variance - running
    variance|)`` with Euclidean norms over channels and biased variances; moments are taken over the images and pixels
    of the group. ``targets``, two tensors (groups, C), replace the running statistics in the distance, not in the
    output.
    """

    def __init__(
        self, norm: nn.modules.batchnorm._BatchNorm, weights: tuple[float, float], importance: float = 1.0
    ) -> None:
        super().__init__()
        assert norm.running_mean is not None and norm.running_var is not None
        ones = torch.ones_like(norm.running_mean)
        self.weight = nn.Parameter(ones.clone() if norm.weight is None else norm.weight.detach(), requires_grad=False)
        self.bias = nn.Parameter(ones - ones if norm.bias is None else norm.bias.detach(), requires_grad=False)
        self.running_mean: Tensor
        self.running_var: Tensor
        self.register_buffer("running_mean", norm.running_mean)
        self.register_buffer("running_var", norm.running_var)
        self.weights, self.importance = (importance * weights[0], importance * weights[1]), importance
        self.eps, self.groups = norm.eps, 1
        self.targets: Moments | None = None
        self.distances: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, ...) to the same shape and dtype; image i belongs to group i // (N / groups)."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - scale * self.running_mean
        mean, variance = self.targets or (self.running_mean, self.running_var)
        y, self.distances = _MatchedNormFunction.apply(x, scale, shift, mean, variance, self.groups, self.weights)
        return y


class Matcher(nn.Module):
    """A frozen copy of a teacher that returns logits and the distances of its inputs to its BatchNorm statistics.

    Args:
        net: the teacher; it is not changed.
        first: weight of the first BatchNorm, in the order of the network's modules; all others have weight 1.
        weights: of means and of variances.
        averaged: distances are weighted means over BatchNorms, not sums.
    """

    def __init__(
        self, net: Network, first: float = 10.0, weights: tuple[float, float] = (1.0, 1.0), averaged: bool = False
    ) -> None:
        super().__init__()
        self.averaged = averaged
        self.net: Network = copy.deepcopy(net).eval().requires_grad_(False)
        norms = [(n, m) for n, m in self.net.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self.norms: list[MatchedNorm] = []
        for number, (name, norm) in enumerate(norms):
            self.norms.append(MatchedNorm(norm, weights, 1.0 if number else first))
            self.net.set_submodule(name, self.norms[-1])

    def forward(
        self, views: Tensor, groups: int, fast: Callable[[], Any], targets: Sequence[Moments] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits float32 (N, classes) of views (N, C, H, W) of ``groups`` equal groups, and distances (groups,).

        ``fast`` makes the autocast context. ``targets`` are moments for each BatchNorm and group, in place of the
        running statistics. A BatchNorm that the network does not call contributes nothing.
        """
        for number, norm in enumerate(self.norms):
            norm.groups, norm.distances = groups, None
            norm.targets = None if targets is None else targets[number]
        with fast():
            embedding = self.net.embed(views)
        logits = self.net.classify(embedding.to(torch.promote_types(embedding.dtype, torch.float32)))
        used = [(norm.importance, norm.distances) for norm in self.norms if norm.distances is not None]
        total = torch.stack([distances for _, distances in used]).sum(0)
        return logits, total / sum(importance for importance, _ in used) if self.averaged else total


def make_matcher(config: RecoveryOptions, net: Network) -> Matcher:
    """A teacher with the weights of the method's settings."""
    return Matcher(net, config.bn_first, (1.0, config.bn_variance), config.bn_mean)
