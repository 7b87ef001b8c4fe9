"""Steps that the methods of trajectory matching share."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from condense import networks, rng
from condense.augment import AugmentationParameters, make_augmentation
from condense.device import add_rows, upload
from condense.engine import BatchLoss, NetworkLoss, ParamGroup, Run, Step, StepLoss, Target, UnrollResult, unroll
from condense.errors import CondenseError
from condense.methods.trajectory_matching.settings import MTT
from condense.pretraining import Experts, load_or_train_experts
from condense.sets import SyntheticSet, decode
from condense.training import batch_ids

LOGIT_CHUNK = 256
"""Number of images in one forward pass of an expert."""

MAX_MATCHING_LOSS = 1e4
"""A matching loss above this ends the run. 1 is the loss of a student that does not move; real images at the start of a
run give 1 to 5, and with instance norm the loss of exploding pixels stays finite for long."""


def get_experts(config: MTT, run: Run, required_by: str = "") -> Experts:
    """Loads the experts of the given file or of the cache, or trains them.

    A time limit reduces the number of experts before it reduces their epochs to fewer than three segments.

    Args:
        config: the method's settings.
        run: the method's run.
        required_by: the setting that needs the experts' logits, which need more than their weights if the network has
            running statistics.

    Raises:
        CondenseError: logits are needed, and the network has running statistics, which experts do not store.
    """
    if required_by and networks.uses_batch_statistics(run.random_network(0)):
        raise CondenseError(
            f"{required_by}: experts of {networks.network_name(run.network)} cannot be asked about images, as "
            "batch norm's statistics are not kept; take a network with instance norm"
        )
    epochs, (first, last) = config.epochs_needed(), config.epochs_read()
    return load_or_train_experts(
        run,
        config.expert_training(run.task),
        file=config.experts,
        count=config.num_experts,
        epochs=epochs,
        first=first,
        last=last,
        min_epochs=min(first + 3 * config.expert_epochs, epochs),
    )


def draw_segment(
    config: MTT,
    run: Run,
    experts: Experts,
    index: int,
    end_of_starts: Callable[[int], int] | None = None,
    between: Sequence[int] = (),
) -> tuple[int, int]:
    """Draws the number of an expert and the epoch at which the student of outer step ``index`` starts.

    The weights that the next outer step needs are prefetched.

    Args:
        config: the method's settings.
        run: the method's run; its seed determines the draws.
        experts: the experts to draw from.
        index: the outer step.
        end_of_starts: one more than the latest start in outer step i; ``max_start_epoch`` by default.
        between: intermediate epochs, counted from the start, whose weights are needed too.
    """
    # A time limit may have left the experts fewer epochs than the settings ask for.
    latest = experts.epochs - config.expert_epochs + 1

    def draw(i: int) -> tuple[int, int]:
        draws = rng.Draws(run.seed, "trajectory", i)
        high = min(config.max_start_epoch if end_of_starts is None else end_of_starts(i), latest)
        low = min(config.min_start_epoch, high - 1)
        return int(draws.integers(experts.count, 1)), low + int(draws.integers(high - low, 1))

    next_expert, next_epoch = draw(index + 1)
    experts.prefetch([(next_expert, next_epoch + offset) for offset in (0, *between, config.expert_epochs)])
    return draw(index)


def step_size_group(config: MTT) -> ParamGroup:
    """Optimiser settings of the student's step size."""
    return ParamGroup(lr=config.lr_lr, momentum=config.momentum, positive=config.step_size == "positive")


def shuffled_rows(key: int, size: int, batch: int, step: int) -> Tensor:
    """The rows of a training step: parts of a new permutation for each epoch, as released from its end, so that a
    short remainder comes first."""
    count = math.ceil(size / batch)
    epoch, part = divmod(step, count)
    return batch_ids(key, size, batch, epoch * count + count - 1 - part)


