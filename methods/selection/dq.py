"""Dataset Quantization: bins by graph cut, sampled evenly; patches dropped and rebuilt."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from condense import networks, rng, selection
from condense.config import require_one_of, require_range
from condense.data import Task, to_unit_range
from condense.engine import Run
from condense.errors import CondenseError
from condense.methods.selection.patches import fill_with_mean, grad_cam, least_important, train_decoder
from condense.methods.selection.settings import (
    GradientOptions,
    add_labels,
    choose_images,
    similarities,
    teacher_network,
)
from condense.registry import method
from condense.selection import Kernel
from condense.sets import SyntheticSet


@dataclass(frozen=True)
class DQ(GradientOptions):
    """Hyper-parameters of Dataset Quantization."""

    kernel: str = "features"
    """{inherited}"""
    bins: int = 10
    """Bins of each class; 1 selects at random."""
    drop: float = 0.0
    """Share of each image's patches to drop and rebuild, the least important ones by Grad-CAM; 0.2 is published."""
    patch: int = 4
    """Height and width of a patch in pixels, a divisor of the image's."""
    rebuild: str = "decoder"
    """Dropped patches: decoder (rebuilt by a small network, trained on the data) or mean (colour of the other ones)."""
    decoder_steps: int = 500
    """Steps of the decoder's training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_one_of(self, rebuild=("decoder", "mean"))
        counts = dict.fromkeys(("bins", "patch", "decoder_steps"), (1, math.inf))
        require_range(self, **counts, drop=(0, 0.95))
        if self.drop and self.store == "indices":
            raise CondenseError("store=indices: the real data lack the patches that drop rebuilds; leave one out")


def split_into_bins(kernel: Callable[[Tensor], Kernel], ids: Tensor, bins: int) -> list[Tensor]:
    """Splits images into at most ``bins`` bins of equal size, each the graph cut of those that are left.

    ``kernel`` returns the similarities among images of the given ids. The last bin takes the rest. Returns rows of
    ``ids`` of each bin.
    """
    bins = min(bins, len(ids))
    rows, found = torch.arange(len(ids)), []
    for _ in range(bins - 1):
        chosen = selection.graph_cut(kernel(ids[rows]), len(ids) // bins)
        found.append(rows[chosen])
        is_left = torch.ones(len(rows), dtype=torch.bool)
        is_left[chosen] = False
        rows = rows[is_left]
    return [*found, rows]


def rebuild_patches(synthetic: SyntheticSet, config: DQ, run: Run) -> None:
    """Replaces the least important patches by rebuilt ones; ``patches`` of the manifest has the bytes of the parts."""
    height, width = run.task.shape[1:]
    if height % config.patch or width % config.patch:
        raise CondenseError(f"patch={config.patch}: does not divide the {height}x{width} pixels of {run.task.name}")
    patches = (height // config.patch) * (width // config.patch)
    count = round(config.drop * patches)
    net, stored, rebuilt = teacher_network(config, run), synthetic.images, []
    decoder = train_decoder(run, config.patch, count, config.decoder_steps) if config.rebuild == "decoder" else None
    for images, classes in zip(stored.split(256), synthetic.classes.to(run.device).split(256)):
        pixels = to_unit_range(images.to(run.device))
        importance = grad_cam(net, run.task.transform(pixels), classes, config.patch)
        dropped = least_important(importance, count, config.patch)
        pixels = (fill_with_mean(pixels, dropped) if decoder is None else decoder(pixels, dropped)).clamp(0, 1)
        rebuilt.append((pixels * 255).round().to(stored.dtype) if stored.dtype == torch.uint8 else pixels)
    synthetic.tensors["images"] = torch.cat(rebuilt).to(stored.device)
    sizes = {
        "visible_bytes": stored.nbytes * (patches - count) // patches,
        "mark_bytes": len(stored) * math.ceil(patches / 8),
        "decoder_bytes": 0 if decoder is None else networks.state_nbytes(decoder),
    }
    run.note("patches", {"patch": config.patch, "dropped": count, "of": patches, **sizes})


@method("dq", config=DQ, paper="Dataset Quantization", year=2023, order=0, pretrains="teachers")
def dq(task: Task, config: DQ, run: Run) -> SyntheticSet:
    """Splits each class into bins by graph cut and samples every bin evenly.

    When to use: for 10 to 60 percent of the data, where a single coreset holds too many typical images. Cost: a short
    training of one network, and time that grows with the square of the class size. Known failure: with one image for
    each bin or less it is a random selection of the first bins.

    Zhou et al., ICCV 2023. Its program takes gradients of a classifier that is not trained, which are features weighted
    at random; features are the default here. With drop=0.2 patches are dropped as published, but by Grad-CAM of the
    run's network and not of an ImageNet one, and rebuilt by a decoder of 20,000 weights that is trained on the data and
    not by a pretrained masked autoencoder of 330 million. The paper's sizes count neither whole images nor the decoder;
    here the set stores whole images and counts them, and the manifest has the other figures.
    """
    kernel = similarities(config, run)

    def choose(ids: Tensor, count: int, c: int) -> Tensor:
        bins, draws = split_into_bins(kernel, ids, config.bins), rng.Draws(run.seed, "bins", c)
        shares = selection.even_shares(count, [len(rows) for rows in bins])
        return torch.cat([rows[draws.sample(len(rows), share)] for rows, share in zip(bins, shares)])

    synthetic = choose_images(config, run, choose)
    if config.drop:
        rebuild_patches(synthetic, config, run)
    return add_labels(synthetic, config, run)
