"""Curriculum synthesis: images that trained teachers take for the real data, by their answers and BatchNorm statistics.

Squeeze the real data into teachers, recover images from them, relabel these. Each method below is a way through the
same steps; what papers change are arguments: who guides which images, where these start, how they are cropped, what may
move, and what labels the set brings.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from condense.augment import seen
from condense.engine import Group, Run
from condense.methods.curriculum_synthesis.bn_matching import Matcher, Moments
from condense.methods.curriculum_synthesis.crops import drawn
from condense.methods.curriculum_synthesis.settings import Recovery
from condense.sets import SyntheticSet

CHUNK_PIXELS = 1024 * 1024
"""Pixels that pass through a teacher at once on an accelerator: 1,024 images of 32x32, 20 of 224x224."""


@dataclass(frozen=True)
class Batch:
    """Images that share moments and, mostly, crops."""

    index: int
    """Number of its images among those of their classes; of the class, where a batch has all images of one."""
    rows: Tensor
    """Rows of what is learned, int64 (R,)."""
    classes: Tensor
    """Classes of its images, int64 (B,)."""
    beside: Tensor | None = None
    """Rows of fixed images, int64 (B,), that what is learned is added to."""


def by_class(run: Run, at_once: int) -> list[Batch]:
    """The batches of a set of ``run.ipc`` images a class, sorted by class: each has one image of each of ``at_once``
    classes; the first images of all classes come first."""
    parts = torch.arange(run.task.num_classes).split(at_once)
    return [Batch(k, part * run.ipc + k, part) for k in range(run.ipc) for part in parts]


@dataclass(frozen=True)
class Guide:
    """A teacher and the batches that it guides."""

    matcher: Matcher
    weights: Mapping[int, float]
    """Weight of its loss, by number of the batch."""
    parameters: Mapping[str, Tensor] | None = None
    """Stand in for the teacher's own weights."""
    targets: Sequence[Moments] | None = None
    """For each BatchNorm the moments of every class, in place of the running statistics; batches are of one class then.
    """


def recovery_loss(logits: Tensor, classes: Tensor, distances: Tensor, weight: float) -> Tensor:
    """Of each batch (G,): mean cross-entropy of logits (G*B, C) to classes (G*B,), plus ``weight`` distances."""
    losses = F.cross_entropy(logits, classes, reduction="none").view(len(distances), -1).mean(1)
    return losses + weight * distances


def recover(
    config: Recovery,
    run: Run,
    synthetic: SyntheticSet,
    guides: Sequence[Guide],
    batches: Sequence[Batch],
    *,
    fixed: Tensor | None = None,
    clamp: bool = True,
    mask: Tensor | None = None,
) -> None:
    """The loop of every method: all batches move in each step, each by its own views, moments and guides.

    In eval mode images do not meet but in the moments, so batches pass through a teacher together, as many as memory
    likes, and ranks share them out.

    Args:
        config: of the method.
        run: its run.
        synthetic: whose ``images`` are learned.
        guides: who guides which batches.
        batches: all of them; their numbers are their places.
        fixed: images (M,C,H,W) that the batches' own rows of are added to what is learned; None: that is the images.
        clamp: keep pixels in the range of pixels.
        mask: factor on updates of the images, one row for each.
    """
    task, images = run.task, synthetic.images
    low, high = (task.transform(torch.full((task.shape[0], 1, 1), end, device=run.device)) for end in (0.0, 1.0))
    group = Group(
        lr=config.lr_img, optimizer="adam", betas=(0.5, 0.9), schedule=cosine, clamp=(low, high) if clamp else None
    )
    sizes = [len(batch.classes) if config.per_image else 1 for batch in batches]
    spots = torch.arange(sum(sizes)).split(sizes)  # rows of the drawn views that belong to each batch
    for wave in waves(batches, config.at_once):
        rows = torch.cat([batches[g].rows for g in wave]).unique()
        whole = len(rows) == len(images)
        chosen = rows.to(run.device)
        part = synthetic if whole else SyntheticSet(task, images.detach()[chosen], synthetic.classes[chosen])
        mine, still = wave[run.ranks.rank :: run.ranks.world], None if mask is None else mask[chosen]
        wanted = torch.cat([spots[g] for g in mine]) if mine else spots[0][:0]
        work = _planned(guides, batches, mine, rows, wanted, spots, run)
        try:
            for step in run.optimise(part, config.steps, sharded=run.ranks.world > 1, images=group):
                tall, wide = drawn(config, run, step.index, sum(sizes), wanted)
                gradient, total = torch.zeros_like(part.images), torch.zeros((), device=run.device)
                for one in work:
                    leaves = part.images.detach()[one.at].requires_grad_()
                    shown = leaves if fixed is None else fixed[one.beside] + leaves
                    shown = shown.flatten(0, 1)[:, None] if config.per_image else shown
                    views = seen(shown, tall[one.views], wide[one.views]).flatten(0, 1)
                    logits, distances = guided(one, views, run)
                    losses = recovery_loss(logits, one.classes, distances, config.bn_weight)
                    loss = (one.weights * losses).sum()
                    gradient.index_add_(0, one.at.flatten(), torch.autograd.grad(loss, leaves)[0].flatten(0, 1))
                    total += loss.detach()
                step.apply({"images": gradient}, total, mask=still)
        finally:  # also what a run that diverged had of use
            if not whole:
                with torch.no_grad():
                    images[chosen] = part.images


