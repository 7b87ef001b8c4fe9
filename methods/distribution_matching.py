"""Distribution matching: the features of the synthetic images are fitted to those of the real images.

DM matches under random networks, IDM and DANCE under networks trained on the real data.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from condense import networks, rng
from condense.augment import make_augmentation
from condense.config import require_range
from condense.data import Task
from condense.device import upload
from condense.engine import ParamGroup, RealBatches, RealBatchOptions, Run, Step
from condense.pretraining import SnapshotOptions, load_or_train_snapshots
from condense.registry import method
from condense.sets import SyntheticSet


def class_means(features: Tensor, labels: Tensor, classes: list[int]) -> Tensor:
    """Mean feature of each class.

    Args:
        features: (N, D).
        labels: int64 (N,); every one is in ``classes``.
        classes: the classes to average, in order.

    Returns:
        float32 (float64 for such features) (len(classes), D).
    """
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    members = (labels.unsqueeze(0) == upload(torch.tensor(classes), labels.device).unsqueeze(1)).to(features.dtype)
    with torch.autocast(features.device.type, enabled=False):  # bf16 would round weights and means
        return (members / members.sum(1, keepdim=True)) @ features


def distribution_loss(real_means: Tensor, synthetic_means: Tensor) -> Tensor:
    """DM's loss: the squared distance of class-mean features (C, D), summed over features and classes, as released."""
    return (real_means - synthetic_means).square().sum()


@torch.no_grad()
def real_class_means(
    net: networks.Network, images: Tensor, labels: Tensor, classes: list[int], run: Run, chunk: int | None
) -> Tensor:
    """Class means of real features (len(classes), D) in the run's precision, ``chunk`` images at a time (None: all)."""
    with run.autocast():
        parts = [net.embed(part).float() for part in images.split(chunk or len(images))]
    return class_means(torch.cat(parts), labels, classes)


@dataclass(frozen=True)
class DM(RealBatchOptions):
    """Hyper-parameters of DM, with the defaults of the paper's CIFAR-10 table."""

    steps: int = 20000
    """Outer steps, each with a new random network (the released loop makes one more)."""
    lr_img: float = 1.0
    """Learning rate of the pixels; 10 from 100 images per class on, because a class mean's gradient falls with
    1/ipc."""
    momentum: float = 0.5
    """Momentum of the pixels."""
    batch_real: int = 256
    """Real images per class and step; fewer where the class is smaller."""
    augment: str = "color_crop_cutout_flip_scale_rotate"
    """Siamese DSA operations joined by _, or none; flip is dropped where mirror images change class."""
    augment_variant: str = "dsa"
    """dsa (one operation a step), flip-always (FYI's released forks) or idc (colour, flip and cutout always)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(
            self, steps=(1, math.inf), lr_img=(0, sys.float_info.max), momentum=(0, 1), batch_real=(1, math.inf)
        )


@method("dm", config=DM, paper="Dataset Condensation with Distribution Matching", year=2023)
def dm(task: Task, config: DM, run: Run) -> SyntheticSet:
    """Matches the class-mean features of synthetic and real images under random networks.

    When to use: the cheapest learned baseline. Cost: first order, no network is trained; it grows linearly with the
    number of classes. Known failure: matching through deep BatchNorm networks gives poor sets; lower lr_img to 0.1.

    Zhao & Bilen, WACV 2023. Paper and released code agree up to constants; the released sums are used because lr_img
    depends on them. BatchNorm statistics are those of all classes together, real and synthetic images apart, as
    released; such a network couples the classes, so the step is neither chunked nor sharded over ranks.
    """
    networks.require_embedding(run.random_network(0), run.network, "dm")
    synthetic = SyntheticSet.create(task, run.ipc, config, seed=run.seed, device=run.device)
    augment = make_augmentation(config.augment, variant=config.augment_variant, mirror=task.mirror)
    images = ParamGroup(lr=config.lr_img, momentum=config.momentum)
    net = run.random_network(0)
    coupled = networks.uses_batch_statistics(net)
    batches = RealBatches(run, net, config, config.batch_real)
    for step in run.optimise(synthetic, config.steps, sharded=not coupled, images=images):
        net = step.network()
        views = augment.draw(step.draws("augment"), task.num_classes, task.shape[1:])  # one row per class: siamese
        for classes in [list(range(task.num_classes))] if coupled else run.class_chunks(config.batch_real):
            real, real_labels = batches.draw(step, net, classes)
            real = augment.apply(real, views, real_labels)
            target = real_class_means(
                net, real, real_labels, classes, run, None if coupled else run.forward_chunk_size()
            )
            fake, fake_labels = synthetic.decode(classes)
            fake = augment.apply(fake, views, fake_labels)
            step.accumulate(distribution_loss(target, class_means(net.embed(fake), fake_labels, classes)))
        step.update()
    return synthetic


# -- under trained networks -------------------------------------------------------------------------------------------


def class_cross_entropy(logits: Tensor, labels: Tensor, classes: list[int]) -> Tensor:
    """Mean cross-entropy of each class, summed over classes; the logits (N, C) hold equally many rows of each class."""
    return F.cross_entropy(logits, labels, reduction="sum") * len(classes) / len(labels)


def class_groups(net: networks.Network, run: Run, batch_real: int) -> Iterator[list[int]]:
    """This rank's classes in groups that fit in memory; one by one if batch statistics would couple them."""
    if net.training and networks.uses_batch_statistics(net):
        return ([c] for c in run.classes)
    return run.class_chunks(batch_real)


