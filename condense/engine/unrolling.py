"""Differentiable inner loops: how the weights after N training steps move with what they were trained on.

One loss, the distance of those weights from given ones, and three ways to its gradient:

* ``adjoint``: exact, by a recursion that goes back from the last step and recomputes each step. Peak memory is that of
  one inner step with its double backward, and N * P floats for the weights on the way.
* ``graph``: exact, by autograd through all steps, which are all held in memory. The only way through optimisers other
  than SGD, where ``higher`` makes the steps; this is the one room that touches it.
* ``tesla``: the recursion without its Hessians, as published by TESLA; biased, and a little cheaper.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from condense.cuda_graphs import GraphedFunction
from condense.errors import CondenseError, did_you_mean

GRAD_MODES = ("adjoint", "graph", "tesla")

StepLoss: TypeAlias = Callable[[Tensor, int], Tensor]
"""``step_loss(theta, i)``: weights (P,) and the number of a step to the scalar that the step descends."""


class NetworkLoss:
    """A loss of weights and a batch, whose derivatives are CUDA graphs where that is possible.

    Args:
        function: weights (P,) and the tensors of a batch to a scalar. It draws no random numbers.
        state: tensors that it changes in place, e.g. running statistics.
    """

    def __init__(self, function: Callable[..., Tensor], state: Sequence[Tensor] = ()) -> None:
        self.function = function
        self.gradient = GraphedFunction(self._gradient, state)
        self.adjoint = GraphedFunction(self._adjoint, state)
        self.adjoint_without_hessian = GraphedFunction(functools.partial(self._adjoint, hessian=False), state)

    def _gradient(self, theta: Tensor, *batch: Tensor) -> tuple[Tensor, ...]:
        theta = theta.detach().requires_grad_()
        return torch.autograd.grad(self.function(theta, *(x.detach() for x in batch)), theta)

    def _adjoint(self, theta: Tensor, kappa: Tensor, *batch: Tensor, hessian: bool = True) -> tuple[Tensor, ...]:
        """The gradient at ``theta``; the derivatives of <kappa, it> for the tensors of the batch that require grad and,
        if ``hessian``, for ``theta``."""
        theta = theta.detach().requires_grad_()
        own = [x.detach().requires_grad_(x.requires_grad) for x in batch]
        (gradient,) = torch.autograd.grad(self.function(theta, *own), theta, create_graph=True)
        inputs = [x for x in own if x.requires_grad] + [theta] * hessian
        if not inputs:
            return (gradient.detach(),)
        return (gradient.detach(), *torch.autograd.grad(gradient, inputs, kappa, materialize_grads=True))


class BatchLoss:
    """A :data:`StepLoss` in two parts: the batch of a step, and a loss of it.

    Args:
        batch: the number of a step to its tensors, which may depend on the leaves.
        loss: is given the weights and these tensors.
    """

    def __init__(self, batch: Callable[[int], tuple[Tensor, ...]], loss: NetworkLoss) -> None:
        self.batch, self.loss = batch, loss

    def __call__(self, theta: Tensor, i: int) -> Tensor:
        return self.loss.function(theta, *self.batch(i))


_Advance: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Weights and their loss to the weights after a step, with a graph."""


class Target(NamedTuple):
    """What the weights on the way are compared with."""

    step: int
    """Number of steps, 1 to ``steps``, after which they are."""
    goal: Tensor
    """(P,), a constant."""
    weight: float = 1.0
    """Factor of this term in the loss."""


class UnrollResult(NamedTuple):
    """What :func:`unroll` gives; nothing in it has a graph."""

    loss: Tensor
    """Scalar, the sum over targets of weight * |theta_step - goal|^2 / |start - goal|^2."""
    gradients: dict[str, Tensor] | None
    """Of the loss: one for each leaf, in its shape, and that of the rate, 0-dim, as ``step_size``; None where the gate
    closed."""
    end: Tensor
    """(P,), the weights after the last step."""
    is_open: Tensor | bool = True
    """Whether the gate let the loss pass, a scalar on the device."""


