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


class _Matched(torch.autograd.Function):
    """A BatchNorm by its running statistics, and how far each group's moments lie from ``mean`` and ``variance``, (C,)
    or a row for each group, in one node.

    With a frozen teacher both slopes are known beforehand, so backward is one pass over the map: dy * scale, plus what
    moves mean and variance.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, variance: Tensor, groups: int, shares: Any
    ) -> tuple[Tensor, Tensor]:
        wide, count = torch.promote_types(x.dtype, torch.float32), len(x) // groups
        flat = x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)
        # From sums, as torch's own var_mean is ten times as slow on a CPU: what cancels is (mean / deviation)^2 in
        # 10^7, and a conv's outputs have means of the size of their deviation.
        values, size = flat.to(wide), count * flat.shape[2]
        squares = torch.linalg.vector_norm(values, dim=2).square().view(groups, count, -1).sum(1) / size
        m = values.sum(2).view(groups, count, -1).sum(1) / size
        s = squares - m.square()
        gaps = m - mean.to(wide), s - variance.to(wide)
        lengths = [gap.norm(dim=1) for gap in gaps]
        # The slope of a length is a unit vector; 0 where there is no gap.
        along_mean, along_variance = (
            share / size * gap / length.clamp(min=torch.finfo(wide).tiny)[:, None]
            for share, gap, length in zip(shares, gaps, lengths)
        )
        ctx.save_for_backward(x, scale, m, along_mean, 2 * along_variance)
        shaped = (1, x.shape[1], *[1] * (x.dim() - 2))
        y = (x * scale.to(x.dtype).view(shaped)).add_(shift.to(x.dtype).view(shaped))
        return y, shares[0] * lengths[0] + shares[1] * lengths[1]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor, weight: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, m, along_mean, along_variance = ctx.saved_tensors
        factor = weight[:, None] * along_variance
        offset = weight[:, None] * along_mean - factor * m
        shaped = (len(x), x.shape[1], *[1] * (x.dim() - 2))
        each = len(x) // len(m)
        factor, offset = (part.repeat_interleave(each, 0).view(shaped).to(x.dtype) for part in (factor, offset))
        moved = (slope * scale.to(x.dtype).view(1, *shaped[1:])).add_(offset).add_(x * factor)
        return (moved, *[None] * 6)


class MatchedNorm(nn.Module):
    """A BatchNorm of a frozen teacher in eval mode that notes ``distances`` (groups,) of the moments that it sees.

    The distance of a group is ``importance * (shares[0] * |mean - running mean| + shares[1] * |variance - running
    variance|)``, plain Euclidean lengths over channels, variance biased; moments are taken over the images and pixels
    of the group. ``targets``, two tensors (groups, C), stand in for the running ones there, not in what comes out.
    """

    def __init__(
        self, norm: nn.modules.batchnorm._BatchNorm, shares: tuple[float, float], importance: float = 1.0
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
        self.shares, self.importance = (importance * shares[0], importance * shares[1]), importance
        self.eps, self.groups = norm.eps, 1
        self.targets: Moments | None = None
        self.distances: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, ...) to the same shape and dtype; image i is of group i // (N / groups)."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - scale * self.running_mean
        mean, variance = self.targets or (self.running_mean, self.running_var)
        y, self.distances = _Matched.apply(x, scale, shift, mean, variance, self.groups, self.shares)
        return y


class Matcher(nn.Module):
    """A frozen copy of a teacher that answers, and says how far its maps lie from its BatchNorm statistics.

    Args:
        net: the teacher; it is not changed.
        first: weight of the first BatchNorm, in the order of the network's modules; all others weigh 1.
        shares: weights of means and of variances.
        averaged: distances are means over BatchNorms by their weights, not sums.
    """

    def __init__(
        self, net: Network, first: float = 10.0, shares: tuple[float, float] = (1.0, 1.0), averaged: bool = False
    ) -> None:
        super().__init__()
        self.averaged = averaged
        self.net: Network = copy.deepcopy(net).eval().requires_grad_(False)
        found = [(n, m) for n, m in self.net.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self.norms: list[MatchedNorm] = []
        for number, (name, norm) in enumerate(found):
            self.norms.append(MatchedNorm(norm, shares, 1.0 if number else first))
            self.net.set_submodule(name, self.norms[-1])

    def forward(
        self, views: Tensor, groups: int, fast: Callable[[], Any], targets: Sequence[Moments] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits float32 (N, classes) of views (N,C,H,W) of ``groups`` equal groups, and distances (groups,).

        ``fast``: makes the context for matrix work. ``targets``: what moments shall be, for each norm and group; the
        running statistics where None. A norm that is not used counts nothing.
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
