"""LPLD and LPQLD: recovery with one class per batch, so that the images of a class differ and few labels suffice.

A batch of SRe2L has one image of each of many classes, so the images of a class never affect each other and come out
alike. Here a batch has all images of one class, which are matched to the moments of that class. Of the labels a pool is
stored (:class:`condense.labels.PoolLabels`), and teachers compute nothing else.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from condense import rng
from condense.augment import CropViews
from condense.config import require_one_of
from condense.data import Task
from condense.engine import Run
from condense.errors import CondenseError
from condense.labels import PruningOptions, compute_logits
from condense.methods.curriculum_synthesis.bn_matching import Moments, make_matcher
from condense.methods.curriculum_synthesis.initial import create_initial_set
from condense.methods.curriculum_synthesis.recovery import (
    TEACHER_CHUNK_PIXELS,
    Batch,
    class_loss,
    guide_all,
    recovery_passes,
)
from condense.methods.curriculum_synthesis.relabelling import finish_set, get_teachers
from condense.methods.curriculum_synthesis.settings import RELABEL_KINDS, RecoveryOptions
from condense.networks import Network
from condense.registry import method
from condense.sets import SyntheticSet
from condense.tracking import Progress


@dataclass(frozen=True)
class LPLD(PruningOptions, RecoveryOptions):
    """Hyper-parameters of LPLD; the defaults are those of Tiny-ImageNet."""

    steps: int = 4000
    lr_img: float = 0.1
    """{inherited} 0.25 for ImageNet-1K."""
    bn_weight: float = 0.05
    """{inherited} 0.01 for ImageNet-1K."""
    batch_classes: int = 1
    """Always 1: a batch has all images of one class."""
    at_once: int | None = None
    """Classes whose images are optimised together; all by default. Fewer need less memory; with a time limit the images
    of the last classes then stay as initialised."""
    labels: str = "pool"
    """{inherited} Also pool: stored logits of a few of the label_epochs, from which a student's epochs are drawn."""
    statistics: str = "exact"
    """Moments of a class: exact (of all its images) or moving (as released: averages of single crops, momentum 0.1,
    so those of its last images, whose variances are about half)."""
    keep: float = 0.025
    """Share of the labelled epochs that is stored for each class."""

    label_kinds: ClassVar[tuple[str, ...]] = (*RELABEL_KINDS, "pool")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_pruning()
        require_one_of(self, statistics=("exact", "moving"))
        if self.batch_classes != 1:
            raise CondenseError(
                f"batch_classes={self.batch_classes}: batches have the images of one class; leave it at 1, or use sre2l"
            )