def unroll(
    step_loss: StepLoss,
    start: Tensor,
    leaves: Mapping[str, Tensor],
    rate: Tensor | float,
    steps: int,
    targets: Sequence[Target],
    *,
    grad_mode: str = "adjoint",
    momentum: float = 0.0,
    factor: float = 1.0,
    gate: float | None = None,
    optimizer: str = "sgd",
    optimizer_options: Mapping[str, Any] | None = None,
) -> UnrollResult:
    """Trains ``start`` for ``steps`` steps and differentiates its distance from the targets.

    A step is b <- momentum * b + gradient of step_loss; theta <- theta - rate * b, beginning with b = 0.

    Args:
        step_loss: the mean loss of a step's batch. It is called with the same i twice (``graph``: once), and must then
            see the same batch, augmentation and dropout. It must use the tensors in ``leaves`` themselves, or gradients
            would not reach them; which of them take part may differ from step to step.
        start: (P,), a constant.
        leaves: what to differentiate for, by name: tensors that require grad. They need not be autograd's leaves: the
            way from where they came from is not walked.
        rate: learning rate, 0-dim, which need not require grad.
        steps: N, at least 1.
        targets: at least one, in any order.
        grad_mode: one of ``GRAD_MODES``; see the module.
        factor: on the leaves' gradients of ``tesla`` alone (its release loses a factor of 2, which is 0.5 here); the
            rate's has none.
        gate: where the loss is above it or not finite, ``is_open`` is False. A CPU then does not go the way back; a
            GPU does, so that the host need not wait for the loss.
        optimizer: ``sgd``, or, with ``grad_mode="graph"``, the lower-case name of any that ``higher`` knows.
        optimizer_options: for the constructor of the latter in ``torch.optim``.

    Raises:
        CondenseError: grad_mode, optimizer or its options are unknown or do not go together.
        ValueError: steps, targets or the leaves' names make no sense.
    """
    kind = check_unroll_options(grad_mode, optimizer, momentum)
    if steps < 1 or not targets or not all(1 <= target.step <= steps for target in targets):
        raise ValueError(f"targets after steps {[target.step for target in targets]} of {steps}: needs some in 1..N")
    if "step_size" in leaves:
        raise ValueError("no leaf can be called step_size: that is the rate's gradient")
    options = dict(optimizer_options or {})
    for option in ("lr", "maximize", "decoupled_weight_decay"):  # higher would take these and do nothing with them
        if option in options:
            raise CondenseError(f"inner_optimizer={optimizer}: its option {option} cannot be set here; leave it out")
    if kind is None and options:
        raise CondenseError(f"optimizer options {', '.join(options)}: inner_optimizer=sgd takes none but momentum")

    start = start.detach()
    targets = [target._replace(goal=target.goal.detach().to(start)) for target in targets]
    own = rate.detach().to(start) if isinstance(rate, Tensor) else start.new_full((), rate)
    if grad_mode == "graph":
        first, own = start.detach().requires_grad_(), own.requires_grad_()
        advance = _sgd(own, momentum) if kind is None else _by_higher(kind, options, first, own)
        outcome = _by_graph(step_loss, first, leaves, own, steps, targets, advance, gate)
    else:
        exact, factor = (True, 1.0) if grad_mode == "adjoint" else (False, factor)
        outcome = _by_recursion(step_loss, start, leaves, own, steps, targets, momentum, exact, factor, gate)
    if outcome.gradients is not None and isinstance(rate, Tensor):
        outcome.gradients["step_size"] = outcome.gradients["step_size"].to(rate)  # an optimiser of it wants its dtype
    return outcome


# -- the loss ---------------------------------------------------------------------------------------------------------


def _miss(theta: Tensor, start: Tensor, target: Target) -> Tensor:
    """A target's term of the loss."""
    return target.weight * (theta - target.goal).square().sum() / (start - target.goal).square().sum()


def _slope(theta: Tensor, start: Tensor, target: Target) -> Tensor:
    """Its gradient in ``theta``."""
    return (theta - target.goal) * (2 * target.weight / (start - target.goal).square().sum())


