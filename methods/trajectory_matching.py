"""Trajectory matching: training on the synthetic images moves a network as far as epochs on the real ones moved it."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from condense import networks, rng
from condense.augment import Augmentation, Parameters, dsa
from condense.config import one_of, require
from condense.errors import CondenseError
from condense.labels import SoftLabels
from condense.optimizer import Group
from condense.registry import method
from condense.run import Diverged, Run, Step
from condense.students import Recipe, Work, batch_ids
from condense.synthetic import INITS, SyntheticOptions, SyntheticSet, central_rows, decode
from condense.tasks import Task
from condense.trajectories import Experts, Training, provide
from condense.unroll import Outcome, StepLoss, Target, check, unroll

_log = logging.getLogger(__name__)

EPS = 1e-12
"""Added to lengths that are divided by."""
ANSWER_CHUNK = 256
"""Real images that an expert is asked for at once."""
CLOSED = 20
"""Steps from the first one on that a gate may hold back before a word is said."""
DIVERGED = 1e4
"""A matching loss above this ends the run. 1 is the loss of a student that has not moved; real images at the start of a
run give 1 to 5, and instance norm keeps exploding pixels finite for long."""


# -- how experts are trained ------------------------------------------------------------------------------------------


def dot(a: Sequence[Tensor], b: Sequence[Tensor], stacked: bool) -> Tensor:
    """Inner product over all tensors; where ``stacked``, one for each index of the first axis."""
    products = [x * y for x, y in zip(a, b, strict=True)]
    return torch.stack([product.flatten(1).sum(1) if stacked else product.sum() for product in products]).sum(0)


def _beside(scalar: Tensor, tensor: Tensor) -> Tensor:
    """A scalar, or one for each index of the first axis of ``tensor``, shaped to multiply it."""
    return scalar.reshape(*scalar.shape, *[1] * (tensor.dim() - scalar.dim()))


@dataclass(frozen=True)
class GSAM:
    """FTD's update: the gradient at the worst point nearby, less ``coefficient`` of what the plain one has beyond it.

    With g the gradient, e = rho * w^2 g / || |w| g || (adaptive) or rho * g / |g|, and s the gradient at w + e on the
    same batch: s - coefficient * (g - c |g| / |s| s), c their cosine. Zhuang et al., ICLR 2022, as FTD's program has
    it. Needs float32: e is far below bfloat16's rounding of the weights.
    """

    rho: float
    coefficient: float
    adaptive: bool = True

    def __call__(self, work: Work) -> list[Tensor]:
        plain = torch.autograd.grad(work.loss(), work.weights)
        before = [weight.detach().clone() for weight in work.weights]
        scales = [weight.abs() if self.adaptive else torch.ones_like(weight) for weight in before]
        scaled = [scale * gradient for scale, gradient in zip(scales, plain)]
        factor = self.rho / (dot(scaled, scaled, work.stacked).sqrt() + EPS)
        with torch.no_grad():
            for weight, scale, direction in zip(work.weights, scales, scaled):
                weight.add_(_beside(factor, weight) * scale * direction)
        sharp = torch.autograd.grad(work.loss(), work.weights)
        with torch.no_grad():
            for weight, value in zip(work.weights, before):
                weight.copy_(value)
        lengths = [dot(g, g, work.stacked).sqrt() for g in (plain, sharp)]
        cosine = dot(plain, sharp, work.stacked) / (lengths[0] * lengths[1] + EPS)
        along = cosine * lengths[0] / (lengths[1] + EPS)
        return [s - self.coefficient * (g - _beside(along, s) * s) for g, s in zip(plain, sharp)]


@dataclass(frozen=True)
class Smooth:
    """AST's update: a loss that counts half at first, and ``penalty`` times how far input slopes are from length 1.

    The factor on the loss grows from 0.5 by 0.05 an epoch (``warm``). The slope is that of the sum of all logits in
    the pixels of the batch without augmentation; its length is taken over the colours of each pixel, and the mean of
    (length - 1)^2 over pixels and images is added.
    """

    penalty: float
    warm: bool

    def __call__(self, work: Work) -> Sequence[Tensor]:
        factor = min(1.0, 0.5 + 0.05 * work.epoch) if self.warm else 1.0
        loss = factor * work.loss()
        if self.penalty:
            clean = work.clean.detach().requires_grad_()
            (slope,) = torch.autograd.grad(work.forward(clean).sum(), clean, create_graph=True)
            lengths = (slope.square().sum(-3) + EPS).sqrt()
            shares = (lengths - 1).square()
            loss = loss + self.penalty * (shares.flatten(1).mean(1).sum() if work.stacked else shares.mean())
        return torch.autograd.grad(loss, work.weights)


# -- settings that all share ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MTT(SyntheticOptions):
    """Hyper-parameters of MTT; the defaults are those that reproduce CIFAR-10 at 10 images per class."""

    steps: int = 5000
    """Outer steps, each a student's training along one stretch of one expert."""
    syn_steps: int = 30
    """Training steps of the student in each outer step (the paper's N)."""
    expert_epochs: int = 2
    """Epochs of the expert that these steps shall equal (the paper's M)."""
    max_start_epoch: int = 20
    """Students start at epochs of the expert below this (T+)."""
    min_start_epoch: int = 0
    """Students start at this epoch or later."""
    batch_syn: int | None = None
    """Images of the set in each training step of the student; all of them by default."""
    lr_img: float = 100.0
    """Learning rate of the pixels."""
    lr_lr: float = 1e-5
    """Learning rate of the student's step size."""
    lr_start: float = 0.001
    """Step size of the student at the start (alpha)."""
    step_size: str = "positive"
    """positive bends steps down so that it stays above 0; raw lets it become negative, as released."""
    momentum: float = 0.5
    """Momentum of pixels and step size."""
    augment: str = "color_crop_cutout_flip_scale_rotate"
    """DSA operations joined by _, or none, of experts and students; one a step, its parameters per image."""
    grad_mode: str = "adjoint"
    """adjoint (exact, memory of one training step), graph (exact, memory of all of them) or tesla (without what a step
    does to the gradients of later ones)."""
    tesla_factor: float = 1.0
    """Factor on the pixels' gradient where grad_mode=tesla; 0.5 as released."""
    inner_optimizer: str = "sgd"
    """Optimiser of the student: sgd, or one that `higher` knows, such as adam (grad_mode=graph only)."""
    inner_momentum: float = 0.0
    """Momentum of the student's SGD."""
    experts: str = ""
    """File of `condense experts`; by default the cache is searched, and what it lacks is trained."""
    num_experts: int = 100
    """Experts, at most as many as a given file has."""
    buffer_epochs: int | None = None
    """Epochs of an expert's training; by default as many as are read."""
    expert_lr: float = 0.01
    """Learning rate of the experts' SGD."""
    expert_momentum: float = 0.0
    """Momentum of the experts."""
    expert_decay: float = 0.0
    """Weight decay of the experts."""
    expert_batch: int = 256
    """Real images in each training step of an expert."""

    def __post_init__(self) -> None:
        super().__post_init__()
        largest = sys.float_info.max
        require(
            self, steps=(1, math.inf), syn_steps=(1, math.inf), expert_epochs=(1, math.inf),
            min_start_epoch=(0, math.inf), max_start_epoch=(self.min_start_epoch + 1, math.inf),
            batch_syn=(1, math.inf), lr_img=(0, largest), lr_lr=(0, largest), lr_start=(1e-12, largest),
            momentum=(0, 1), tesla_factor=(0, largest), inner_momentum=(0, 1), num_experts=(1, math.inf),
            buffer_epochs=(self.min_start_epoch + self.expert_epochs, math.inf), expert_lr=(0, largest),
            expert_momentum=(0, 1), expert_decay=(0, largest), expert_batch=(1, math.inf),
        )  # fmt: skip
        one_of(self, step_size=("positive", "raw"))
        check(self.grad_mode, self.inner_optimizer, self.inner_momentum)

    def epochs_needed(self) -> int:
        """Epochs of an expert that are trained: up to the last one that a student is compared with."""
        return self.buffer_epochs or self.max_start_epoch - 1 + self.expert_epochs

    def epochs_read(self) -> tuple[int, int]:
        """The first and the last epoch that students start from or are compared with."""
        return self.min_start_epoch, min(self.max_start_epoch - 1 + self.expert_epochs, self.epochs_needed())

    def training(self, task: Task) -> Training:
        """How the experts are trained: plain SGD at a constant rate, so that students without momentum can follow."""
        recipe = Recipe(
            steps=0, batch=self.expert_batch, lr=self.expert_lr, momentum=self.expert_momentum,
            weight_decay=self.expert_decay, drops=(), augment=dsa(self.augment, mirror=task.mirror),
        )  # fmt: skip
        return Training(recipe, None, None)

    def groups(self) -> dict[str, Any]:
        """How what is learned is stepped, a :class:`Group` for each tensor."""
        return {
            "images": Group(lr=self.lr_img, momentum=self.momentum),
            "step_size": Group(lr=self.lr_lr, momentum=self.momentum, positive=self.step_size == "positive"),
        }

    def unrolling(self) -> dict[str, Any]:
        """Keywords of ``unroll``."""
        return {
            "grad_mode": self.grad_mode, "momentum": self.inner_momentum, "factor": self.tesla_factor,
            "optimizer": self.inner_optimizer,
        }  # fmt: skip


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
    if not 0 < rate < math.inf and not run.rehearses:
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