class UnrolledStudent:
    """A network with flat weights whose training on the synthetic set is differentiable in the set."""

    def __init__(self, config: MTT, run: Run, synthetic: SyntheticSet, experts: Experts) -> None:
        self.config, self.run, self.synthetic, self.layout = config, run, synthetic, experts.layout
        self.net = run.random_network(0)
        self.size = len(decode(synthetic.images.detach(), synthetic.stages)[1])
        self.augmentation = make_augmentation(config.augment, mirror=run.task.mirror)
        self.network_loss = NetworkLoss(self.batch_loss, list(self.net.buffers()))

    def loss(self, step: Step, *, weight: float = 1.0, targets: Tensor | None = None) -> StepLoss:
        """Returns the training loss of an outer step: the cross-entropy of augmented batches of the set.

        Batches, augmentation and dropout are drawn once, because the loss of a training step is computed twice.

        Args:
            step: the outer step.
            weight: factor on the loss.
            targets: class probabilities (N, classes) that replace the set's labels.
        """
        size, key = self.size, rng.key(*step.key("inner"))
        batch = min(self.config.batch_syn or size, size)
        drawn: dict[int, tuple[Tensor | None, AugmentationParameters]] = {}

        def draw(i: int) -> tuple[Tensor | None, AugmentationParameters]:
            if i not in drawn:
                # The whole set needs no gathering, whose second derivative would scatter.
                rows = None if batch == size else upload(shuffled_rows(key, size, batch, i), self.run.device)
                count = size if rows is None else len(rows)
                draws = rng.Draws(*step.key("augment"), i)
                drawn[i] = rows, self.augmentation.draw(draws, count, self.run.task.shape[1:], groups=1)
            return drawn[i]

        factor = torch.full((), weight, device=self.run.device)

        def make_batch(i: int) -> tuple[Tensor, ...]:
            rows, parameters = draw(i)
            images, ids = decode(self.synthetic.images, self.synthetic.stages)
            images, ids = (images, ids) if rows is None else (images[rows], ids[rows])
            labels = self.synthetic.labels.targets(ids) if targets is None else targets[ids]
            return self.augmentation.apply(images, parameters), labels, factor

        if self.net.draws_nothing:
            return BatchLoss(make_batch, self.network_loss)

        def loss(theta: Tensor, i: int) -> Tensor:
            with rng.seeded(*step.key("dropout"), i, device=self.run.device):  # the same draws in both passes
                return self.batch_loss(theta, *make_batch(i))

        return loss

    def batch_loss(self, theta: Tensor, images: Tensor, labels: Tensor, factor: Tensor) -> Tensor:
        """The cross-entropy, times ``factor``, of the network with weights ``theta`` on training images."""
        logits = torch.func.functional_call(self.net, self.layout.unflatten(theta), (images,))
        return factor * F.cross_entropy(logits, labels)

    def unroll(
        self, loss: StepLoss, start: Tensor, targets: Sequence[Target], gate: float | None = None
    ) -> UnrollResult:
        """Trains ``syn_steps`` steps from ``start``; returns the distance to ``targets`` and its gradients."""
        leaves = {name: leaf for name, leaf in self.synthetic.tensors.items() if name != "step_size"}
        rate = self.synthetic.step_size
        assert rate is not None
        options = self.config.unroll_options()
        return unroll(loss, start, leaves, rate, self.config.syn_steps, targets, gate=gate, **options)


def apply_update(step: Step, outcome: UnrollResult) -> None:
    """Updates the set along the gradients, and records the loss; a step that the gate rejected changes nothing."""
    loss = torch.where(outcome.loss < MAX_MATCHING_LOSS, outcome.loss, torch.inf)
    if outcome.gradients is None:
        step.update(gate=False)
        step.optimizer.record_loss(loss)
    else:
        step.apply(outcome.gradients, loss, gate=outcome.is_open)


def check_step_size(config: MTT, run: Run, synthetic: SyntheticSet) -> None:
    """Checks the learned step size at the end of a run.

    Raises:
        Diverged: it cannot be a learning rate.
    """
    rate = float(synthetic.tensors["step_size"].detach())
    hint = ", or take step_size=positive" * (config.step_size == "raw")
    run.require_converged(
        0 < rate < math.inf,
        f"the learned step size is {rate:g} (lr_lr={config.lr_lr:g}, step_size={config.step_size}): lower lr_lr{hint}",
    )


def compute_set_logits(run: Run, experts: Experts, theta: Tensor, synthetic: SyntheticSet) -> Tensor:
    """Logits (N, classes) of an expert for the stored images: the mean over the training images decoded from each."""
    images, ids = decode(synthetic.images.detach(), synthetic.stages)
    logits = compute_expert_logits(run, experts, theta, images)
    total = torch.zeros(len(synthetic.images), logits.shape[1], device=logits.device)
    add_rows(total, ids, logits)
    return total * (len(synthetic.images) / len(images))


def compute_expert_logits(run: Run, experts: Experts, theta: Tensor, images: Tensor) -> Tensor:
    """Logits float32 (N, classes) of an expert with weights (P,) for images (N,C,H,W) in training space."""
    net: networks.Network = copy.deepcopy(run.random_network(0))
    net.load_state_dict({**net.state_dict(), **experts.layout.unflatten(theta)})
    with torch.no_grad(), run.autocast():
        features = torch.cat([net.embed(part).float() for part in images.split(LOGIT_CHUNK)])
    with torch.no_grad():
        return net.classify(features)