def _is_open(loss: Tensor, gate: float | None) -> Tensor | bool:
    return gate is None or loss.isfinite() & (loss <= gate)


def _ends(is_open: Tensor | bool) -> bool:
    """Whether the way back is not gone: where the gate is closed and nobody waits to know it."""
    return isinstance(is_open, Tensor) and is_open.device.type == "cpu" and not bool(is_open)


# -- back step by step ------------------------------------------------------------------------------------------------


def _by_recursion(
    step_loss: StepLoss,
    start: Tensor,
    leaves: Mapping[str, Tensor],
    rate: Tensor,
    steps: int,
    targets: Sequence[Target],
    momentum: float,
    exact: bool,
    factor: float,
    gate: float | None,
) -> UnrollResult:
    """Forward without a graph, then lambda_i = dLoss / dtheta_i and nu_i = -dLoss / db_i / rate from the end.

    nu_i = lambda_{i+1} + momentum * nu_{i+1}; lambda_i = lambda_{i+1} - rate * (Hessian of step i) nu_i + the slope of
    the targets at i; a leaf gets -rate * (d gradient_i / d leaf) nu_i and the rate -<nu_i, gradient_i>. Without
    ``exact``, the Hessians are left out.
    """
    thetas, buffer = [start], torch.zeros_like(start)
    for i in range(steps):
        gradient = _gradient(step_loss, thetas[-1], i)
        buffer = momentum * buffer + gradient if momentum else gradient
        thetas.append(thetas[-1] - rate * buffer)
    end = thetas[-1]
    loss = torch.stack([_miss(thetas[target.step], start, target) for target in targets]).sum()
    is_open = _is_open(loss, gate)
    if _ends(is_open):
        return UnrollResult(loss, None, end, is_open)

    sums = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}  # the only ones, however many steps
    rate_sum = torch.zeros_like(rate)
    lambda_, nu = torch.zeros_like(start), torch.zeros_like(start)
    for i in reversed(range(steps)):
        theta = thetas.pop()  # after step i
        for target in targets:
            if target.step == i + 1:
                lambda_ = lambda_ + _slope(theta, start, target)
        nu = lambda_ + momentum * nu if momentum else lambda_
        hessian = exact and i > 0  # nobody asks for dLoss / dstart
        gradient, slopes = _step_back(step_loss, thetas[-1], i, leaves, -rate * nu, hessian)
        rate_sum -= torch.dot(nu, gradient)
        if hessian and (slope := slopes.pop()) is not None:
            lambda_ = lambda_ + slope
        for total, slope in zip(sums.values(), slopes, strict=True):
            if slope is not None:  # a leaf may sit a step out
                total += slope
    if factor != 1:
        for total in sums.values():
            total *= factor
    return UnrollResult(loss, {**sums, "step_size": rate_sum}, end, is_open)


def _gradient(step_loss: StepLoss, theta: Tensor, i: int) -> Tensor:
    """Step i's gradient at ``theta``."""
    if isinstance(step_loss, BatchLoss):
        with torch.no_grad():
            batch = step_loss.batch(i)
        return step_loss.loss.gradient(theta, *batch)[0]
    theta = theta.detach().requires_grad_()
    return torch.autograd.grad(step_loss(theta, i), theta)[0]


def _step_back(
    step_loss: StepLoss, theta: Tensor, i: int, leaves: Mapping[str, Tensor], kappa: Tensor, hessian: bool
) -> tuple[Tensor, list[Tensor | None]]:
    """Step i's gradient at ``theta``, and the slopes of <kappa, it> for each leaf and, with ``hessian``, for theta.

    A function of its own, so that its graph is gone before the next one is made.
    """
    if isinstance(step_loss, BatchLoss):
        batch = step_loss.batch(i)
        adjoint = step_loss.loss.adjoint if hessian else step_loss.loss.adjoint_without_hessian
        gradient, *slopes = adjoint(theta, kappa, *batch)
        depends = [x for x in batch if x.requires_grad]
        of_leaves: Sequence[Tensor | None] = [None] * len(leaves)
        if depends:
            of_leaves = torch.autograd.grad(depends, list(leaves.values()), slopes[: len(depends)], allow_unused=True)
        return gradient, [*of_leaves, *slopes[len(depends) :]]
    theta = theta.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(step_loss(theta, i), theta, create_graph=True)
    inputs = [*leaves.values(), theta] if hessian else list(leaves.values())
    return gradient.detach(), list(torch.autograd.grad(gradient, inputs, kappa, allow_unused=True))