# -- MTT --------------------------------------------------------------------------------------------------------------


@method(
    "mtt", config=MTT, paper="Dataset Distillation by Matching Training Trajectories", year=2022, order=2,
    protocol="mtt-v1",
)  # fmt: skip
def mtt(task: Task, config: MTT, run: Run) -> SyntheticSet:
    """Trains a student from an expert's epoch on the set and asks it to land where the expert was epochs later.

    When to use: the highest accuracy of methods with hard labels, where experts can be afforded. Cost: experts are
    trained on the real data first (kept, and shared by runs), then a step is ``syn_steps`` training steps on the set
    and as many double backwards; memory is that of one of them. Known failure: a pixel learning rate that is too high
    for N, batch and network makes the loss exceed 1 (not better than standing still) and then explode.

    Cazenavette, Wang, Torralba, Efros & Zhu, CVPR 2022. The loss is |theta_N - goal|^2 / |start - goal|^2 over all
    weights. Gradients are exact (grad_mode=adjoint equals graph). Released: chunks of the set are taken from the end of
    a permutation, the step size may become negative (step_size=raw), sets are picked by test accuracy; here the last
    set is kept. Labels are those of the images; the learned step size travels in the set. Ranks share the training of
    experts, but each repeats the distilling. Networks with running statistics are trained by the batch's own.
    """
    experts = their_experts(config, run)
    synthetic = with_step_size(config, SyntheticSet.create(task, run.ipc, config, seed=run.seed, device=run.device))
    learner = Learner(config, run, synthetic, experts)
    for step, expert, epoch in walk(config, run, synthetic, experts):
        start, goal = experts.at(expert, epoch), experts.at(expert, epoch + config.expert_epochs)
        outcome = learner.unroll(learner.loss(step), start, [Target(config.syn_steps, goal)])
        learner.descend(step, outcome)
    return synthetic


