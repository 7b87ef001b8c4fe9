"""Gradient matching: the weight gradients of the synthetic images are fitted to those of the real images.

DC, DSA, DCC and DSAC match along networks that train on the set, IDC along networks trained on the real data.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condense import augment, networks, rng
from condense.config import require_one_of, require_range
from condense.data import Task
from condense.device import on_host, upload_indices
from condense.engine import ParamGroup, RealBatches, RealBatchOptions, Run, Step
from condense.errors import CondenseError
from condense.labels import HardLabels
from condense.pretraining import SnapshotOptions, load_or_train_snapshots
from condense.registry import method
from condense.sets import SyntheticSet
from condense.training import FixedSource, Student, TrainConfig, train

COSINE_EPS = 1e-6
"""Added to the product of the norms of two rows, as released."""
PUBLISHED_NETWORKS = 1000
"""Random networks along which DC, DSA, DCC and DSAC match, at every number of images per class."""
STATISTICS_IMAGES = 16
"""Real images per class that update BatchNorm statistics before each matching step, as released."""


# -- gradients and their distance -------------------------------------------------------------------------------------


def matched_weights(net: networks.Network) -> list[Tensor]:
    """The parameters whose gradients are matched: all but vectors (biases and the affine terms of norms)."""
    return [parameter for parameter in net.parameters() if parameter.dim() > 1]


def row_cosine(real: Iterable[Tensor], fake: Iterable[Tensor]) -> Tensor:
    """DC's distance: 1 - <a, b> / (|a| |b| + 1e-6) for each filter or output unit, summed over these and over weights.

    Args:
        real: the gradient of each matched weight on real images; a row is an index of the first axis. Gradients of
            several classes, one after the other along it, give the sum over classes.
        fake: the same for the synthetic images.

    Returns:
        A scalar. A row of zeros counts 1 and has no gradient.
    """
    total = []
    for a, b in zip(real, fake, strict=True):
        a, b = a.flatten(1), b.flatten(1)
        norms = torch.linalg.vector_norm(a, dim=1) * torch.linalg.vector_norm(b, dim=1)
        total.append((1 - (a * b).sum(1) / (norms + COSINE_EPS)).sum())
    return torch.stack(total).sum()


def real_gradients(
    net: networks.Network, images: Tensor, labels: Tensor, weights: Sequence[Tensor], run: Run, classes: int = 1
) -> list[Tensor]:
    """Gradients float32 of the mean cross-entropy over images (N,C,H,W) for each of ``weights``, without a graph.

    They are computed in the run's precision and, on a CPU, in chunks that bound the memory of the feature maps.

    Args:
        classes: K equal classes, one after the other in the batch; each has its own gradients, (K * rows, ...).
    """
    if classes > 1:
        with run.autocast():
            return [gradient.detach() for gradient in class_gradients(net, images, labels, weights, classes)]
    total = [torch.zeros_like(weight) for weight in weights]
    whole_batch = any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in net.modules())
    chunk = (None if whole_batch else run.forward_chunk_size(gradients=True)) or len(images)
    for images_part, labels_part in zip(images.split(chunk), labels.split(chunk)):
        with run.autocast():
            logits = net(images_part)
        loss = F.cross_entropy(logits.float(), labels_part, reduction="sum") / len(images)
        for summed, gradient in zip(total, torch.autograd.grad(loss, weights, materialize_grads=True)):
            summed += gradient
    return total


def class_gradients(
    net: networks.Network, images: Tensor, labels: Tensor, weights: Sequence[Tensor], classes: int
) -> tuple[Tensor, ...]:
    """Gradients of the mean cross-entropy of each of K equal classes, (K * rows, ...) for each of ``weights``, in one
    vectorised pass; differentiable in the pixels if these require gradients."""
    chosen = {id(weight) for weight in weights}
    matched: dict[str, Tensor] = {name: weight for name, weight in net.named_parameters() if id(weight) in chosen}

    def loss(values: dict[str, Tensor], images: Tensor, labels: Tensor) -> Tensor:
        logits = torch.func.functional_call(net, values, (images,))
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels)

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0), randomness="different")
    gradients = each(matched, images.unflatten(0, (classes, -1)), labels.unflatten(0, (classes, -1)))
    return tuple(gradient.flatten(0, 1) for gradient in gradients.values())


def synthetic_gradients(
    net: networks.Network, images: Tensor, labels: Tensor, weights: Sequence[Tensor], classes: int = 1
) -> tuple[Tensor, ...]:
    """Gradients of the mean cross-entropy for each of ``weights``, differentiable in the pixels.

    ``classes`` is that of :func:`real_gradients`.
    """
    if classes > 1:
        return class_gradients(net, images, labels, weights, classes)
    return torch.autograd.grad(F.cross_entropy(net(images), labels), weights, create_graph=True, materialize_grads=True)


def by_class(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Decoded images and labels, class after class: decode stages order those of several classes differently."""
    order = on_host(labels).argsort(stable=True)
    if torch.equal(order, torch.arange(len(order))):
        return images, labels
    return images[upload_indices(order, images.device)], upload_indices(on_host(labels)[order], images.device)


