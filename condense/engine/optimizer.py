"""The synthetic-set optimizer that every method shares.

Torch's optimisers step whole tensors; distillation also steps the images of one class with their own momentum, masks
updates, gates them, clamps pixels and averages iterates. So the two update rules are written here, on rows of the first
axis, and tested to equal ``torch.optim.SGD`` and ``torch.optim.Adam``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from condense.errors import CondenseError

Schedule = Callable[[float], float]
"""Maps the fraction of the run that is done, 0 to 1, to a factor on the learning rate."""


@dataclass(frozen=True)
class ParamGroup:
    """How one named tensor of the synthetic set (``images``, ``labels``, ``step_size``, ...) is optimised."""

    lr: float
    """Learning rate."""
    momentum: float = 0.0
    """Momentum of SGD (Adam takes its decays from ``betas``)."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """Update rule."""
    betas: tuple[float, float] = (0.5, 0.9)
    """Decay of Adam's two moments (synthesis papers use 0.5, 0.9)."""
    eps: float = 1e-8
    """Added to Adam's root."""
    weight_decay: float = 0.0
    """L2 penalty added to the gradient."""
    schedule: Schedule | None = None
    """Factor on ``lr`` by the fraction of the run done; constant when None."""
    clamp: tuple[Tensor | float, Tensor | float] | None = None
    """Range (low, high), broadcast against the tensor, that values are clamped to after each update."""
    positive: bool = False
    """Steps of SGD down are bent so that values stay above 0: x * x / (x + step), which equals x - step to first
    order."""
    ema: float | None = None
    """Decay of an exponential average of the iterates, in whose place it steps at the end of the loop."""


MAX_OVERSHOOT = 1e4
"""Maximum distance of a value from the range that it is clamped to, in multiples of the range."""


