"""Group norm with a second derivative in closed form."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable

from condense.device import prefers_second_derivatives


class GroupNorm(nn.GroupNorm):
    """Group norm for all methods.

    Under autocast on CUDA it keeps bf16, where torch's returns float32, as on CPUs: the maps after it then take half
    the memory. Sums are accumulated in float32 in both.

    Where :func:`condense.device.second_derivatives` asks for it, the gradient of a gradient is computed in closed form:
    torch's own is a graph of about a hundred operations, each with a map of its own. Values and gradients are those
    of torch's kernels.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.bfloat16 and torch.is_autocast_enabled("cuda"):
            with torch.autocast("cuda", enabled=False):
                return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)
        if prefers_second_derivatives() and torch.is_grad_enabled() and x.dtype == self.weight.dtype:
            normalised, _, _ = _Normalise.apply(x, self.weight, self.bias, self.num_groups, self.eps)
            return normalised
        return super().forward(x)


class _Normalise(Function):
    """Group norm: maps (N, C, ...), scales (C,), shifts (C,) to the normalised maps, means and 1/std (N, groups)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        n, channels, *size = x.shape
        return torch.native_group_norm(x, weight, bias, n, channels, math.prod(size), groups, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, weight, _, ctx.groups, _ = inputs
        _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, mean, rstd)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if gradient is None:
            return (None,) * 5
        x, weight, mean, rstd = ctx.saved_tensors
        return *_Gradients.apply(gradient, x, weight, mean, rstd, ctx.groups), None, None


class _Gradients(Function):
    """Gradients of group norm for its maps, scales and shifts, which can be differentiated once.

    Its own derivative regards ``mean`` and ``rstd`` as functions of ``x``.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        gradient: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, groups: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        n, channels, *size = x.shape
        return torch.ops.aten.native_group_norm_backward(
            gradient.contiguous(), x.contiguous(), mean, rstd, weight, n, channels, math.prod(size), groups, [True] * 3
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        *tensors, ctx.groups = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_x: Tensor, to_weight: Tensor, to_bias: Tensor) -> tuple[Tensor | None, ...]:
        gradient, x, weight, mean, rstd = ctx.saved_tensors
        derivatives = second_derivative(gradient, x, weight, mean, rstd, ctx.groups, to_x, to_weight, to_bias)
        return *derivatives, None, None, None


def second_derivative(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    to_x: Tensor,
    to_weight: Tensor,
    to_bias: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of <to_x, dx> + <to_weight, dweight> + <to_bias, dbias>, where d* are group norm's gradients.

    With z = (x - mean) * rstd, a = weight * gradient, v = to_x and E the mean over a group, dx is
    rstd * (a - E[a] - z E[a z]). All results are sums of v, gradient and x with one factor for each map, so that the
    maps are read twice: for their sums and products, and for the results.

    Args:
        gradient: of group norm's output, (N, C, ...).
        x: its input, (N, C, ...).
        weight: (C,).
        mean, rstd: of the groups, (N, groups).
        groups: their number; divides C.
        to_x: (N, C, ...).
        to_weight, to_bias: (C,).

    Returns:
        The gradients for ``gradient``, ``x`` and ``weight``.
    """
    n, channels = x.shape[:2]
    each = n, groups, channels // groups  # values of maps; those of groups are (n, groups, 1)
    rows_x, rows_gradient, rows_v = (t.reshape(n * channels, -1) for t in (x, gradient, to_x))
    ones = x.new_ones(rows_x.shape[1])
    weight, to_weight, to_bias = (t.view(each[1:]) for t in (weight, to_weight, to_bias))
    mean, rstd = mean.view(n, groups, 1), rstd.view(n, groups, 1)
    group_size = each[2] * len(ones)

    def dot(left: Tensor, right: Tensor) -> Tensor:
        return torch.bmm(left.unsqueeze(1), right.unsqueeze(2)).view(each)

    v, v_x = (rows_v @ ones).view(each), dot(rows_v, rows_x)
    sums = torch.stack([(rows_gradient @ ones).view(each), dot(rows_gradient, rows_x), dot(rows_gradient, rows_v)])
    means = torch.cat([torch.stack([v, v_x]), weight * sums]).sum(3, keepdim=True) / group_size
    mean_v, mean_vx, mean_a, mean_ax, mean_va = means.unbind()
    mean_vz = rstd * torch.addcmul(mean_vx, mean, mean_v, value=-1)
    mean_az = rstd * torch.addcmul(mean_ax, mean, mean_a, value=-1)

    # for `gradient`: weight * rstd * (v - E[v] - z E[v z]) + to_weight * z + to_bias
    of_v = weight * rstd
    of_z = torch.addcmul(to_weight, of_v, mean_vz, value=-1)
    of_x = rstd * of_z
    constant = torch.addcmul(torch.addcmul(to_bias, of_v, mean_v, value=-1), mean, of_x, value=-1)
    for_gradient = _combine(constant, (of_v, rows_v), (of_x, rows_x))

    # for `x`: w = -rstd * (v E[a z] + a E[v z]) + to_weight * gradient is the derivative for z, and rstd has one too
    w_v = -rstd * mean_az
    mean_gradient, mean_gradient_x = ((of_z * sums[:2]).sum(3, keepdim=True) / group_size).unbind()
    mean_w = torch.addcmul(mean_gradient, w_v, mean_v)
    mean_wz = w_v * mean_vz + rstd * torch.addcmul(mean_gradient_x, mean, mean_gradient, value=-1)
    projected = mean_va - mean_v * mean_a - mean_vz * mean_az
    x_x = -rstd.square() * torch.addcmul(mean_wz, rstd, projected)
    constant = -torch.addcmul(rstd * mean_w, mean, x_x)
    for_x = _combine(constant, (rstd * w_v, rows_v), (x_x, rows_x), (of_x, rows_gradient))

    centred_x = torch.addcmul(sums[1], mean, sums[0], value=-1)
    products = sums[2] - mean_v * sums[0] - (mean_vz * rstd) * centred_x
    return for_gradient.view(x.shape), for_x.view(x.shape), (rstd * products).sum(0).view(channels)


def _combine(constant: Tensor, *terms: tuple[Tensor, Tensor]) -> Tensor:
    """The constant plus the sum of factors times rows, with a value of the first two for each row or each group."""
    rows = terms[0][1]
    total = constant
    for factor, values in terms:
        total = torch.addcmul(_column(total, rows), values, _column(factor, rows))
    return total


def _column(values: Tensor, rows: Tensor) -> Tensor:
    """Values (N, groups, 1 or maps) as (rows, 1); sums of rows as they are."""
    if values.shape == rows.shape:
        return values
    n, groups, _ = values.shape
    return values.expand(n, groups, len(rows) // (n * groups)).reshape(len(rows), 1)
