"""KRR-ST: self-supervised dataset distillation for transfer, by kernel ridge regression on features of networks."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from condense import networks, rng
from condense.config import require_range
from condense.data import Task
from condense.device import upload
from condense.engine import Interrupted, ParamGroup, Run, Step, copy_state
from condense.errors import CondenseError
from condense.labels import FeatureLabels
from condense.pretraining import BarlowOptions, get_committee, load_or_compute_features
from condense.registry import method
from condense.sets import SyntheticOptions, SyntheticSet
from condense.tracking import Progress
from condense.training import batch_ids


class KernelRidge(torch.autograd.Function):
    """Predictions of ridge regression from synthetic to real features, with gradients to the synthetic side.

    With K = S S^T, k = R S^T and A = K + lambda I: predictions k A^-1 Y, where lambda is ``ridge`` times the trace of K
    and counts as a constant. One Cholesky factor of A serves both directions. If A is not positive definite as it is
    rounded, all results are NaN.

    Args:
        real: R, (B, D).
        fake: S, (m, D).
        targets: Y, (m, d).
        ridge: share of the trace.
    """

    @staticmethod
    def forward(ctx: Any, real: Tensor, fake: Tensor, targets: Tensor, ridge: float) -> Tensor:
        kernel, cross = fake @ fake.T, real @ fake.T
        strength = ridge * kernel.diagonal().sum()
        factor, fault = torch.linalg.cholesky_ex(
            kernel + strength * torch.eye(len(fake), dtype=kernel.dtype, device=kernel.device)
        )
        weights = torch.cholesky_solve(targets, torch.where(fault == 0, factor, math.nan))
        ctx.save_for_backward(real, fake, cross, factor, weights)
        return cross @ weights

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, Tensor, None]:
        real, fake, cross, factor, weights = ctx.saved_tensors
        solved = torch.cholesky_solve(cross.T @ gradient, factor)
        # Through k: weights (gradient^T R). Through A, whose gradient is -solved weights^T: both of its sides are S.
        through_kernel = solved @ (weights.T @ fake) + weights @ (solved.T @ fake)
        return None, weights @ (gradient.T @ real) - through_kernel, solved, None


def with_bias(features: Tensor) -> Tensor:
    """Features (N, D), float32 or float64, with a column of ones."""
    return F.pad(features, (0, 1), value=1.0)


@dataclass(frozen=True)
class KRRST(BarlowOptions):
    """Hyper-parameters of KRR-ST, with the defaults of the released program for CIFAR-100."""

    steps: int = 160_000
    """Outer steps, each with one network of the pool."""
    lr_img: float = 1e-4
    """Learning rate of Adam on the pixels; it falls linearly to a thousandth. 1e-5 for 64x64 images."""
    lr_label: float = 1e-4
    """The same for the target features."""
    batch_real: int = 1024
    """Real images of a step."""
    ridge: float = 1e-6
    """Penalty of the regression, as a share of the trace of the kernel (lambda)."""
    pool: int = 10
    """Networks that are trained on the set while it changes."""
    pool_steps: int = 1000
    """Steps after which a network of the pool is reinitialised; the first ones begin with 1 to this many."""
    pool_reset: bool = True
    """Count the steps of a new network from 0, as in the paper. false: the count goes on, as released, so that a
    network that was reinitialised once is reinitialised whenever it is used, and is never trained again."""
    pool_lr: float = 0.1
    """Learning rate of SGD with momentum 0.9 for the pool, on all images of the set."""
    pool_decay: float = 1e-3
    """Weight decay of the pool."""
    init: str = "real"
    """Initial images: real (random real images), noise, or one of the other ways of `condense show dm`."""
    committee: str = ""
    """Architecture of the target model, the run's network by default. Published: resnet18-bn."""

    steps_change_schedule: ClassVar[bool] = True  # a finished run cannot be given more steps

    def __post_init__(self) -> None:
        self.check_teachers()
        SyntheticOptions(init=self.init)  # checks it
        largest = sys.float_info.max
        counts = dict.fromkeys(("steps", "batch_real", "pool", "pool_steps"), (1, math.inf))
        factors = dict.fromkeys(("lr_img", "lr_label", "ridge", "pool_lr", "pool_decay"), (0, largest))
        require_range(self, **counts, **factors)
        if self.num_teachers > 1 or "," in self.committee or "," in self.teachers:
            raise CondenseError("krrst has one target model; leave out num_teachers, and name one network")

    def starts_from_file(self) -> bool:
        """Whether ``init`` is the file of a distilled set."""
        return self.init.endswith(".h5")