class SyntheticOptimizer:
    """Steps the leaf tensors of a synthetic set, each by its :class:`Group`.

    A method calls ``minimise(loss)``; or ``accumulate(loss)`` per chunk and then ``step()``; or ``apply(gradients)``
    with gradients made by hand. ``classes`` restricts a step to the rows of those classes, whose momentum is then
    their own.

    Args:
        tensors: name to leaf tensor that requires grad; the first axis is one row per image where ``classes`` is used.
        groups: name to :class:`Group`, for every tensor that is learned.
        row_classes: int64 (N,), the class of each row.
        reduce: called on each gradient before the update (the sum over ranks).
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        groups: Mapping[str, ParamGroup],
        row_classes: Tensor,
        reduce: Callable[[Tensor], None] | None = None,
    ) -> None:
        missing = set(groups) - set(tensors)
        if missing:
            raise ValueError(f"no tensor to optimise for group(s) {sorted(missing)}; the set has {sorted(tensors)}")
        self.tensors = {name: tensors[name] for name in groups}
        self.groups = dict(groups)
        self.row_classes = row_classes
        self.reduce = reduce
        self.progress = 0.0
        self.state: dict[str, dict[str, Tensor]] = {name: self._fresh(name) for name in groups}
        self.averages = {
            name: tensors[name].detach().clone() for name, group in groups.items() if group.ema is not None
        }
        self.bounds = {
            name: [
                torch.as_tensor(bound, dtype=tensors[name].dtype, device=tensors[name].device) for bound in group.clamp
            ]
            for name, group in groups.items()
            if group.clamp is not None
        }
        self.loss = torch.zeros((), device=row_classes.device)
        """Sum of the losses since the last step, kept on the device."""
        self.finite = torch.ones((), dtype=torch.bool, device=row_classes.device)
        """Whether every loss so far was finite; read where a synchronisation is due anyway."""

    def _fresh(self, name: str) -> dict[str, Tensor]:
        tensor, group = self.tensors[name], self.groups[name]
        if group.optimizer == "sgd":
            return {"momentum": torch.zeros_like(tensor)} if group.momentum else {}
        rows = torch.zeros(tensor.shape[:1] or (1,), dtype=torch.float64, device=tensor.device)
        return {"first": torch.zeros_like(tensor), "second": torch.zeros_like(tensor), "steps": rows}

    def accumulate(self, loss: Tensor) -> None:
        """Adds the gradients of ``loss`` to those of this step; the graph of ``loss`` is freed.

        Raises:
            CondenseError: ``loss`` has no gradient, or is complex, because the network's outputs are.
        """
        if not loss.requires_grad or loss.is_complex():
            reason = "is complex" if loss.is_complex() else "has no gradient: it is computed without autograd"
            raise CondenseError(f"the network's output {reason}; take a network of real, differentiable operations")
        loss.backward()
        self.record_loss(loss)

    def minimise(self, loss: Tensor, **options: Any) -> None:
        """``accumulate(loss)`` and ``step(**options)``."""
        self.accumulate(loss)
        self.step(**options)

    def apply(self, gradients: Mapping[str, Tensor], loss: Tensor | None = None, **options: Any) -> None:
        """One step along gradients that the method computed itself; ``loss`` is only logged and checked."""
        for name, gradient in gradients.items():
            self.tensors[name].grad = gradient.detach()
        if loss is not None:
            self.record_loss(loss)
        self.step(**options)

    def record_loss(self, loss: Tensor) -> None:
        """Adds ``loss`` to what is logged and checked."""
        self.loss = self.loss + loss.detach().to(self.loss)
        self.finite = self.finite & torch.isfinite(self.loss)

    @torch.no_grad()
    def step(
        self, classes: Tensor | list[int] | None = None, mask: Tensor | None = None, gate: Tensor | bool = True
    ) -> None:
        """One update from the accumulated gradients, which are then cleared.

        Args:
            classes: only rows of these classes move, and only their momentum changes.
            mask: factor on the update of ``images``, broadcast against them.
            gate: where False (a device scalar or bool) nothing changes, as if the step had not been made.
        """
        rows = None
        if classes is not None:
            chosen = torch.as_tensor(classes, device=self.row_classes.device)
            rows = torch.isin(self.row_classes, chosen).nonzero().squeeze(1)
        if gate is False:
            gate = torch.zeros((), dtype=torch.bool, device=self.row_classes.device)
        for name, tensor in self.tensors.items():
            gradient = tensor.grad if tensor.grad is not None else torch.zeros_like(tensor)
            if self.reduce is not None:
                self.reduce(gradient)
            per_row = tensor.dim() > 0 and len(tensor) == len(self.row_classes)
            select = rows if per_row else None
            self._update(name, gradient, select, mask if name == "images" else None, gate)
            tensor.grad = None

    def _update(
        self, name: str, gradient: Tensor, rows: Tensor | None, mask: Tensor | None, gate: Tensor | bool
    ) -> None:
        tensor, group = self.tensors[name], self.groups[name]
        lr = group.lr * (group.schedule(self.progress) if group.schedule else 1.0)
        old = {"value": tensor, **self.state[name]}
        if rows is not None:
            old = {key: value[rows] for key, value in old.items()}
            gradient = gradient[rows]
            mask = mask[rows] if mask is not None and len(mask) == len(tensor) else mask
        new = (
            _sgd(old, gradient, group, lr, mask) if group.optimizer == "sgd" else _adam(old, gradient, group, lr, mask)
        )
        if group.clamp is not None:
            low, high = self.bounds[name]
            value = new["value"]
            new["value"] = value.clamp(low, high)
            # A step of many times the range ends at its ends whatever the gradient is.
            in_reach = (value - new["value"]).abs().amax() <= MAX_OVERSHOOT * (high - low).amax()
            self.finite = self.finite & (in_reach | ~gate if isinstance(gate, Tensor) else in_reach)
        for key, value in new.items():
            target = tensor if key == "value" else self.state[name][key]
            if isinstance(gate, Tensor):
                value = torch.where(gate, value, old[key])
            if rows is None:
                target.copy_(value)
            else:
                target[rows] = value
        if name in self.averages and group.ema is not None:
            average = self.averages[name]
            moved = average * group.ema + tensor * (1 - group.ema)
            average.copy_(torch.where(gate, moved, average) if isinstance(gate, Tensor) else moved)

    @torch.no_grad()
    def load_averages(self) -> None:
        """Puts the average in the place of each tensor that has one."""
        for name, average in self.averages.items():
            self.tensors[name].copy_(average)

    def pop_loss(self) -> Tensor:
        """The loss summed since the last call, on the device; clears it."""
        loss, self.loss = self.loss, torch.zeros_like(self.loss)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Tensors and optimiser state, enough to continue bit for bit."""
        return {
            "tensors": {name: tensor.detach().clone() for name, tensor in self.tensors.items()},
            "state": {name: {key: value.clone() for key, value in state.items()} for name, state in self.state.items()},
            "averages": {name: value.clone() for name, value in self.averages.items()},
        }

    @torch.no_grad()
    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` gave, in place."""
        for name, tensor in self.tensors.items():
            tensor.copy_(saved["tensors"][name])
            for key, value in self.state[name].items():
                value.copy_(saved["state"][name][key])
        for name, value in self.averages.items():
            value.copy_(saved["averages"][name])
        self.finite.fill_(True)
        self.loss.zero_()


def _sgd(
    old: dict[str, Tensor], gradient: Tensor, group: ParamGroup, lr: float, mask: Tensor | None
) -> dict[str, Tensor]:
    """v <- m v + g;  x <- x - lr * mask * v, or bent where the group is positive."""
    if group.weight_decay:
        gradient = gradient + group.weight_decay * old["value"]
    new = {}
    if group.momentum:
        gradient = new["momentum"] = old["momentum"] * group.momentum + gradient
    update = gradient if mask is None else gradient * mask
    value, step = old["value"], lr * update
    new["value"] = (
        torch.where(step > 0, value.square() / (value + step), value - step) if group.positive else value - step
    )
    return new


def _adam(
    old: dict[str, Tensor], gradient: Tensor, group: ParamGroup, lr: float, mask: Tensor | None
) -> dict[str, Tensor]:
    """Kingma & Ba's Adam; each row counts its own steps, so rows may be stepped at different times."""
    if group.weight_decay:
        gradient = gradient + group.weight_decay * old["value"]
    first_decay, second_decay = group.betas
    steps = old["steps"] + 1
    count = steps.view(-1, *[1] * (gradient.dim() - 1)) if gradient.dim() else steps.view(())
    first = old["first"] * first_decay + gradient * (1 - first_decay)
    second = old["second"] * second_decay + gradient.square() * (1 - second_decay)
    root = (second / (1 - second_decay**count).to(second)).sqrt() + group.eps
    update = first / (1 - first_decay**count).to(first) / root
    update = update if mask is None else update * mask
    return {"value": old["value"] - lr * update, "first": first, "second": second, "steps": steps}
