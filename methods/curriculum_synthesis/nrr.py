"""NRR-DD: recovery of only those regions that the teacher does not look at."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from condense import rng
from condense.config import require_range
from condense.data import Task
from condense.engine import Run
from condense.errors import CondenseError
from condense.methods.curriculum_synthesis.bn_matching import make_matcher
from condense.methods.curriculum_synthesis.initial import create_initial_set, set_from_pixels
from condense.methods.curriculum_synthesis.patches import CROPS, POOL, crop_losses, sample_pool, square_crops
from condense.methods.curriculum_synthesis.recovery import class_loss, guide_all, make_class_batches, recovery_passes
from condense.methods.curriculum_synthesis.relabelling import finish_set, get_teachers
from condense.methods.curriculum_synthesis.settings import RECOVERY_INITS, RecoveryOptions
from condense.networks import Network
from condense.registry import method
from condense.sets import SyntheticSet


@dataclass(frozen=True)
class NRR(RecoveryOptions):
    """Hyper-parameters of NRR-DD. No program and few settings are public: these are SRe2L's, the others our own."""

    init: str = "critical"
    """{inherited} Also critical: crops where the teacher looks, of which it is least sure."""
    labels: str = "per-view"
    """{inherited} Distances keeps two numbers a view."""
    threshold: float = 0.5
    """Pixels whose activation (0 to 1) lies above this stay as they are (epsilon); others move by what they lack."""
    pool: int = POOL
    """Real images of each class that crops are taken from."""
    crops: int = CROPS
    """Crops of each of these."""

    inits: ClassVar[tuple[str, ...]] = (*RECOVERY_INITS, "critical")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self, threshold=(0, 1), pool=(1, math.inf), crops=(1, math.inf))


def compute_class_activation(net: Network, images: Tensor, classes: Tensor) -> Tensor:
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
        wide = [map_ for map_ in maps if map_.shape[2] * map_.shape[3] > 1]
        if not wide:
            raise CondenseError("the teacher has no maps that show where it looks; take a network of convolutions")
        last = wide[-1]
        (slope,) = torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), last)
    activation = (slope * last.detach()).sum(1, keepdim=True).relu()
    activation = F.interpolate(activation, size=images.shape[2:], mode="bilinear", align_corners=False)[:, 0]
    return activation / activation.flatten(1).amax(1).clamp(min=torch.finfo(activation.dtype).tiny)[:, None, None]


@method(
    "nrr",
    config=NRR,
    year=2025,
    labels="per-view",
    protocol="rded-v1",
    network="resnet18-bn",
    paper="Enhancing Dataset Distillation via Non-Critical Region Refinement",
    pretrains="teachers",
)
def nrr(task: Task, config: NRR, run: Run) -> SyntheticSet:
    """Optimises crops of real images in regions of low class activation; labels may be two numbers per view.

    When to use: to keep real texture in the images; with labels=distances if labels must be small. Cost: as SRe2L.
    Known failure: this is a reconstruction from the paper's abstract and others' notes, so published numbers cannot be
    compared.

    Tran, Le, Le, Cai & Phung, CVPR 2025. Reconstructed: of each image the crop with the highest activation is taken,
    and of these the least confident are kept; updates (Adam's, not gradients) are multiplied by max(0, threshold -
    activation), computed once at the start. Of several teachers the first recovers, and all label.
    """
    committee = get_teachers(config, run)
    net = committee.members[0].network
    batches = make_class_batches(run, config.batch_classes)
    critical = config.init == "critical"
    synthetic = (
        set_from_pixels(run, critical_patches(run, net, config)) if critical else create_initial_set(config, run, net)
    )
    start, classes = synthetic.images.detach().clone(), synthetic.classes
    looks = torch.cat([compute_class_activation(net, *part) for part in zip(start.split(256), classes.split(256))])
    mask = (config.threshold - looks).clamp(min=0)[:, None]
    guides = [guide_all(make_matcher(config, net), batches)]
    finish = functools.partial(finish_set, config, run, synthetic.images, classes, committee)
    run.partial_result(finish)
    for batch in recovery_passes(config, run, synthetic, guides, batches, mask=mask):
        logits, distances = batch.forward(batch.views(batch.pixels))
        batch.backward(class_loss(logits, batch.classes, len(distances)) + config.bn_weight * distances)
    return finish()


def critical_patches(run: Run, net: Network, config: NRR) -> Tensor:
    """NRR-DD's first images (classes * ipc, C,H,W) in pixel space: of each real image the crop with the highest mean
    activation, of these the ``ipc`` with the lowest confidence."""
    size, patches = run.task.shape[1], []
    for c in range(run.task.num_classes):
        images = sample_pool(run, c, config.pool)
        crops, views = square_crops(images, rng.Draws(run.seed, "patches", c), config.crops, size)
        looks = compute_class_activation(net, images, torch.full((len(images),), c, device=images.device)).cpu()
        means = torch.stack(
            [looks[i // config.crops, y : y + h, x : x + w].mean() for i, (y, x, h, w) in enumerate(views.box.tolist())]
        )
        which = means.view(len(images), config.crops).argmax(1).to(crops.device)
        best = crops.view(len(images), config.crops, *crops.shape[1:])[
            torch.arange(len(images), device=crops.device), which
        ]
        order = crop_losses(run, net, best, torch.full((len(best),), c, device=best.device)).argsort(descending=True)
        patches.append(best[order[torch.arange(run.ipc, device=order.device) % len(order)]])
    return run.task.transform.inverse(torch.cat(patches)).clamp(0, 1)