# -- the network between two matching steps ----------------------------------------------------------------------------


def loop_sizes(ipc: int) -> tuple[int, int]:
    """Matching steps per network, and epochs of training on the set between two of them.

    These are the published table (1: 1 step; 10, 20, 30, 40, 50: as many steps, and 50, 25, 20, 15, 10 epochs), linear
    between its entries, 50 epochs below 10 images per class, 50 steps and 10 epochs above 50. The released program
    exits at any number that is not in its table.
    """
    epochs = np.interp(ipc, (10, 20, 30, 40, 50), (50, 25, 20, 15, 10))
    return min(ipc, 50), round(float(epochs))


def update_statistics(net: networks.Network, task: Task, step: Step) -> None:
    """Updates BatchNorm statistics by one forward pass of real images and freezes them for the matching step.

    As released; the pass changes them by a tenth only, so they remain near their initial values.
    """
    if not networks.uses_batch_statistics(net):
        return
    with torch.no_grad():
        net.train()
        net(task.per_class(STATISTICS_IMAGES, step.key("statistics"))[0])
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def train_on_synthetic(
    net: networks.Network, synthetic: SyntheticSet, config: DC, epochs: int, run: Run, step: Step
) -> None:
    """Trains ``net`` for ``epochs`` by plain SGD on the current set, augmented image by image."""
    images, labels = synthetic.decode()
    source = FixedSource(images.detach(), HardLabels(labels, run.task.num_classes))
    recipe = TrainConfig(
        steps=epochs * math.ceil(len(images) / config.batch_train),
        batch=config.batch_train,
        lr=config.lr_net,
        momentum=0.0,
        weight_decay=0.0,
        lr_milestones=(),
        augment=augment.make_augmentation(config.augment, mirror=run.task.mirror),
    )
    student = Student(net, source, rng.key(run.seed, "inner", step.index))
    train([student], recipe, device=run.device, precision=run.precision)


# -- DC and DSA -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DC(RealBatchOptions):
    """Hyper-parameters of DC, with the defaults of the paper's tables."""

    init: str = "noise"
    """{inherited} The tables of DC start from noise, those of DSA from real images."""
    steps: int | None = None
    """Matching steps in all; by default those of 1,000 networks, as published (the released loop makes one more)."""
    lr_img: float = 0.1
    """Learning rate of the pixels; 0.01 where the network is an MLP."""
    momentum: float = 0.5
    """Momentum of the pixels, kept over all networks."""
    batch_real: int = 256
    """Real images per class and step; fewer where the class is smaller."""
    outer: int | None = None
    """Matching steps per network; by default as many as images per class, at most 50."""
    inner: int | None = None
    """Epochs of training the network on the set between two matching steps; by default 50 up to 10 images per class,
    25 at 20, 20 at 30, 15 at 40, 10 from 50 on, and linear in between."""
    lr_net: float = 0.01
    """Learning rate of plain SGD for the network."""
    batch_train: int = 256
    """Synthetic images per step of that training."""
    augment: str = "none"
    """Siamese DSA operations joined by _, or none; flip is dropped where mirror images change class."""

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = dict.fromkeys(("steps", "batch_real", "outer", "batch_train"), (1, math.inf))
        rates = dict.fromkeys(("lr_img", "lr_net"), (0, sys.float_info.max))
        require_range(self, **counts, **rates, momentum=(0, 1), inner=(0, math.inf))

    def loops(self, ipc: int) -> tuple[int, int]:
        """Matching steps per network and epochs between them, for ``ipc`` images per class."""
        outer, inner = loop_sizes(ipc)
        return self.outer or outer, inner if self.inner is None else self.inner

    def steps_per_network(self, ipc: int) -> int:
        """Matching steps along one network."""
        return self.loops(ipc)[0]

    def total_steps(self, ipc: int) -> int:
        """``steps``, or its default for ``ipc`` images per class."""
        return PUBLISHED_NETWORKS * self.steps_per_network(ipc) if self.steps is None else self.steps


