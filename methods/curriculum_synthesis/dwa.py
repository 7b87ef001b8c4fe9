"""TODO-DOC."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from condense.augment import seen
from condense.config import require
from condense.data import Task
from condense.engine import Run
from condense.methods.curriculum_synthesis.bn_matching import matcher
from condense.methods.curriculum_synthesis.crops import drawn
from condense.methods.curriculum_synthesis.initial import started
from condense.methods.curriculum_synthesis.recovery import Guide, by_class, recover
from condense.methods.curriculum_synthesis.relabelling import finished, squeezed
from condense.methods.curriculum_synthesis.settings import Recovery
from condense.networks import Network
from condense.registry import method
from condense.sets import SyntheticSet

# -- DWA --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DWA(Recovery):
    """Hyper-parameters of DWA; those of CIFAR."""

    init: str = "real"
    """See SRe2L's."""
    bn_variance: float = 11.0
    """See SRe2L's; 2 for ImageNet-1K."""
    min_scale: float = 1.0
    """See SRe2L's; 0.08 for larger images."""
    flip: bool = False
    """See SRe2L's; true for larger images."""
    labels: str = "teacher"
    """See SRe2L's."""
    temperature: float = 30.0
    """See SRe2L's."""
    label_pad: int = 4
    """See SRe2L's."""
    mix: str = "mixup"
    """See SRe2L's."""
    mix_alpha: float = 0.8
    """See SRe2L's."""
    ascent_steps: int = 12
    """Steps of the teacher's weights up the loss of the first images (K)."""
    rho: float = 0.015
    """Length of all of these steps together."""
    accumulate: bool = False
    """As released: a batch begins with the displacement that the one before it (of the same image number) left."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ascent_steps=(1, math.inf), rho=(0, sys.float_info.max))


def displaced(
    net: Network, weights: Mapping[str, Tensor], views: Tensor, classes: Tensor, steps: int, rho: float
) -> dict[str, Tensor]:
    """New weights, ``rho`` at most from ``weights``: ``steps`` steps of equal length up the cross-entropy of views.

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
        slopes = torch.autograd.grad(F.cross_entropy(logits, classes), list(leaves.values()))
        length = torch.stack([slope.square().sum() for slope in slopes]).sum().sqrt() + 1e-12
        moved = {
            name: (leaf + rho / steps * slope / length).detach() for (name, leaf), slope in zip(leaves.items(), slopes)
        }
    return moved


@method(
    "dwa", config=DWA, year=2024, labels="teacher", protocol="dwa-v1", network="resnet18-bn",
    paper="Diversity-Driven Synthesis: Enhancing Dataset Distillation through Directed Weight Adjustment",
)  # fmt: skip
def dwa(task: Task, config: DWA, run: Run) -> SyntheticSet:
    """SRe2L from real images, each batch by a teacher pushed away from what it knew of these, so that sets are varied.

    When to use: from 10 images per class, where SRe2L's images resemble each other. Cost: SRe2L's, and the batches pass
    one by one, as each has weights of its own (they are kept: one teacher a batch). Known failure: as SRe2L.

    Du, Zhang, Hu, Huang & Zhou, NeurIPS 2024. The displacement follows the cross-entropy of the first views alone; the
    teacher itself never changes. Of several teachers the first recovers, all label. The released program never takes
    the displacement back (accumulate=true), and lets gradients of earlier images into the first ascent step of the next
    batch, which is not reproduced.
    """
    committee = squeezed(config, run)
    net = committee.members[0].network
    synthetic = started(config, run, net)
    batches, one = by_class(run, config.batch_classes), matcher(config, net)
    tall, wide = drawn(config, run, 0, len(batches), torch.arange(len(batches)))
    own: dict[str, Tensor] = dict(net.named_parameters())
    guides, weights, start = [], own, synthetic.images.detach().clone()
    for g, batch in enumerate(batches):
        if not config.accumulate or (g and batches[g - 1].index != batch.index):
            weights = own
        at = torch.tensor([g], device=run.device)
        views = seen(start[batch.rows.to(run.device)][None], tall[at], wide[at])[0]
        classes = batch.classes.to(run.device)
        weights = displaced(net, weights, views, classes, config.ascent_steps, config.rho)
        guides.append(Guide(one, {g: 1.0}, {f"net.{name}": value for name, value in weights.items()}))
    result = functools.partial(finished, config, run, synthetic.images, synthetic.classes, committee)
    run.partial_result(result)
    recover(config, run, synthetic, guides, batches)
    return result()