# -- TESLA ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TESLA(MTT):
    """Hyper-parameters of TESLA; those of CIFAR-10 at 1 image per class."""

    steps: int = 10_000
    """See MTT's."""
    syn_steps: int = 50
    """See MTT's."""
    max_start_epoch: int = 5
    """See MTT's."""
    lr_img: float = 500.0
    """Learning rate of the pixels for the exact formula; published as 1000 for half the formula (tesla_factor)."""
    lr_lr: float = 1e-7
    """See MTT's."""
    lr_start: float = 0.01
    """See MTT's."""
    grad_mode: str = "tesla"
    """See MTT's; adjoint gives the exact gradient at the same memory for about half as much time again."""
    assign_labels: bool = False
    """Soft labels: in each step the softmax of the expert that is to be reached (published for ImageNet-1K). Such a set
    is judged under protocol=mtt-soft-v1."""


@method(
    "tesla", config=TESLA, paper="Scaling Up Dataset Distillation to ImageNet-1K with Constant Memory", year=2023,
    order=2, protocol="mtt-v1",
)  # fmt: skip
def tesla(task: Task, config: TESLA, run: Run) -> SyntheticSet:
    """MTT with an approximate gradient that needs one training step's memory, and labels assigned by the expert.

    When to use: for sets of very many classes, by assign_labels=true; for memory alone MTT's exact gradient costs
    little more. Cost: as MTT's, without the derivatives in the weights. Known failure: the gradient leaves out what a
    step does to the gradients of later ones, so the more the student moves, the further it is from the exact one.

    Cui, Wang, Si & Hsieh, ICML 2023. The released program halves the pixels' gradient by a slip (tesla_factor=0.5). It
    evaluates with the labels that the last expert happened to give; here the set's final labels are the mean softmax of
    all experts at the last epoch that students are asked to reach.
    """
    experts = their_experts(config, run, "assign_labels=true" if config.assign_labels else "")
    synthetic = with_step_size(config, SyntheticSet.create(task, run.ipc, config, seed=run.seed, device=run.device))
    learner = Learner(config, run, synthetic, experts)
    for step, expert, epoch in walk(config, run, synthetic, experts):
        start, goal = experts.at(expert, epoch), experts.at(expert, epoch + config.expert_epochs)
        assigned = about_the_set(run, experts, goal, synthetic).softmax(1) if config.assign_labels else None
        outcome = learner.unroll(learner.loss(step, targets=assigned), start, [Target(config.syn_steps, goal)])
        learner.descend(step, outcome)
    if config.assign_labels:
        epoch = min(config.max_start_epoch - 1 + config.expert_epochs, experts.epochs)
        thetas = (experts.at(k, epoch) for k in range(experts.count))
        shares = [about_the_set(run, experts, theta, synthetic).softmax(1) for theta in thetas]
        synthetic.labels = SoftLabels(torch.stack(shares).mean(0).log())
        synthetic.label_source = {"experts": experts.describe(), "epoch": epoch, "rule": "mean softmax"}
    return synthetic


