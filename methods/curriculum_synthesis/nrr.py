"""TODO-DOC."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from condense import rng
from condense.config import require
from condense.data import Task
from condense.engine import Run
from condense.errors import CondenseError
from condense.methods.curriculum_synthesis.bn_matching import matcher
from condense.methods.curriculum_synthesis.initial import from_pixels, started
from condense.methods.curriculum_synthesis.patches import _scores, pooled, square_crops
from condense.methods.curriculum_synthesis.recovery import Guide, by_class, recover
from condense.methods.curriculum_synthesis.relabelling import finished, squeezed
from condense.methods.curriculum_synthesis.settings import STARTS, Recovery
from condense.networks import Network
from condense.registry import method
from condense.sets import SyntheticSet

# -- NRR-DD -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NRR(Recovery):
    """Hyper-parameters of NRR-DD. No program and few settings are public: these are SRe2L's, the others our own."""

    init: str = "critical"
    """See SRe2L's, and critical: crops where the teacher looks, of which it is least sure."""
    labels: str = "per-view"
    """See SRe2L's; distances keeps two numbers a view."""
    threshold: float = 0.5
    """Pixels whose activation (0 to 1) lies above this stay as they are (epsilon); others move by what they lack."""
    pool: int = 300
    """Real images of each class that crops are taken from."""
    crops: int = 5
    """Crops of each of these."""

    starts: ClassVar[tuple[str, ...]] = (*STARTS, "critical")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, threshold=(0, 1), pool=(1, math.inf), crops=(1, math.inf))


def activation(net: Network, images: Tensor, classes: Tensor) -> Tensor:
    """Where a network looks for a class: float32 (N, H, W) in [0,1], the largest of each image 1 (0 where nothing).

    The last map with more than one pixel times its slope in the logit, summed over channels, negatives cut: on
    networks that end in a mean over the map and a linear layer this is the class activation map (Zhou et al., 2016).

    Args:
        net: in eval mode.
        images: (N,C,H,W) in training space.
        classes: int64 (N,).
    """
    maps: list[Tensor] = []
    with torch.enable_grad():
        logits = net.classify(net.embed(images.detach().requires_grad_(), maps))
        wide = [one for one in maps if one.shape[2] * one.shape[3] > 1]
        if not wide:
            raise CondenseError("the teacher has no maps that show where it looks; take a network of convolutions")
        last = wide[-1]
        (slope,) = torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), last)
    found = (slope * last.detach()).sum(1, keepdim=True).relu()
    found = F.interpolate(found, size=images.shape[2:], mode="bilinear", align_corners=False)[:, 0]
    return found / found.flatten(1).amax(1).clamp(min=torch.finfo(found.dtype).tiny)[:, None, None]


@method(
    "nrr", config=NRR, year=2025, labels="per-view", protocol="rded-v1", network="resnet18-bn",
    paper="Enhancing Dataset Distillation via Non-Critical Region Refinement",
)  # fmt: skip
def nrr(task: Task, config: NRR, run: Run) -> SyntheticSet:
    """Refines crops of real images, but only where the teacher does not look; labels may be two numbers a view.

    When to use: where real texture shall stay in the images; with labels=distances where labels must be small. Cost: as
    SRe2L. Known failure: a reconstruction from the paper's abstract and notes of others, so published numbers are out
    of reach of comparison.

    Tran, Le, Le, Cai & Phung, CVPR 2025. Reconstructed: crops are the ones with most activation of each image, of which
    those with the least confidence are kept; updates (Adam's, not gradients) are multiplied by max(0, threshold -
    activation), found once, at the start. Of several teachers the first recovers, all label.
    """
    committee = squeezed(config, run)
    net = committee.members[0].network
    batches = by_class(run, config.batch_classes)
    critical = config.init == "critical"
    synthetic = from_pixels(run, critical_patches(run, net, config)) if critical else started(config, run, net)
    start, own = synthetic.images.detach().clone(), synthetic.classes
    mask = torch.cat([activation(net, *part) for part in zip(start.split(256), own.split(256))])
    mask = (config.threshold - mask).clamp(min=0)[:, None]
    guide = Guide(matcher(config, net), dict.fromkeys(range(len(batches)), 1.0))
    result = functools.partial(finished, config, run, synthetic.images, own, committee)
    run.partial_result(result)
    recover(config, run, synthetic, [guide], batches, mask=mask)
    return result()


def critical_patches(run: Run, net: Network, config: NRR) -> Tensor:
    """NRR-DD's first images (classes * ipc, C,H,W) in pixel space: of each real image the crop with the highest mean
    activation, of these the ``ipc`` with the lowest confidence."""
    size, made = run.task.shape[1], []
    for c in range(run.task.num_classes):
        images = pooled(run, c, config.pool)
        crops, views = square_crops(images, rng.Draws(run.seed, "patches", c), config.crops, size)
        looks = activation(net, images, torch.full((len(images),), c, device=images.device)).cpu()
        means = torch.stack(
            [looks[i // config.crops, y : y + h, x : x + w].mean() for i, (y, x, h, w) in enumerate(views.box.tolist())]
        )
        which = means.view(len(images), config.crops).argmax(1).to(crops.device)
        best = crops.view(len(images), config.crops, *crops.shape[1:])[
            torch.arange(len(images), device=crops.device), which
        ]
        order = _scores(run, net, best, torch.full((len(best),), c, device=best.device)).argsort(descending=True)
        made.append(best[order[torch.arange(run.ipc, device=order.device) % len(order)]])
    return run.task.transform.inverse(torch.cat(made)).clamp(0, 1)