@dataclass(frozen=True)
class IDM(RealBatchOptions, SnapshotOptions):
    """Hyper-parameters of IDM, with the released CIFAR-10 settings."""

    init: str = "collage"
    factor: int = 2
    """Partition and expansion: factor x factor training images in each stored one."""
    steps: int = 20000
    """Sweeps over all classes, each under another recorded network."""
    lr_img: float = 0.2
    """Learning rate of the pixels."""
    momentum: float = 0.5
    """Momentum of the pixels within a sweep, in which classes are stepped one after the other: as released, a gradient
    counts 1 / (1 - momentum) in all."""
    batch_real: int = 256
    """Real images per class and step; released: the whole class at 1 image per class on CIFAR."""
    ce_weight: float = 0.5
    """Weight of the cross-entropy, times the network's accuracy in per cent."""
    augment: str = "color_crop_cutout_flip_scale_rotate"
    """Siamese DSA operations joined by _, or none; flip is dropped where mirror images change class."""
    snapshots: int = 31
    """Recorded states of each network, the first before any training."""
    net_steps: int = 20
    """Training steps of a network between two snapshots; the released queue ends at some 600 steps a network."""
    batch_net: int = 256
    """Real images per step of their training."""
    augment_net: str = "none"
    """Operations joined by _ of their training, drawn per image."""
    cutmix: float = 0.0
    """Probability of CutMix in a step of their training."""
    queue: bool = False
    """Draw networks by age and weigh their cross-entropy as the released queue does (:func:`simulate_queue`), not
    uniformly over the snapshots; the published numbers were reached with it."""
    queue_interval: int = 30
    """Steps between two networks that join the queue."""
    queue_turn: int = 10
    """Training steps of a network of the queue in one turn."""

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = dict.fromkeys(("steps", "batch_real", "net_steps", "queue_interval", "queue_turn"), (1, math.inf))
        factors = {"lr_img": (0, sys.float_info.max), "ce_weight": (0, math.inf)}
        require_range(self, **counts, **factors, momentum=(0, 0.99), snapshots=(2, math.inf))
        self.check_snapshot_options()


QUEUE_START, QUEUE_SIZE, QUEUE_METER_STEPS = 3, 100, 100
"""Networks with which the released queue begins, networks that it holds, and steps between two of its evaluations."""


def simulate_queue(steps: int, interval: int, draws: rng.Draws) -> list[tuple[int, int, bool]]:
    """The network of the released queue that each step matches under.

    Every ``interval`` steps an untrained network joins; of more than ``QUEUE_SIZE``, the oldest leaves. A step matches
    under one random network, then trains two others for a turn. Each evaluation clears the accuracies, so that a
    network has no weight until its next turn: in some 0.57 of the steps the cross-entropy acts.

    Returns:
        For each step the number of the network in order of joining, its turns so far, and whether it has a weight.
    """
    chosen, turns, last_turn, first = [], [0] * QUEUE_START, [-1] * QUEUE_START, 0
    for step, (matched, one, other) in enumerate(draws.uniform((steps, 3)).tolist()):
        if step and step % interval == 0:
            turns.append(0)
            last_turn.append(-1)
            first = max(first, len(turns) - QUEUE_SIZE)
        size = len(turns) - first
        number = first + int(matched * size)
        cleared = step - step % QUEUE_METER_STEPS
        chosen.append((number, turns[number], last_turn[number] >= cleared))
        a, b = int(one * size), int(other * (size - 1))
        for trained in (first + a, first + b + (b >= a)):
            turns[trained] += 1
            last_turn[trained] = step
    return chosen