# -- FTD --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FTD(MTT):
    """Hyper-parameters of FTD; those of CIFAR-10 at 10 images per class."""

    rho: float = 0.01
    """How far the experts' sharpness-aware steps look around."""
    gsam: float = 0.3
    """GSAM's coefficient of the experts (the paper's alpha); 0 is adaptive SAM."""
    ema: float | None = None
    """Decay of the average of the pixels that becomes the set; by default 0.9995 at the published 5,000 steps, and for
    other numbers of steps what leaves the first images the same share of 8 per cent."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, rho=(0, sys.float_info.max), gsam=(0, sys.float_info.max), ema=(0, 1))

    def training(self, task: Task) -> Training:
        """As MTT's, along flat regions: GSAM in float32."""
        return Training(super().training(task).recipe, GSAM(self.rho, self.gsam), "fp32")

    def groups(self) -> dict[str, Any]:
        """As MTT's, with an average of the pixels."""
        decay = 0.9995 ** (5000 / self.steps) if self.ema is None else self.ema
        groups = super().groups()
        return {**groups, "images": dataclasses.replace(groups["images"], ema=decay or None)}


@method(
    "ftd", config=FTD, year=2023, order=2, protocol="mtt-v1",
    paper="Minimizing the Accumulated Trajectory Error to Improve Dataset Distillation",
)  # fmt: skip
def ftd(task: Task, config: FTD, run: Run) -> SyntheticSet:
    """MTT along flat expert trajectories, on which a student that strays loses less; the set is a running average.

    When to use: instead of MTT, for some accuracy at 10 images per class and more. Cost: experts take twice MTT's
    steps; distilling as MTT. Known failure: as MTT; where a time limit ends the run early, the average still holds much
    of the first images (set ema lower).

    Du, Jiang, Tan, Zhou & Li, CVPR 2023. The experts' steps are GSAM's, as released. The released program evaluates the
    average on the network that was just trained on the raw pixels; published numbers gain about a point from that.
    """
    return mtt(task, config, run)