@method(
    "dc", config=DC, paper="Dataset Condensation with Gradient Matching", year=2021, order=2, protocol="dc-plain-v1"
)
def dc(task: Task, config: DC, run: Run) -> SyntheticSet:
    """Matches, class by class, the weight gradients of synthetic and real images while networks train on the set.

    When to use: as the base of its family; DSA is better wherever augmentation helps. Cost: a step is a training step
    on all real batches and a double backward per class; from 2 images per class on, networks are trained on the set
    too. Known failure: matching through BatchNorm networks gives poor sets; use a ConvNet, or lower lr_img.

    Zhao, Mopuri & Bilen, ICLR 2021. The row-wise cosine without vectors, its 1e-6 and the sums over rows, weights and
    classes are the released code's; lr_img depends on them. Every ``outer`` steps the network is a new random one;
    between them it is trained on the current set.
    """
    synthetic = SyntheticSet.create(task, run.ipc, config, seed=run.seed, device=run.device)
    augmentation, (outer, inner) = augment.make_augmentation(config.augment, mirror=task.mirror), config.loops(run.ipc)
    net = run.random_network(0).requires_grad_(True)
    run.register_state("network", net)
    images = ParamGroup(lr=config.lr_img, momentum=config.momentum)
    batches = RealBatches(run, net, config, config.batch_real)
    for step in run.optimise(synthetic, config.total_steps(run.ipc), sharded=True, images=images):
        number, position = divmod(step.index, outer)
        if position == 0:
            run.random_network(number)  # the same module with new weights
        update_statistics(net, run.task, step)
        views = augmentation.draw(step.draws("augment"), task.num_classes, task.shape[1:])  # a row per class: siamese
        weights = matched_weights(net)
        for group in run.stacked_classes(config.batch_real):
            real, truth = batches.draw(step, net, group)
            target = real_gradients(net, augmentation.apply(real, views, truth), truth, weights, run, len(group))
            fake, labels = by_class(*synthetic.decode(group))
            fake = augmentation.apply(fake, views, labels)
            step.accumulate(row_cosine(target, synthetic_gradients(net, fake, labels, weights, len(group))))
        step.update()
        if position < outer - 1:
            train_on_synthetic(net, synthetic, config, inner, run, step)
    return synthetic


@dataclass(frozen=True)
class DSA(DC):
    """Hyper-parameters of DSA, with the defaults of the paper's tables."""

    init: str = "real"
    augment: str = "color_crop_cutout_flip_scale_rotate"
    """Siamese DSA operations joined by _, or none; flip is dropped where mirror images change class."""


@method("dsa", config=DSA, paper="Dataset Condensation with Differentiable Siamese Augmentation", year=2021, order=2)
def dsa(task: Task, config: DSA, run: Run) -> SyntheticSet:
    """DC with differentiable Siamese augmentation: the same operation and parameters for real and synthetic images.

    When to use: the gradient-matching baseline to compare with. Cost: as DC. Known failure: as DC; on MNIST and SVHN at
    1 image per class the published DC is better.

    Zhao & Bilen, ICML 2021. The loop is DC's, from real images. Networks are trained on the set with the same
    operations, one drawn per batch, its parameters per image. The released program trains and matches without
    augmentation if no strategy is named.
    """
    return dc(task, config, run)


# -- DCC and DSAC -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DCC(DC):
    """Hyper-parameters of DCC, with the released defaults."""

    init: str = "real"
    """{inherited} Always real in the released code."""
    warm_share: float = 0.25
    """Share of the run's networks, the first ones, that match class by class as DC does: 250 of 1,000 as released."""
    warm_steps: int = 10
    """Steps of each of these networks, the first ones, that match class by class."""

    steps_change_schedule: ClassVar[bool] = True
    dry_run_settings: ClassVar[Mapping[str, Any]] = {"warm_share": 0.0}  # most steps do not match class by class

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self, warm_share=(0, 1), warm_steps=(0, math.inf))

    def loops(self, ipc: int) -> tuple[int, int]:
        """As DC's, but 10 matching steps and 5 epochs at one image per class."""
        outer, inner = (10, 5) if ipc == 1 else loop_sizes(ipc)
        return self.outer or outer, inner if self.inner is None else self.inner


