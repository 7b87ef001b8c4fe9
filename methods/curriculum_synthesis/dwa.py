"""DWA: recovery from teachers whose weights were moved away from what they know of the initial images."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from condense.augment import apply_resampling
from condense.config import require_range
from condense.data import Task
from condense.engine import Run
from condense.methods.curriculum_synthesis.bn_matching import make_matcher
from condense.methods.curriculum_synthesis.crops import draw_crops
from condense.methods.curriculum_synthesis.initial import create_initial_set
from condense.methods.curriculum_synthesis.recovery import Guide, class_loss, make_class_batches, recovery_passes
from condense.methods.curriculum_synthesis.relabelling import finish_set, get_teachers
from condense.methods.curriculum_synthesis.settings import RecoveryOptions
from condense.networks import Network
from condense.registry import method
from condense.sets import SyntheticSet


@dataclass(frozen=True)
class DWA(RecoveryOptions):
    """Hyper-parameters of DWA; the defaults are those of CIFAR."""

    init: str = "real"
    bn_variance: float = 11.0
    """{inherited} 2 for ImageNet-1K."""
    min_scale: float = 1.0
    """{inherited} 0.08 for larger images."""
    flip: bool = False
    """{inherited} True for larger images."""
    labels: str = "teacher"
    temperature: float = 30.0
    label_pad: int = 4
    mix: str = "mixup"
    mix_alpha: float = 0.8
    ascent_steps: int = 12
    """Gradient ascent steps of the teacher's weights on the loss of the initial images (K)."""
    rho: float = 0.015
    """Length of all ascent steps together, in the Euclidean norm over all weights."""
    accumulate: bool = False
    """As released: a batch starts from the displacement of the previous batch of the same image number."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self, ascent_steps=(1, math.inf), rho=(0, sys.float_info.max))


def ascend_weights(
    net: Network, weights: Mapping[str, Tensor], views: Tensor, classes: Tensor, steps: int, rho: float
) -> dict[str, Tensor]:
    """New weights at most ``rho`` away from ``weights``: ``steps`` ascent steps of equal length on the cross-entropy.

    Args:
        net: in eval mode; it is not changed.
        weights: its parameters by name, from which the steps start.
        views: (B,C,H,W).
        classes: int64 (B,).
        steps: K.
        rho: length of all steps together, in the Euclidean norm over all weights.
    """
    moved = {name: value.detach().clone() for name, value in weights.items()}
    for _ in range(steps):
        leaves = {name: value.requires_grad_() for name, value in moved.items()}
        logits = torch.func.functional_call(net, leaves, (views,))
        gradients = torch.autograd.grad(F.cross_entropy(logits, classes), list(leaves.values()), materialize_grads=True)
        length = torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt() + 1e-12
        moved = {
            name: (leaf + rho / steps * gradient / length).detach()
            for (name, leaf), gradient in zip(leaves.items(), gradients)
        }
    return moved


@method(
    "dwa",
    config=DWA,
    year=2024,
    labels="teacher",
    protocol="dwa-v2",
    network="resnet18-bn",
    paper="Diversity-Driven Synthesis: Enhancing Dataset Distillation through Directed Weight Adjustment",
    pretrains="teachers",
)
def dwa(task: Task, config: DWA, run: Run) -> SyntheticSet:
    """SRe2L from real images, where each batch has a teacher whose weights ascend the loss on it, for diverse images.

    When to use: from 10 images per class, where SRe2L's images resemble each other. Cost: SRe2L's; batches pass through
    the teacher one by one, and the weights of one teacher per batch are kept. Known failure: as SRe2L.

    Du, Zhang, Hu, Huang & Zhou, NeurIPS 2024. The displacement follows the cross-entropy of the first views alone; the
    teacher itself never changes. Of several teachers the first recovers, and all label. The released program never
    undoes the displacement (accumulate=true), and lets gradients of earlier images into the first ascent step of the
    next batch, which is not reproduced.
    """
    committee = get_teachers(config, run)
    net = committee.members[0].network
    synthetic = create_initial_set(config, run, net)
    batches, matcher = make_class_batches(run, config.batch_classes), make_matcher(config, net)
    rows, columns = draw_crops(config, run, 0, len(batches), torch.arange(len(batches)))
    trained: dict[str, Tensor] = dict(net.named_parameters())
    guides, weights, start = [], trained, synthetic.images.detach().clone()
    for g, batch in enumerate(batches):
        if not config.accumulate or (g and batches[g - 1].index != batch.index):
            weights = trained
        at = torch.tensor([g], device=run.device)
        views = apply_resampling(start[batch.rows.to(run.device)][None], rows[at], columns[at])[0]
        classes = batch.classes.to(run.device)
        weights = ascend_weights(net, weights, views, classes, config.ascent_steps, config.rho)
        guides.append(Guide(matcher, {g: 1.0}, {f"net.{name}": value for name, value in weights.items()}))
    finish = functools.partial(finish_set, config, run, synthetic.images, synthetic.classes, committee)
    run.partial_result(finish)
    for part in recovery_passes(config, run, synthetic, guides, batches):
        logits, distances = part.forward(part.views(part.pixels))
        part.backward(class_loss(logits, part.classes, len(distances)) + config.bn_weight * distances)
    return finish()