# -- AST --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AST(MTT):
    """Hyper-parameters of AST: its options as the authors' readme has them, MTT's rates."""

    init: str = "representative"
    """How images start: representative (nearest to the centroids of the class in an expert's logits), or as DM's."""
    lr_start: float = 0.01
    """See MTT's."""
    inner_momentum: float = 0.9
    """Momentum of the student's SGD, as the experts have it."""
    balance: bool = True
    """Weigh the student's loss by its start: more for late starts, less for early ones."""
    intermediate: str = "agg"
    """Epochs on the way that the student is compared with too: none, agg (each counts 1) or adaptive (later ones count
    more)."""
    perturb: float = 1.0
    """Length of the random direction by which the convolutions' weights are multiplied at the start; 0 for none."""
    buffer_epochs: int | None = 50
    """See MTT's; the experts' learning rate drops after half of them."""
    expert_lr: float = 0.003
    """See MTT's."""
    expert_momentum: float = 0.9
    """See MTT's."""
    expert_decay: float = 1e-3
    """See MTT's."""
    penalty: float = 2.0
    """Weight of the experts' input-gradient penalty; 0 for none."""
    warm_loss: bool = True
    """Whether the experts' loss counts half in the first epoch and grows to its full weight over ten."""

    inits: ClassVar[tuple[str, ...]] = (*INITS, "representative")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, perturb=(0, sys.float_info.max), penalty=(0, sys.float_info.max))
        one_of(self, intermediate=BETAS)

    def training(self, task: Task) -> Training:
        """SGD with momentum and one drop, on a loss that is kept smooth; in float32 for its second derivative."""
        recipe, epochs = super().training(task).recipe, self.epochs_needed()
        recipe = dataclasses.replace(recipe, drops=((epochs // 2 + 1) / epochs,), drop_factor=0.6)
        return Training(recipe, Smooth(self.penalty, self.warm_loss), "fp32")


BETAS: dict[str, Callable[[int, int], float]] = {
    "none": lambda k, count: 0.0,
    "agg": lambda k, count: 1.0,
    "adaptive": lambda k, count: k / (1 + count),
}
"""Weight of match k (from 1) of ``count`` intermediate ones."""


def start_weight(epoch: int, max_start_epoch: int) -> float:
    """AST's weight of the student's loss: log5(8 + epochs past the middle start), or one over it before the middle."""
    past = epoch - max_start_epoch // 2
    weight = math.log(abs(past) + 8, 5)
    return weight if past >= 0 else 1 / weight


def on_the_way(config: AST, experts: Experts, expert: int, epoch: int) -> list[Target]:
    """The weights that the student is compared with: those of the last epoch, and of the epochs before it."""
    last, between = config.expert_epochs, config.expert_epochs - 1
    stride = config.syn_steps // last
    found = [Target(config.syn_steps, experts.at(expert, epoch + last))]
    for k in range(1, last):
        weight = BETAS[config.intermediate](k, between)
        if weight and stride:
            found.append(Target(k * stride, experts.at(expert, epoch + k), weight))
    return found


def perturbed(start: Tensor, experts: Experts, length: float, key: Sequence[int | str]) -> Tensor:
    """Flat weights (P,) with each convolution's W become W + length * D / |D| * W, D normal."""
    if not length:
        return start
    moved, generator = start.clone(), rng.generator(*key)
    for weight in experts.layout.unflatten(moved).values():
        if weight.dim() == 4:
            direction = torch.randn(weight.shape, generator=generator).to(weight.device)
            weight.mul_(1 + length * direction / direction.norm())
    return moved


def representative(task: Task, run: Run, experts: Experts) -> Tensor:
    """Ids of the real images nearest to ``ipc`` k-means centroids of each class, in the logits of a random expert."""
    expert = int(rng.Draws(run.seed, "init", "expert").integers(experts.count, 1))
    chosen = []
    for c in range(task.num_classes):
        members = torch.from_numpy(task.class_ids(c))
        logits = torch.cat(
            [answers(run, experts, experts.at(expert, -1), run.task.batch(ids)) for ids in members.split(ANSWER_CHUNK)]
        )
        chosen.append(members[central_rows(logits, run.ipc, rng.key(run.seed, "init", "representative", c))])
    return torch.cat(chosen)


@method(
    "ast", config=AST, year=2023, order=2, protocol="mtt-v1",
    paper="Efficient Dataset Distillation through Alignment with Smooth and High-Quality Expert Trajectories",
)  # fmt: skip
def ast(task: Task, config: AST, run: Run) -> SyntheticSet:
    """MTT along experts trained with momentum and kept smooth, by students that are perturbed and matched on the way.

    When to use: where better experts than MTT's are wanted. Cost: experts take about four times MTT's time (a double
    backward in each step); distilling as MTT. Known failure: the released program does not run as it is, so its numbers
    are unverified; momentum makes early students overshoot (lower lr_start).

    Shen, Yang & Lam, 2023. Representative images are found for any ipc: the released program takes ipc / 10 images for
    each of 10 centroids, none at 1 image per class. It loses the experts' momentum where their rate drops; here that
    stays.
    """
    experts = their_experts(config, run, "init=representative" if config.init == "representative" else "")
    ids = representative(task, run, experts) if config.init == "representative" else None
    synthetic = with_step_size(
        config, SyntheticSet.create(task, run.ipc, config, seed=run.seed, device=run.device, ids=ids)
    )
    learner = Learner(config, run, synthetic, experts)
    passed = () if config.intermediate == "none" else range(1, config.expert_epochs)
    for step, expert, epoch in walk(config, run, synthetic, experts, passed=passed):
        start = perturbed(experts.at(expert, epoch), experts, config.perturb, step.key("perturb"))
        weight = start_weight(epoch, config.max_start_epoch) if config.balance else 1.0
        targets = on_the_way(config, experts, expert, epoch)
        learner.descend(step, learner.unroll(learner.loss(step, weight=weight), start, targets))
    return synthetic


# -- DATM -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DATM(FTD):
    """Hyper-parameters of DATM; those of CIFAR-10 at 10 images per class."""

    init: str = "correct"
    """How images start: correct (real images that an expert recognises), or as DM's."""
    steps: int = 10_000
    """See MTT's."""
    syn_steps: int = 80
    """See MTT's."""
    lr_start: float = 0.01
    """See MTT's."""
    lr_label: float = 2.0
    """Learning rate of the label logits; 0 keeps them."""
    label_momentum: float = 0.9
    """Momentum of the label logits."""
    first_max_start_epoch: int | None = None
    """Students start below this epoch at first; by default half of ``max_start_epoch``."""
    expand_steps: int = 1000
    """Outer steps over which later starts join, evenly, up to ``max_start_epoch``; 0: all from the first step."""
    gate: float = 1.0
    """Outer steps with a matching loss above this change nothing; 1.1 for CIFAR-10 at 1 image per class."""
    ema: float | None = 0.0
    """See FTD's; the released program has the setting but no average."""

    inits: ClassVar[tuple[str, ...]] = (*INITS, "correct")

    def __post_init__(self) -> None:
        super().__post_init__()
        largest = sys.float_info.max
        require(
            self, lr_label=(0, largest), label_momentum=(0, 1), gate=(0, largest), expand_steps=(0, math.inf),
            first_max_start_epoch=(self.min_start_epoch + 1, self.max_start_epoch),
        )  # fmt: skip

    def window(self, index: int) -> int:
        """One more than the latest epoch at which the student of outer step ``index`` may start."""
        if not self.expand_steps:
            return self.max_start_epoch
        first = self.first_max_start_epoch or max(self.min_start_epoch + 1, self.max_start_epoch // 2)
        return min(self.max_start_epoch, first + (self.max_start_epoch - first) * index // self.expand_steps)

    def groups(self) -> dict[str, Any]:
        """As MTT's, with the labels."""
        return {**super().groups(), "labels": Group(lr=self.lr_label, momentum=self.label_momentum)}


def recognised(task: Task, run: Run, experts: Experts) -> Tensor:
    """Ids of ``ipc`` random real images of each class that the first expert recognises; where it recognises too few,
    also of those that the next ones do, and at last of any."""
    chosen = []
    for c in range(task.num_classes):
        members = torch.from_numpy(task.class_ids(c))
        left = members[rng.Draws(run.seed, "init", "correct", c).permutation(len(members))]
        found: list[Tensor] = []
        for k in range(experts.count):
            wrong: list[Tensor] = []
            for ids in left.split(ANSWER_CHUNK):
                missing = run.ipc - sum(map(len, found))
                if not missing:
                    break
                right = (answers(run, experts, experts.at(k, -1), run.task.batch(ids)).argmax(1) == c).cpu()
                found.append(ids[right][:missing])
                wrong.append(ids[~right])
            left = torch.cat(wrong) if wrong else left[:0]
        chosen.append(torch.cat([*found, left])[: run.ipc])
    return torch.cat(chosen)


def agreed_logits(run: Run, experts: Experts, synthetic: SyntheticSet) -> Tensor:
    """Mean logits (N, classes) over the experts that recognise an image; over all of them where none does."""
    classes = synthetic.classes
    total = torch.zeros(len(classes), run.task.num_classes, device=classes.device)
    every, votes = torch.zeros_like(total), torch.zeros(len(classes), 1, device=classes.device)
    for k in range(experts.count):
        logits = about_the_set(run, experts, experts.at(k, -1), synthetic)
        right = (logits.argmax(1) == classes).float()[:, None]
        total, every, votes = total + right * logits, every + logits, votes + right
    return torch.where(votes > 0, total / votes.clamp(min=1), every / experts.count)


@method(
    "datm", config=DATM, year=2024, labels="soft", order=2, protocol="mtt-soft-v1",
    paper="Towards Lossless Dataset Distillation via Difficulty-Aligned Trajectory Matching",
)  # fmt: skip
def datm(task: Task, config: DATM, run: Run) -> SyntheticSet:
    """Matches FTD's experts from easy epochs to hard ones, with learned soft labels; late epochs suit large sets.

    When to use: for 10 images per class and more, where soft labels are allowed. Cost: FTD's experts, then steps of
    80 training steps each. Known failure: with few experts the labels know little; a comparison with hard labels alone
    is unfair, so judge it beside random images with labels of the same experts (``--teachers``).

    Guo, Wang, Cazenavette, Li, Zhang & You, ICLR 2024. Labels start as the mean logits of the experts that recognise an
    image, and are stepped with pixels and step size; a step whose matching loss exceeds ``gate`` is left out, and its
    gradients are not even computed. The published experts have 100 epochs, the last of which choose images and labels
    (buffer_epochs=100; by default experts end with the last epoch that is matched). Where no expert recognises an
    image, the released program divides by 0; here all are averaged.
    """
    experts = their_experts(config, run, "method datm")
    ids = recognised(task, run, experts) if config.init == "correct" else None
    synthetic = with_step_size(
        config, SyntheticSet.create(task, run.ipc, config, seed=run.seed, device=run.device, ids=ids)
    )
    synthetic.learn_labels(agreed_logits(run, experts, synthetic))
    synthetic.label_source = {
        "experts": experts.describe(),
        "epoch": experts.epochs,
        "rule": "learned from mean logits",
    }
    learner = Learner(config, run, synthetic, experts)
    gate = None if run.rehearses else config.gate  # a step that is left out would tell nothing of what steps cost
    for step, expert, epoch in walk(config, run, synthetic, experts, config.window):
        start, goal = experts.at(expert, epoch), experts.at(expert, epoch + config.expert_epochs)
        outcome = learner.unroll(learner.loss(step), start, [Target(config.syn_steps, goal)], gate)
        learner.descend(step, outcome)
    return synthetic