@method(
    "dcc", config=DCC, paper="Dataset Condensation with Contrastive Signals", year=2022, order=2, protocol="dc-plain-v1"
)
def dcc(task: Task, config: DCC, run: Run) -> SyntheticSet:
    """DC on gradients averaged over all classes, so that only the signals that distinguish classes remain.

    When to use: on fine-grained classes, where matching class by class can be worse than random images. Cost: a step is
    one training step on all real batches and one double backward; in the first quarter of the networks, a double
    backward per class. Known failure: as DC.

    Lee, Chun, Jung, Yun & Yoon, ICML 2022. As released, the first ``warm_steps`` steps of the first quarter of the
    networks match class by class; both losses share one momentum. The loss couples the classes, so they are not sharded
    over ranks.
    """
    synthetic = SyntheticSet.create(task, run.ipc, config, seed=run.seed, device=run.device)
    augmentation, (outer, inner) = augment.make_augmentation(config.augment, mirror=task.mirror), config.loops(run.ipc)
    net = run.random_network(0).requires_grad_(True)
    run.register_state("network", net)
    images, steps = ParamGroup(lr=config.lr_img, momentum=config.momentum), config.total_steps(run.ipc)
    batches = RealBatches(run, net, config, config.batch_real)
    for step in run.optimise(synthetic, steps, sharded=False, images=images):
        number, position = divmod(step.index, outer)
        if position == 0:
            run.random_network(number)  # the same module with new weights
        update_statistics(net, run.task, step)
        views = augmentation.draw(step.draws("augment"), task.num_classes, task.shape[1:])  # a row per class: siamese
        weights = matched_weights(net)
        make_class_batches = number < config.warm_share * math.ceil(steps / outer) and position < config.warm_steps
        targets = []
        for c in range(task.num_classes):
            real, truth = batches.draw(step, net, [c])
            targets.append(real_gradients(net, augmentation.apply(real, views, truth), truth, weights, run))
            if make_class_batches:
                fake, labels = synthetic.decode([c])
                gradients = synthetic_gradients(net, augmentation.apply(fake, views, labels), labels, weights)
                step.accumulate(row_cosine(targets.pop(), gradients))
        if not make_class_batches:
            fake, labels = synthetic.decode()
            gradients = synthetic_gradients(net, augmentation.apply(fake, views, labels), labels, weights)
            mean = [torch.stack(class_gradients).mean(0) for class_gradients in zip(*targets)]
            step.accumulate(row_cosine(mean, gradients))
        step.update()
        if position < outer - 1:
            train_on_synthetic(net, synthetic, config, inner, run, step)
    return synthetic


@dataclass(frozen=True)
class DSAC(DCC):
    """Hyper-parameters of DSAC, with the released defaults."""

    augment: str = "color_crop_cutout_flip_scale_rotate"
    """Siamese DSA operations joined by _, or none; flip is dropped where mirror images change class."""


@method("dsac", config=DSAC, paper="Dataset Condensation with Contrastive Signals", year=2022, order=2)
def dsac(task: Task, config: DSAC, run: Run) -> SyntheticSet:
    """DCC with differentiable Siamese augmentation.

    When to use: instead of DSA, for fewer double backwards per step. Cost: as DCC. Known failure: as DC.

    Lee, Chun, Jung, Yun & Yoon, ICML 2022.
    """
    return dcc(task, config, run)


# -- IDC --------------------------------------------------------------------------------------------------------------


def squared_error(real: Iterable[Tensor], fake: Iterable[Tensor]) -> Tensor:
    """IDC's distance for colour images: squared differences, summed over all entries of all weights."""
    return torch.stack([(a - b).square().sum() for a, b in zip(real, fake, strict=True)]).sum()


def absolute_error(real: Iterable[Tensor], fake: Iterable[Tensor]) -> Tensor:
    """IDC's distance for grey and for large images: absolute differences, summed likewise."""
    return torch.stack([(a - b).abs().sum() for a, b in zip(real, fake, strict=True)]).sum()


DISTANCES: dict[str, Callable[[Iterable[Tensor], Iterable[Tensor]], Tensor]] = {
    "mse": squared_error,
    "l1": absolute_error,
    "cos": row_cosine,
}


