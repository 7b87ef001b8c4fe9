"""Trajectory matching: training on the synthetic images moves a network as far as epochs on the real ones moved it."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from condense import networks, rng
from condense.augment import Augmentation, Parameters, dsa
from condense.engine import Diverged, Outcome, Run, Step, StepLoss, Target, unroll
from condense.errors import CondenseError
from condense.pretraining import Experts
from condense.pretraining.experts import provide
from condense.sets import SyntheticSet, decode
from condense.training import batch_ids

if TYPE_CHECKING:
    from condense.methods.trajectory_matching.mtt import MTT

_log = logging.getLogger(__name__)

ANSWER_CHUNK = 256
"""Real images that an expert is asked for at once."""

CLOSED = 20
"""Steps from the first one on that a gate may hold back before a word is said."""

DIVERGED = 1e4
"""A matching loss above this ends the run. 1 is the loss of a student that has not moved; real images at the start of a
run give 1 to 5, and instance norm keeps exploding pixels finite for long."""

# -- steps that the methods share -------------------------------------------------------------------------------------


def their_experts(config: MTT, run: Run, asked: str = "") -> Experts:
    """The experts of the file that was named, of the cache, or trained now.

    Under a time limit rather fewer experts than fewer epochs than three stretches that a student imitates.

    Args:
        config: the method's settings.
        run: the method's run.
        asked: the setting for which experts will be asked about images, which needs more than their weights where
            these come with running statistics.
    """
    if asked and networks.uses_batch_statistics(run.random_network(0)):
        raise CondenseError(
            f"{asked}: experts of {networks.name_of(run.network)} cannot be asked about images, as batch norm's "
            "statistics are not kept; take a network with instance norm"
        )
    epochs, (first, last) = config.epochs_needed(), config.epochs_read()
    return provide(
        run, config.training(run.task), file=config.experts, count=config.num_experts, epochs=epochs, first=first,
        last=last, least=min(first + 3 * config.expert_epochs, epochs),
    )  # fmt: skip


def with_step_size(config: MTT, synthetic: SyntheticSet) -> SyntheticSet:
    """The set, with a step size to be learned."""
    synthetic.learn_step_size(config.lr_start)
    return synthetic


def walk(
    config: MTT,
    run: Run,
    synthetic: SyntheticSet,
    experts: Experts,
    window: Callable[[int], int] | None = None,
    passed: Sequence[int] = (),
) -> Iterator[tuple[Step, int, int]]:
    """The outer loop: each step with the number of an expert and the epoch at which the student starts.

    Args:
        config: the method's settings.
        run: the method's run; every one of its ranks does all of the work.
        synthetic: the set.
        experts: whose trajectories are followed.
        window: one more than the latest start in step i; ``max_start_epoch`` by default.
        passed: epochs after the start, besides the last one, whose weights are asked for too.

    Raises:
        Diverged: the learned step size is no learning rate at the end.
    """
    latest = experts.epochs - config.expert_epochs + 1  # fewer epochs than asked for, where time was short

    def drawn(index: int) -> tuple[int, int]:
        draws = rng.Draws(run.seed, "trajectory", index)
        high = min(config.max_start_epoch if window is None else window(index), latest)
        low = min(config.min_start_epoch, high - 1)
        return int(draws.integers(experts.count, 1)), low + int(draws.integers(high - low, 1))

    for step in run.optimise(synthetic, config.steps, **config.groups()):
        expert, epoch = drawn(step.index)
        following = drawn(step.index + 1)
        experts.prefetch([(following[0], following[1] + later) for later in (0, *passed, config.expert_epochs)])
        yield step, expert, epoch
    rate = float(synthetic.tensors["step_size"].detach())
    if not 0 < rate < math.inf and not run.dry_run:
        raise Diverged(
            f"the learned step size is {rate:g} (lr_lr={config.lr_lr:g}, "
            f"step_size={config.step_size}): lower lr_lr" + ", or take step_size=positive" * (config.step_size == "raw")
        )


class Learner:
    """A network with flat weights that trains on the set as it is, differentiable in the set."""

    def __init__(self, config: MTT, run: Run, synthetic: SyntheticSet, experts: Experts) -> None:
        self.config, self.run, self.synthetic, self.layout = config, run, synthetic, experts.layout
        self.net, self.closed = run.random_network(0), 0
        self.drops = networks.uses_dropout(self.net)
        self.size = len(decode(synthetic.images.detach(), synthetic.stages)[1])
        self.augmentation: Augmentation = dsa(config.augment, mirror=run.task.mirror)

    def loss(self, step: Step, *, weight: float = 1.0, targets: Tensor | None = None) -> StepLoss:
        """The inner loss of an outer step, whose batches and augmentation are drawn once and replayed.

        Args:
            step: the outer step.
            weight: factor on the loss.
            targets: distributions (N, classes) in place of the set's labels.
        """
        size, key = self.size, rng.key(*step.key("inner"))
        batch = min(self.config.batch_syn or size, size)
        drawn: dict[int, tuple[Tensor | None, Parameters]] = {}

        def plan(i: int) -> tuple[Tensor | None, Parameters]:
            if i not in drawn:
                # The whole set needs no gathering, whose second derivative would scatter.
                rows = None if batch == size else batch_ids(key, size, batch, i).to(self.run.device)
                count = size if rows is None else len(rows)
                draws = rng.Draws(*step.key("augment"), i)
                drawn[i] = rows, self.augmentation.draw(draws, count, self.run.task.shape[1:], groups=1)
            return drawn[i]

        def forward(theta: Tensor, images: Tensor, i: int) -> Tensor:
            weights = self.layout.unflatten(theta)
            if not self.drops:
                return torch.func.functional_call(self.net, weights, (images,))
            with rng.seeded(*step.key("dropout"), i, device=self.run.device):  # the same each time it is made
                return torch.func.functional_call(self.net, weights, (images,))

        def loss(theta: Tensor, i: int) -> Tensor:
            rows, parameters = plan(i)
            images, ids = decode(self.synthetic.images, self.synthetic.stages)
            images, ids = (images, ids) if rows is None else (images[rows], ids[rows])
            logits = forward(theta, self.augmentation.apply(images, parameters), i)
            wanted = self.synthetic.labels.targets(ids) if targets is None else targets[ids]
            return weight * F.cross_entropy(logits, wanted)

        return loss

    def unroll(self, loss: StepLoss, start: Tensor, targets: Sequence[Target], gate: float | None = None) -> Outcome:
        """``syn_steps`` of training from ``start`` and the gradients of how far they miss ``targets``."""
        leaves = {name: leaf for name, leaf in self.synthetic.tensors.items() if name != "step_size"}
        rate = self.synthetic.step_size
        assert rate is not None
        return unroll(
            loss, start, leaves, rate, self.config.syn_steps, targets, gate=gate, **self.config.unrolling()
        )  # fmt: skip

    def descend(self, step: Step, outcome: Outcome) -> None:
        """One step of the set along the gradients; none where the gate was closed."""
        finite = outcome.loss < DIVERGED
        loss = torch.where(finite, outcome.loss, torch.inf)
        if outcome.gradients is None:
            self.closed += 1
            if self.closed == step.index + 1 == CLOSED:
                _log.warning(
                    "condense: the matching loss was above the gate in each of the first %d steps, so nothing was "
                    "learned; raise gate, or lower syn_steps or lr_start", CLOSED,
                )  # fmt: skip
            step.update(gate=False)
            step.optimizer.note(loss)
            return
        step.apply(outcome.gradients, loss)


def about_the_set(run: Run, experts: Experts, theta: Tensor, synthetic: SyntheticSet) -> Tensor:
    """Logits (N, classes) of an expert for the stored images: the mean over the training images of each."""
    images, ids = decode(synthetic.images.detach(), synthetic.stages)
    logits = answers(run, experts, theta, images)
    total = torch.zeros(len(synthetic.images), logits.shape[1], device=logits.device).index_add(0, ids, logits)
    return total * (len(synthetic.images) / len(images))


def answers(run: Run, experts: Experts, theta: Tensor, images: Tensor) -> Tensor:
    """Logits float32 (N, classes) of an expert with weights (P,) for images (N,C,H,W) in training space."""
    net: networks.Network = copy.deepcopy(run.random_network(0))
    net.load_state_dict({**net.state_dict(), **experts.layout.unflatten(theta)})
    with torch.no_grad(), run.fast():
        features = torch.cat([net.embed(part).float() for part in images.split(ANSWER_CHUNK)])
    with torch.no_grad():
        return net.classify(features)