@dataclass(frozen=True)
class Work:
    """What passes through a teacher at once, with all that stays the same from step to step, on the device."""

    guide: Guide
    at: Tensor
    """Rows of what moves (G, R)."""
    views: Tensor
    """Rows of the step's matrices."""
    classes: Tensor
    """Of the images (G * B,)."""
    weights: Tensor
    """Of the losses (G,)."""
    beside: Tensor | None
    """Rows of fixed images (G, B)."""
    targets: Sequence[Moments] | None
    """Moments (G, C) that those of each BatchNorm shall have; None: the running ones."""


def _planned(
    guides: Sequence[Guide],
    batches: Sequence[Batch],
    mine: Sequence[int],
    rows: Tensor,
    wanted: Tensor,
    spots: Sequence[Tensor],
    run: Run,
) -> list[Work]:
    """The work of each step on the batches ``mine``; ``rows`` and ``wanted`` (both ascending) are what moves and what
    is drawn."""
    work, own = [], set(mine)
    for guide in guides:
        for numbers in together([g for g in guide.weights if g in own], batches, run):
            at = torch.searchsorted(rows, torch.stack([batches[g].rows for g in numbers]))
            views = torch.searchsorted(wanted, torch.cat([spots[g] for g in numbers]))
            classes = torch.cat([batches[g].classes for g in numbers])
            weights = torch.tensor([guide.weights[g] for g in numbers])
            at, views, classes, weights = (part.to(run.device) for part in (at, views, classes, weights))
            found = [rows for rows in (batches[g].beside for g in numbers) if rows is not None]
            beside, targets = torch.stack(found).to(run.device) if found else None, None
            if guide.targets is not None:
                own_class = classes.view(len(numbers), -1)[:, 0]
                targets = [(mean[own_class], variance[own_class]) for mean, variance in guide.targets]
            work.append(Work(guide, at, views, classes, weights, beside, targets))
    return work


def guided(one: Work, views: Tensor, run: Run) -> tuple[Tensor, Tensor]:
    """Logits and distances that a guide gives; see :class:`Matcher`."""
    asked, guide = (views, len(one.at), run.fast, one.targets), one.guide
    if guide.parameters is None:
        logits, distances = guide.matcher(*asked)
    else:
        logits, distances = torch.func.functional_call(guide.matcher, dict(guide.parameters), asked)
    return logits, distances


def waves(batches: Sequence[Batch], at_once: int | None) -> list[list[int]]:
    """Numbers of the batches that move together: those of ``at_once`` images of each class, or all."""
    known = sorted({batch.index for batch in batches})
    span = at_once or len(known)
    chosen = [set(known[i : i + span]) for i in range(0, len(known), span)]
    return [[g for g, batch in enumerate(batches) if batch.index in some] for some in chosen]


def cosine(progress: float) -> float:
    """Factor on the learning rate: from 1 to 0 over the run."""
    return (1 + math.cos(math.pi * progress)) / 2


def together(numbers: Sequence[int], batches: Sequence[Batch], run: Run) -> Iterator[list[int]]:
    """Batches of equal size that pass through a teacher at once, bounded by pixels; at least one each time."""
    height, width = run.task.shape[1:]
    most = run.forward_chunk(gradients=True) or CHUNK_PIXELS // (height * width)
    for size, same in itertools.groupby(numbers, key=lambda g: len(batches[g].classes)):
        found = list(same)
        span = max(1, most // size)
        yield from (found[i : i + span] for i in range(0, len(found), span))