ACCURACY_IMAGES = 256
"""Real images that IDM measures a network's training accuracy on in each step: one batch of the released training."""


@torch.no_grad()
def training_accuracy(net: networks.Network, run: Run, step: Step) -> Tensor:
    """Accuracy, 0 to 1, of ``net`` on random real training images without augmentation."""
    ids = step.draws("accuracy").integers(len(run.task.train), ACCURACY_IMAGES)
    labels = upload(torch.from_numpy(run.task.train.labels[ids.numpy()]), run.device)
    with run.autocast():
        features = net.embed(run.task.batch(ids))
    return (net.classify(features.float()).argmax(1) == labels).float().mean()


@method(
    "idm",
    config=IDM,
    paper="Improved Distribution Matching for Dataset Condensation",
    year=2023,
    pretrains="snapshots",
)
def idm(task: Task, config: IDM, run: Run) -> SyntheticSet:
    """Matches class-mean features under networks at all stages of training, plus their cross-entropy on the images.

    When to use: as DM, for more accuracy at the same stored images. Cost: networks are trained on real data first
    (cached, and shared by runs), then a step as DM's. Known failure: the published numbers need the settings of each
    dataset (``condense ls recipes``); with DM's settings it gives DM's accuracy.

    Zhao, Li, Qin & Yu, CVPR 2023. The released program trains a queue of networks beside the steps; their training does
    not use the set, so states of ``networks`` trainings are recorded once and drawn uniformly, or with ``queue=true``
    as old as in the release, up to the last snapshot. A network's accuracy, the weight of its cross-entropy, is
    measured on a real batch in each step, and is 0 before any training. The loss is the released sum over classes;
    IDC's documentation explains the learning rate of a sweep. Initial images are shrunk by nearest neighbour, in the
    release bilinearly.
    """
    networks.require_embedding(run.random_network(0), run.network, "idm")
    synthetic = SyntheticSet.create(task, run.ipc, config, seed=run.seed, device=run.device)
    augment = make_augmentation(config.augment, mirror=task.mirror)
    snapshots = load_or_train_snapshots(
        run, config.recipe(task), count=config.networks, units=config.snapshots - 1, unit_steps=config.net_steps
    )
    net = run.random_network(0).eval()
    queue = simulate_queue(config.steps, config.queue_interval, rng.Draws(run.seed, "queue")) if config.queue else []
    images = ParamGroup(lr=config.lr_img / (1 - config.momentum))
    batches = RealBatches(run, net, config, config.batch_real)
    for step in run.optimise(synthetic, config.steps, sharded=True, images=images):
        if queue:
            number, turns, has_weight = queue[step.index]
            age = min(round(turns * config.queue_turn / config.net_steps), snapshots.snapshots - 1)
        else:
            draws = step.draws("snapshot")
            number, age = (int(draws.integers(count, 1)) for count in (snapshots.networks, snapshots.snapshots))
            has_weight = age > 0
        snapshots.load(net, number % snapshots.networks, age)
        weight = config.ce_weight * 100 * training_accuracy(net, run, step) if has_weight else 0.0
        views = augment.draw(step.draws("augment"), task.num_classes, task.shape[1:])  # one row per class: siamese
        for classes in class_groups(net, run, config.batch_real):
            real, truth = batches.draw(step, net, classes)
            real = augment.apply(real, views, truth)
            target = real_class_means(net, real, truth, classes, run, run.forward_chunk_size())
            fake, labels = synthetic.decode(classes)
            features = net.embed(augment.apply(fake, views, labels))
            loss = distribution_loss(target, class_means(features, labels, classes))
            step.accumulate(loss + weight * class_cross_entropy(net.classify(features), labels, classes))
        step.update()
    return synthetic