@dataclass(frozen=True)
class IDC(RealBatchOptions, SnapshotOptions):
    """Hyper-parameters of IDC, with the released CIFAR settings."""

    init: str = "collage"
    factor: int = 2
    """Multi-formation: factor x factor training images in each stored one; 1 is the paper's IDC-I."""
    steps: int = 200_000
    """Sweeps over all classes; the authors say that far fewer give most of the accuracy."""
    metric: str = "mse"
    """Distance of the gradients: mse (colour images), l1 (MNIST, Fashion-MNIST, large images) or cos (DC's)."""
    lr_img: float | None = None
    """Learning rate of the pixels. By default 0.005 * ipc / 10 for mse; 0.0001 on grey and 0.003 on colour images
    times ipc / 10 for l1; 0.1 for cos; times the image's area over that of 32x32 (28x28 if grey, 224x224 for l1 in
    colour)."""
    momentum: float = 0.5
    """Momentum of the pixels within a sweep, in which classes are stepped one after the other: as released, a gradient
    counts 1 / (1 - momentum) in all."""
    batch_real: int = 64
    """Real images per class and step."""
    batch_syn_max: int = 128
    """Maximum number of decoded images per class and step; of more, a random subset is drawn."""
    augment: str = "color_crop_cutout"
    """Siamese operations joined by _; all but crop, scale and rotate, one of which is drawn, act in every step."""
    snapshots: int = 100
    """Recorded states of each network, the first before any training; at width 128 0.65 MB each on disk."""
    net_steps: int = 32
    """Training steps of a network between two snapshots: 2,000 images in batches of 64."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_one_of(self, metric=DISTANCES)
        counts = dict.fromkeys(("steps", "batch_real", "batch_syn_max", "net_steps"), (1, math.inf))
        require_range(self, **counts, lr_img=(0, sys.float_info.max), momentum=(0, 0.99), snapshots=(2, math.inf))
        self.check_snapshot_options()

    def rate(self, ipc: int, shape: tuple[int, int, int]) -> float:
        """Learning rate of the pixels for ``ipc`` images of ``shape`` (C, H, W) per class."""
        if self.lr_img is not None:
            return self.lr_img
        channels, height, width = shape
        base, size = {"mse": (5e-3, 32), "l1": (3e-3, 224), "cos": (0.1, 32)}[self.metric]
        if channels == 1:
            base, size = (1e-4 if self.metric == "l1" else base), 28
        return base * ipc / 10 * height * width / size**2


@method(
    "idc",
    config=IDC,
    paper="Dataset Condensation via Efficient Synthetic-Data Parameterization",
    year=2022,
    order=2,
    protocol="idc-v1",
    pretrains="snapshots",
)
def idc(task: Task, config: IDC, run: Run) -> SyntheticSet:
    """Matches gradients of convolutions along networks trained on real data; each stored image holds several.

    When to use: for the accuracy of few stored images, if a double backward is affordable; DANCE costs less. Cost:
    networks are trained on real data first (cached, and shared by runs), then a step is a backward on 64 real images
    and a double backward per class. Known failure: multi-formation blurs details (the published Fashion-MNIST result
    at 50 images per class is below that without).

    Kim et al., ICML 2022. The released program trains a new network beside each step; this training does not use the
    set, so snapshots of ``networks`` trainings are recorded once and used in their order (fewer than the published
    2,000 trainings). It updates class by class with one momentum over all; as gradients of classes are independent, one
    step at lr / (1 - momentum) is the same except for a share momentum^classes, which the release applies a sweep
    later. It clamps pixels every 100 steps, here after each.
    """
    synthetic = SyntheticSet.create(task, run.ipc, config, seed=run.seed, device=run.device, space="pixel")
    distance, augmentation = (
        DISTANCES[config.metric],
        augment.make_augmentation(config.augment, variant="idc", mirror=task.mirror),
    )
    net = run.random_network(0).requires_grad_(True)
    weights = [parameter for parameter in net.parameters() if parameter.dim() == 4]
    if not weights:
        raise CondenseError(
            f"--network {networks.network_name(run.network)}: idc matches convolutions, and it has none"
        )
    snapshots = load_or_train_snapshots(
        run, config.recipe(task), count=config.networks, units=config.snapshots - 1, unit_steps=config.net_steps
    )
    images = ParamGroup(lr=config.rate(run.ipc, task.shape) / (1 - config.momentum), clamp=(0.0, 1.0))
    batches = RealBatches(run, net, config, config.batch_real)
    for step in run.optimise(synthetic, config.steps, sharded=True, images=images):
        training, position = divmod(step.index, snapshots.snapshots)
        number = int(rng.Draws(run.seed, "training", training).integers(snapshots.networks, 1))
        snapshots.load(net, number, position)
        views = augmentation.draw(step.draws("augment"), task.num_classes, task.shape[1:])  # a row per class: siamese
        for group in run.stacked_classes(config.batch_real):
            real, truth = batches.draw(step, net, group)
            target = real_gradients(net, augmentation.apply(real, views, truth), truth, weights, run, len(group))
            fake, labels = by_class(*synthetic.decode_sample(group, config.batch_syn_max, step.key("matched")))
            fake = augmentation.apply(fake, views, labels)
            step.accumulate(distance(target, synthetic_gradients(net, fake, labels, weights, len(group))))
        step.update()
    return synthetic
