"""Distribution matching: make the features of the synthetic images agree with those of the real ones."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from condense import networks
from condense.augment import dsa
from condense.config import require
from condense.optimizer import Group
from condense.registry import method
from condense.run import Run
from condense.synthetic import SyntheticOptions, SyntheticSet
from condense.tasks import Task


def class_means(features: Tensor, labels: Tensor, classes: list[int]) -> Tensor:
    """Mean feature of each class.

    Args:
        features: (N, D).
        labels: int64 (N,); every one is in ``classes``.
        classes: the classes whose means are wanted, in order.

    Returns:
        float32 (len(classes), D).
    """
    members = (labels.unsqueeze(0) == torch.tensor(classes, device=labels.device).unsqueeze(1)).float()
    return (members / members.sum(1, keepdim=True)) @ features.float()


def distribution_loss(real_means: Tensor, synthetic_means: Tensor) -> Tensor:
    """DM's loss: squared distance of class-mean features (C, D), summed over features and classes, as released."""
    return (real_means - synthetic_means).square().sum()


@torch.no_grad()
def real_class_means(
    net: networks.Network, images: Tensor, labels: Tensor, classes: list[int], run: Run, chunk: int | None
) -> Tensor:
    """Class means of real features (len(classes), D) in the run's precision, ``chunk`` images at a time (None: at
    once)."""
    with run.fast():
        parts = [net.embed(part).float() for part in images.split(chunk or len(images))]
    return class_means(torch.cat(parts), labels, classes)


@dataclass(frozen=True)
class DM(SyntheticOptions):
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
        require(self, steps=(1, math.inf), lr_img=(0, sys.float_info.max), momentum=(0, 1), batch_real=(1, math.inf))


@method("dm", config=DM, paper="Dataset Condensation with Distribution Matching", year=2023)
def dm(task: Task, config: DM, run: Run) -> SyntheticSet:
    """Matches the class-mean features of synthetic and real images under thousands of random networks.

    When to use: the cheapest learned baseline; first order, no network is trained, cost grows linearly with classes.
    Known failure: matching through deep BatchNorm networks gives poor sets; lower lr_img to 0.1 there.

    Zhao & Bilen, WACV 2023. Paper and released code agree up to constants; the released sums are used because lr_img
    depends on them. With BatchNorm networks the statistics are taken over all classes, real and synthetic apart, as
    released; such a network couples the classes, so the step is neither chunked nor sharded over ranks.
    """
    synthetic = SyntheticSet.create(task, run.ipc, config, seed=run.seed, device=run.device)
    augment = dsa(config.augment, variant=config.augment_variant, mirror=task.mirror)
    images = Group(lr=config.lr_img, momentum=config.momentum)
    coupled = networks.uses_batch_statistics(run.random_network(0))
    for step in run.optimise(synthetic, config.steps, sharded=not coupled, images=images):
        net = step.network()
        views = augment.draw(step.draws("augment"), task.num_classes, task.shape[1:])  # one row per class: siamese
        for classes in [list(range(task.num_classes))] if coupled else run.class_chunks(config.batch_real):
            real, real_labels = run.task.per_class(config.batch_real, step.key("real"), classes)
            real = augment.apply(real, views, real_labels)
            target = real_class_means(net, real, real_labels, classes, run, None if coupled else run.forward_chunk())
            fake, fake_labels = synthetic.decode(classes)
            fake = augment.apply(fake, views, fake_labels)
            step.accumulate(distribution_loss(target, class_means(net.embed(fake), fake_labels, classes)))
        step.update()
    return synthetic