@dataclass(frozen=True)
class DANCE(RealBatchOptions, SnapshotOptions):
    """Hyper-parameters of DANCE, with the released CIFAR settings."""

    init: str = "collage"
    factor: int = 2
    """Multi-formation: factor x factor training images in each stored one."""
    steps: int = 10000
    """Iterations, each a sweep of matching and one of calibration over all classes."""
    lr_img: float | None = None
    """Learning rate of the pixels; by default 0.01 * ipc (0.1 * ipc for the published ImageNet subsets)."""
    momentum: float = 0.5
    """Momentum of the pixels within a sweep, in which classes are stepped one after the other: as released, a gradient
    counts 1 / (1 - momentum) in all."""
    batch_real: int = 128
    """Real images per class and step."""
    batch_syn_max: int = 200
    """Maximum number of decoded images per class and step; of more, a random subset is drawn."""
    augment: str = "color_crop_cutout"
    """Siamese operations joined by _; all but crop, scale and rotate, one of which is drawn, act in every step."""
    networks: int = 5
    """Experts; kept below the cache directory and shared by runs with the same seed."""
    expert_epochs: int = 60
    """Epochs of an expert's training on the real data (80 for the published ImageNet subsets)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = dict.fromkeys(("steps", "batch_real", "batch_syn_max", "expert_epochs"), (1, math.inf))
        require_range(self, **counts, lr_img=(0, sys.float_info.max), momentum=(0, 0.99))
        self.check_snapshot_options()


@method(
    "dance",
    config=DANCE,
    paper="Dual-view Distribution Alignment for Dataset Condensation",
    year=2024,
    protocol="dance-v1",
    pretrains="snapshots",
)
def dance(task: Task, config: DANCE, run: Run) -> SyntheticSet:
    """Matches class-mean features under networks between untrained and trained weights, then calibrates by an expert.

    When to use: the best accuracy for its cost in this family; first order, no network is trained in the loop. Cost:
    five experts are trained on the real data first (cached, and shared by runs), then a step is about two of DM's.
    Known failure: with few epochs of the experts, as under a short time limit, the calibration has little effect.

    Zhang et al., IJCAI 2024. Each step takes one expert and a random point on the line between its weights before and
    after training; buffers are those after it. The calibration is the expert's cross-entropy on the images. Experts are
    trained as in the released pre-training: IDC's training with two milestones. IDC's documentation explains the
    learning rate of a sweep; pixels are clamped after each sweep.
    """
    networks.require_embedding(run.random_network(0), run.network, "dance")
    synthetic = SyntheticSet.create(task, run.ipc, config, seed=run.seed, device=run.device, space="pixel")
    augment = make_augmentation(config.augment, variant="idc", mirror=task.mirror)
    epoch = math.ceil(len(run.task.train) / config.batch_net)
    experts = load_or_train_snapshots(
        run,
        config.recipe(task, lr_milestones=(2 / 3, 5 / 6)),
        count=config.networks,
        units=config.expert_epochs,
        unit_steps=epoch,
        endpoints_only=True,
    )
    middle = run.random_network(0)
    expert, parameters = copy.deepcopy(middle), dict(middle.named_parameters())
    coupled = networks.uses_batch_statistics(middle)
    rate = 0.01 * run.ipc if config.lr_img is None else config.lr_img
    images = ParamGroup(lr=rate / (1 - config.momentum), clamp=(0.0, 1.0))
    batches = RealBatches(run, middle, config, config.batch_real)
    for step in run.optimise(synthetic, config.steps, sharded=True, images=images):
        draws = step.draws("expert")
        number, share = int(draws.integers(experts.networks, 1)), float(draws.uniform(1))
        before, after = experts.weights(number, 0), experts.weights(number, -1)
        expert.load_state_dict(after)
        middle.load_state_dict(
            {
                name: torch.lerp(value, before[name], share) if name in parameters else value
                for name, value in after.items()
            }
        )
        views = augment.draw(step.draws("augment"), task.num_classes, task.shape[1:])  # one row per class: siamese
        for classes in class_groups(middle, run, config.batch_real):
            real, truth = batches.draw(step, middle, classes)
            real = augment.apply(real, views, truth)
            target = real_class_means(middle, real, truth, classes, run, None if coupled else run.forward_chunk_size())
            fake, labels = synthetic.decode_sample(classes, config.batch_syn_max, step.key("matched"))
            features = middle.embed(augment.apply(fake, views, labels))
            step.accumulate(distribution_loss(target, class_means(features, labels, classes)))
        step.update()
        views = augment.draw(step.draws("calibrate"), task.num_classes, task.shape[1:])
        for classes in class_groups(expert, run, config.batch_real):
            fake, labels = synthetic.decode_sample(classes, config.batch_syn_max, step.key("calibrated"))
            step.accumulate(class_cross_entropy(expert(augment.apply(fake, views, labels)), labels, classes))
        step.update()
    return synthetic