def class_moments(run: Run, net: Network) -> list[Moments]:
    """Moments of the inputs of every BatchNorm of a teacher over the real images of each class: means and biased
    variances over images and pixels, two tensors (classes, C) for each BatchNorm in the order of the network's modules.

    One pass over the training images without augmentation, in eval mode; sums over images are in float64. Ranks share
    the classes.
    """
    task, norms = run.task, [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    size = run.forward_chunk_size() or max(1, TEACHER_CHUNK_PIXELS // math.prod(task.shape[1:]))
    parts = [(c, ids) for c in run.classes for ids in torch.from_numpy(task.class_ids(c)).split(size)]
    sums = [
        torch.zeros(task.num_classes, 3, norm.num_features, dtype=torch.float64, device=run.device) for norm in norms
    ]
    progress = Progress("class moments", len(parts), 0, run.quiet or not run.ranks.is_main_process)
    with run.stage("preparation", len(parts)) as stage:
        for number, (c, ids) in enumerate(parts[: stage.units]):
            with _watched_inputs(norms, [functools.partial(_add_sums, class_sums[c]) for class_sums in sums]):
                compute_logits(net, task.batch(ids), batch_size=len(ids))
            progress.update(number + 1)
    progress.close()
    moments = []
    for norm, class_sums in zip(norms, sums):
        run.ranks.all_reduce_sum(class_sums)
        assert norm.running_mean is not None
        gap, square = (class_sums[:, 1:] / class_sums[:, :1].clamp(min=1)).unbind(1)
        mean, variance = norm.running_mean + gap, square - gap.square()
        moments.append((mean.to(norm.running_mean), variance.to(norm.running_mean)))
    return moments


MOVING_MOMENTUM, MOVING_IMAGES = 0.1, 256
"""Momentum of the released averages, and the images of a class that count: earlier ones have less than 2e-12 weight."""


def moving_class_moments(run: Run, net: Network) -> list[Moments]:
    """As :func:`class_moments`, but as released: moving averages over the images of a class one by one.

    Each image is one random crop with a flip. The averages start at mean 0 and variance 1.
    """
    task, norms = run.task, [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    moments = [torch.zeros(2, task.num_classes, norm.num_features, device=run.device) for norm in norms]
    views = CropViews(flip=task.mirror)
    with run.stage("preparation", len(run.classes)) as stage:
        for done, c in enumerate(run.classes[: stage.units], 1):
            draws = rng.Draws(run.seed, "class moments", c)
            ids = torch.from_numpy(task.class_ids(c))
            images = task.batch(ids[draws.sample(len(ids), MOVING_IMAGES)])
            crops = views.draw(draws, len(images), task.shape[1:]).to(images.device)
            decay = (1 - MOVING_MOMENTUM) ** torch.arange(len(images), -1, -1, device=run.device)
            found: list[Moments] = []
            with _watched_inputs(norms, [functools.partial(_append_image_moments, found)] * len(norms)):
                compute_logits(net, views.apply(images, crops), batch_size=len(images))
            for total, (mean, variance) in zip(moments, found):
                total[0, c] = MOVING_MOMENTUM * decay[1:] @ mean
                total[1, c] = decay[0] + MOVING_MOMENTUM * decay[1:] @ variance
            stage.report(done)
    for total in moments:
        run.ranks.all_reduce_sum(total)
    return [(mean, variance) for mean, variance in moments]


@contextmanager
def _watched_inputs(
    norms: Sequence[nn.Module], notes: Sequence[Callable[[Any, tuple[Tensor, ...]], None]]
) -> Iterator[None]:
    """Calls ``note(norm, inputs)`` before each forward pass of every norm, with the note at the same index."""
    handles = [norm.register_forward_pre_hook(note) for norm, note in zip(norms, notes)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _append_image_moments(found: list[Moments], norm: Any, inputs: tuple[Tensor, ...]) -> None:
    """Appends mean and unbiased variance over the pixels of each image, (N, C) each."""
    variance, mean = torch.var_mean(inputs[0].float().flatten(2), dim=2)
    found.append((mean, variance))


def _add_sums(total: Tensor, norm: Any, inputs: tuple[Tensor, ...]) -> None:
    """Adds to ``total``, (3, C): the number of values, the sum of their differences from the running mean, and the sum
    of squares of these (the squares of large values would cancel)."""
    x = inputs[0].to(torch.promote_types(inputs[0].dtype, torch.float32))
    gap = (x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)) - norm.running_mean[:, None]
    total[0] += gap.shape[0] * gap.shape[2]
    total[1] += gap.sum(2).double().sum(0)
    total[2] += gap.square().sum(2).double().sum(0)


def make_single_class_batches(run: Run) -> list[Batch]:
    """Batches of a set of ``run.ipc`` images per class, sorted by class: each has all images of one class."""
    rows = torch.arange(run.task.num_classes * run.ipc).split(run.ipc)
    return [Batch(c, part, torch.full_like(part, c)) for c, part in enumerate(rows)]


@method(
    "lpld",
    config=LPLD,
    year=2024,
    labels="pool",
    protocol="cda-v1",
    network="resnet18-bn",
    paper="Are Large-scale Soft Labels Necessary for Large-scale Dataset Distillation?",
    pretrains="teachers",
)
def lpld(task: Task, config: LPLD, run: Run) -> SyntheticSet:
    """SRe2L with batches of one class, matched to the BatchNorm moments of that class; stores a fortieth of the labels.

    When to use: in place of SRe2L if labels must be small, from 10 images per class on. Cost: SRe2L's and one pass over
    the real images; labelling costs the share that is stored. Known failure: with one image per class a batch is a
    single image, which cannot match the moments of a class.

    Xiao & He, NeurIPS 2024. L = CE + bn_weight * (sum over BatchNorms, the first times 10, of |mean - class mean| +
    |variance - class variance|). The released program computes the class's moments as a moving average over images,
    which forgets all but the last few and measures variances within an image (``statistics=moving``); here they are
    those of all images. It stores labels of random batches of its loader, here of random epochs of each class. Of
    several teachers the first recovers, and all label. The settings of pools (keep to cool_least) apply to labels=pool
    only.
    """
    config.check_classes(task.num_classes)
    committee = get_teachers(config, run)
    net = committee.members[0].network
    synthetic, batches = create_initial_set(config, run, net), make_single_class_batches(run)
    with run.autocast():
        targets = class_moments(run, net) if config.statistics == "exact" else moving_class_moments(run, net)
    guides = [guide_all(make_matcher(config, net), batches, targets)]
    finish = functools.partial(finish_set, config, run, synthetic.images, synthetic.classes, committee)
    run.partial_result(finish)
    for batch in recovery_passes(config, run, synthetic, guides, batches):
        logits, distances = batch.forward(batch.views(batch.pixels))
        batch.backward(class_loss(logits, batch.classes, len(distances)) + config.bn_weight * distances)
    return finish()


@dataclass(frozen=True)
class LPQLD(LPLD):
    """Hyper-parameters of LPQLD; images are those of LPLD."""

    keep: float = 0.1
    """{inherited} 30 of 300 epochs."""
    values: str = "topk"
    """{inherited} Published are 10, 50, 100 and 250 of 1,000 logits (k)."""
    cooling: float = 0.7


@method(
    "lpqld",
    config=LPQLD,
    year=2026,
    labels="pool",
    protocol="cda-v1",
    network="resnet18-bn",
    paper="Soft Label Pruning and Quantization for Large-Scale Dataset Distillation",
    pretrains="teachers",
)
def lpqld(task: Task, config: LPQLD, run: Run) -> SyntheticSet:
    """LPLD with more epochs of fewer logits each (top-k) and a temperature that decreases over the student's epochs.

    When to use: in place of LPLD with so many classes that most logits carry little. Cost: LPLD's, with four times its
    labelling. Known failure: with few classes little can be left out, so LPLD's labels are smaller.

    Xiao & He, TPAMI 2026. The temperature is max(2, 20 * 0.7^(epoch // 30)) (dynamic knowledge reuse). The published
    student also has a temperature of its own, of 0.01 to 1, which fitted its last batch best (calibrated alignment). It
    depends on the student, which labels do not know, and is left out: student and teacher share one. Published labels
    give classes beyond the k no probability (fill=mr), to which that temperature belongs; by default these classes get
    the view's smallest logit (mrs), the authors' other form.
    """
    return lpld(task, config, run)