# -- through one graph ------------------------------------------------------------------------------------------------


def _by_graph(
    step_loss: StepLoss,
    start: Tensor,
    leaves: Mapping[str, Tensor],
    rate: Tensor,
    steps: int,
    targets: Sequence[Target],
    advance: _Advance,
    gate: float | None,
) -> UnrollResult:
    """All steps in one graph; ``start`` and ``rate`` require grad."""
    theta, fixed, misses = start, start.detach(), []
    for i in range(steps):
        theta = advance(theta, step_loss(theta, i))
        misses += [_miss(theta, fixed, target) for target in targets if target.step == i + 1]
    loss = torch.stack(misses).sum()
    is_open = _is_open(loss.detach(), gate)
    if _ends(is_open):
        return UnrollResult(loss.detach(), None, theta.detach(), is_open)
    inputs = {**leaves, "step_size": rate}
    slopes = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True)
    gradients = {
        name: torch.zeros_like(leaf) if slope is None else slope for (name, leaf), slope in zip(inputs.items(), slopes)
    }
    return UnrollResult(loss.detach(), gradients, theta.detach(), is_open)


def _sgd(rate: Tensor, momentum: float) -> _Advance:
    buffer: Tensor | None = None

    def advance(theta: Tensor, loss: Tensor) -> Tensor:
        nonlocal buffer
        (gradient,) = torch.autograd.grad(loss, theta, create_graph=True)
        buffer = gradient if buffer is None or not momentum else momentum * buffer + gradient
        return theta - rate * buffer

    return advance


def check_unroll_options(
    grad_mode: str, optimizer: str = "sgd", momentum: float = 0.0
) -> type[torch.optim.Optimizer] | None:
    """Refuses what :func:`unroll` cannot do.

    Returns:
        The class of ``torch.optim`` called ``optimizer`` in lower case, whose steps ``higher`` makes; None for SGD. Its
        Adam adds eps before the bias correction, as torch once did; its Rprop has no slope but in the rate; its ASGD
        takes the rate's own decay for a constant, and waits for the host.

    Raises:
        CondenseError: grad_mode or optimizer are unknown or do not go together.
    """
    if grad_mode not in GRAD_MODES:
        raise CondenseError(f"grad_mode={grad_mode}: unknown{did_you_mean(grad_mode, GRAD_MODES)}")
    if optimizer == "sgd":
        return None
    import higher

    name = optimizer

    supported = {kind.__name__.lower(): kind for kind in higher.optim._opt_mapping}
    if name not in supported:
        raise CondenseError(f"inner_optimizer={name}: unknown{did_you_mean(name, supported)}")
    if grad_mode != "graph":
        raise CondenseError(
            f"inner_optimizer={name}: only grad_mode=graph goes through it, not grad_mode={grad_mode}; "
            "use that, or inner_optimizer=sgd"
        )
    if momentum:
        raise CondenseError(f"inner_optimizer={name}: inner_momentum={momentum:g} is of sgd only; set it to 0")
    return supported[name]


def _by_higher(kind: type[torch.optim.Optimizer], options: Mapping[str, Any], theta: Tensor, rate: Tensor) -> _Advance:
    import higher

    try:
        plain = kind([theta], **options)
    except (TypeError, ValueError) as fault:
        raise CondenseError(f"inner_optimizer={kind.__name__.lower()}: {fault}") from fault
    differentiable = higher.get_diff_optim(plain, [theta], override={"lr": [rate]})

    def advance(theta: Tensor, loss: Tensor) -> Tensor:
        (theta,) = differentiable.step(loss, params=[theta])
        return theta

    return advance