class Pool:
    """Networks that are trained on the set, each with the number of its steps; part of a run's checkpoint.

    A network has as many outputs as there are target features. It begins with a random number of steps on the initial
    set, so that the pool has networks of all ages.
    """

    def __init__(self, run: Run, config: KRRST, synthetic: SyntheticSet) -> None:
        self.run, self.config = run, config
        shape, outputs = run.task.shape, synthetic.tensors["labels"].shape[1]
        self.nets = []
        for number in range(config.pool):
            with run.seeded("pool", number):
                self.nets.append(networks.build_network(run.network, shape, outputs).to(run.device))
        with run.seeded("pool"):
            self.fresh = networks.build_network(run.network, shape, outputs)  # on the CPU, where weights are drawn
        networks.require_embedding(self.fresh, run.network, run.name)
        self.optimizers = [self.make_optimizer(net) for net in self.nets]
        self.ages = [0] * config.pool
        self.is_restored = False
        run.register_state("pool", self)
        if not self.is_restored:
            self.train(synthetic, (rng.Draws(run.seed, "ages").integers(config.pool_steps, config.pool) + 1).tolist())

    def make_optimizer(self, net: networks.Network) -> torch.optim.Optimizer:
        lr, decay = self.config.pool_lr, self.config.pool_decay
        return torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9, weight_decay=decay)

    def train(self, synthetic: SyntheticSet, ages: list[int]) -> None:
        """Trains the networks for the given numbers of steps."""
        progress = Progress(f"{self.run.name}: pool of {len(ages)} networks", sum(ages), quiet=self.run.quiet)
        with self.run.stage("preparation", sum(ages), trial=10) as stage:
            turns = [number for number, age in enumerate(ages) for _ in range(age)]
            for done, number in enumerate(turns[: stage.units], 1):
                self.advance(number, synthetic)
                stage.report(done)
                progress.update(done)
                if self.run.stop_requested and self.run.ranks.world_size == 1:
                    raise Interrupted(f"stopped before the first step; begin again with: {self.run.resume_call}")
        progress.close()

    def choose(self, step: Step) -> int:
        """Number of the network of a step."""
        return int(step.draws("pool").integers(len(self.nets), 1))

    def update(self, number: int, step: Step, synthetic: SyntheticSet) -> None:
        """Trains a network for one step, or reinitialises it after its last one."""
        if self.ages[number] < self.config.pool_steps:
            self.advance(number, synthetic)
            return
        with self.run.seeded("pool again", step.index):
            networks.reset_parameters(self.fresh)
        with torch.no_grad():
            copy_state(self.fresh, self.nets[number])
        self.optimizers[number] = self.make_optimizer(self.nets[number])
        self.ages[number] = 0 if self.config.pool_reset else self.ages[number]

    def advance(self, number: int, synthetic: SyntheticSet) -> None:
        """One step of a network on all images of the set."""
        net, optimizer = self.nets[number].train().requires_grad_(True), self.optimizers[number]
        with self.run.autocast():
            outputs = net(synthetic.images.detach())
        optimizer.zero_grad()
        F.mse_loss(outputs.float(), synthetic.tensors["labels"].detach()).backward()
        optimizer.step()
        self.ages[number] += 1

    def state_dict(self) -> dict[str, Any]:
        nets = [{name: value.clone() for name, value in net.state_dict().items()} for net in self.nets]
        return {"nets": nets, "optimizers": [each.state_dict() for each in self.optimizers], "ages": list(self.ages)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for net, saved in zip(self.nets, state["nets"]):
            net.load_state_dict(saved)
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        self.ages, self.is_restored = list(state["ages"]), True


@method(
    "krrst",
    config=KRRST,
    paper="Self-Supervised Dataset Distillation for Transfer Learning",
    year=2024,
    labels="features",
    protocol="transfer-v1",
    network="convnet-d3-w128-bn",
    pretrains="teachers",
)
def krrst(task: Task, config: KRRST, run: Run) -> SyntheticSet:
    """Learns images and target features on which networks are pretrained that are then fine-tuned on other data.

    When to use: to pretrain networks for other tasks; classes are not used. Cost: the self-supervised training of the
    target model, one pass over the data, the training of the pool on the initial set, and in each step features of
    ``batch_real`` real images and of the set. Known failure: with a weak target model the set is no better than
    random images with their features (see docs/transfer.md).

    Lee et al., ICLR 2024. The released program never sets the count of a network's steps back, so that after some
    thousand steps all networks of the pool are untrained ones (``pool_reset=false``). It feeds the real images
    normalised and the set unnormalised, here both are in training space. It computes the target features of the real
    images in every step, here once, in float16. Its widths of the stages of the ConvNet differ (128, 256, 512).
    """
    target = get_committee(config, run, features_only=True)
    features = load_or_compute_features(run, target.members[0])
    options = SyntheticOptions(init=config.init)
    synthetic = SyntheticSet.create(task, run.ipc, options, seed=run.seed, device=run.device)
    empty = FeatureLabels(torch.zeros(0, features.shape[1]))
    first = empty.label_images(synthetic.images.detach(), target.members[0].network, run.seed)
    synthetic.learn_labels(first.features, FeatureLabels)
    synthetic.label_source = {"teachers": target.describe()}
    pool = Pool(run, config, synthetic)
    images, labels = (
        ParamGroup(lr=lr, optimizer="adam", betas=(0.9, 0.999), schedule=lambda done: 1 - 0.999 * done)
        for lr in (config.lr_img, config.lr_label)
    )
    for step in run.optimise(synthetic, config.steps, images=images, labels=labels):
        number = pool.choose(step)
        net = pool.nets[number].eval().requires_grad_(False)
        ids = batch_ids(rng.key(run.seed, "real"), len(task.train), config.batch_real, step.index)
        with run.autocast():
            with torch.no_grad():
                real = torch.cat(
                    [net.embed(run.task.batch(part)) for part in ids.split(run.forward_chunk_size() or len(ids))]
                )
            fake = net.embed(synthetic.images)
        real, fake = with_bias(real.float()), with_bias(fake.float())
        predicted = KernelRidge.apply(real, fake, synthetic.tensors["labels"], config.ridge)
        step.minimise(F.mse_loss(predicted, upload(features[ids], run.device).float()))
        pool.update(number, step, synthetic)
    return synthetic
