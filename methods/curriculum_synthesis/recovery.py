"""Recovery: batches of synthetic images pass through frozen teachers, and all pixels are updated together.

The published programs finish one image of every class, then the next. In eval mode images affect each other only
through the BatchNorm moments of their batch, so all batches can be optimised in the same step: the mathematics is the
same, matrices are larger, and a time limit leaves all images equally far.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from condense.augment import apply_resampling
from condense.device import add_rows
from condense.engine import ParamGroup, Run
from condense.methods.curriculum_synthesis.bn_matching import Matcher, Moments
from condense.methods.curriculum_synthesis.crops import draw_crops
from condense.methods.curriculum_synthesis.settings import RecoveryOptions
from condense.sets import SyntheticSet

TEACHER_CHUNK_PIXELS = 1024 * 1024
"""Pixels of one forward pass through a teacher on an accelerator: 1,024 images of 32x32, 20 of 224x224."""


@dataclass(frozen=True)
class Batch:
    """Images that share BatchNorm moments and, by default, crops."""

    index: int
    """Number of its images among those of their classes; the class, where a batch has all images of one class."""
    rows: Tensor
    """Rows of the learned images, int64 (R,)."""
    classes: Tensor
    """Classes of the images that pass through the teacher, int64 (B,)."""
    fixed_rows: Tensor | None = None
    """Rows of fixed images, int64 (B,), that the learned image is added to."""


def make_class_batches(run: Run, batch_classes: int) -> list[Batch]:
    """Batches of a set of ``run.ipc`` images per class, sorted by class: each has one image of each of
    ``batch_classes`` classes; the first images of all classes come first."""
    parts = torch.arange(run.task.num_classes).split(batch_classes)
    return [Batch(k, part * run.ipc + k, part) for k in range(run.ipc) for part in parts]


@dataclass(frozen=True)
class Guide:
    """A teacher and the batches that it guides."""

    matcher: Matcher
    weights: Mapping[int, float]
    """Weight of its loss, by number of the batch."""
    parameters: Mapping[str, Tensor] | None = None
    """Used in place of the teacher's own weights."""
    targets: Sequence[Moments] | None = None
    """For each BatchNorm the moments of every class, in place of the running statistics; batches then have one
    class."""


def guide_all(matcher: Matcher, batches: Sequence[Batch], targets: Sequence[Moments] | None = None) -> Guide:
    """A teacher that guides every batch with weight 1."""
    return Guide(matcher, dict.fromkeys(range(len(batches)), 1.0), targets=targets)


def class_loss(logits: Tensor, classes: Tensor, groups: int) -> Tensor:
    """Mean cross-entropy of each of ``groups`` equal batches (G,), of logits (G * B, C) and classes (G * B,)."""
    return F.cross_entropy(logits, classes, reduction="none").view(groups, -1).mean(1)


@dataclass(frozen=True)
class TrainingPlan:
    """Batches that pass through a teacher at once: all that stays the same from step to step, on the device."""

    guide: Guide
    rows: Tensor
    """Rows of the learned images (G, R)."""
    view_rows: Tensor
    """Rows of the step's resampling matrices."""
    classes: Tensor
    """(G * B,)."""
    weights: Tensor
    """Of the losses (G,)."""
    fixed_rows: Tensor | None
    """(G, B)."""
    targets: Sequence[Moments] | None
    """Moments (G, C) for each BatchNorm; None: the running statistics."""


class RecoveryPass:
    """Batches on their way through one teacher in one step.

    Attributes:
        pixels: the learned images of the batches (G, R, C, H, W), a leaf of the graph.
        classes: int64 (G * B,).
        fixed_rows: rows of the fixed images (G, B), for methods that have them.
        targets: moments that each BatchNorm is matched to; None: the running statistics.
        loss: of the pass, a detached scalar, after ``backward``.
    """

    def __init__(
        self,
        plan: TrainingPlan,
        images: Tensor,
        gradient: Tensor,
        matrices: tuple[Tensor, Tensor],
        per_image: bool,
        run: Run,
    ) -> None:
        self.pixels = images.detach()[plan.rows].requires_grad_()
        self.classes, self.fixed_rows, self.targets = plan.classes, plan.fixed_rows, plan.targets
        self.loss = torch.zeros((), device=run.device)
        self._plan, self._gradient, self._matrices, self._per_image, self._run = (
            plan,
            gradient,
            matrices,
            per_image,
            run,
        )

    def views(self, images: Tensor) -> Tensor:
        """This step's crops, mirrors and rolls (G * B, C, H, W) of images (G, B, C, H, W)."""
        rows, columns = self._matrices
        images = images.flatten(0, 1)[:, None] if self._per_image else images
        return apply_resampling(images, rows[self._plan.view_rows], columns[self._plan.view_rows]).flatten(0, 1)

    def forward(self, views: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's logits (G * B, C), and the distances (G,) of its BatchNorm moments; see :class:`Matcher`."""
        arguments, guide = (views, len(self.pixels), self._run.autocast, self.targets), self._plan.guide
        if guide.parameters is None:
            logits, distances = guide.matcher(*arguments)
        else:
            logits, distances = torch.func.functional_call(guide.matcher, dict(guide.parameters), arguments)
        return logits, distances

    def backward(self, losses: Tensor) -> None:
        """Adds the gradient of the weighted ``losses`` (G,) to that of the step."""
        loss = (self._plan.weights * losses).sum()
        gradient = torch.autograd.grad(loss, self.pixels)[0].flatten(0, 1)
        add_rows(self._gradient, self._plan.rows.flatten(), gradient)
        self.loss += loss.detach()


def recovery_passes(
    config: RecoveryOptions,
    run: Run,
    synthetic: SyntheticSet,
    guides: Sequence[Guide],
    batches: Sequence[Batch],
    *,
    clamp: bool = True,
    mask: Tensor | None = None,
) -> Iterator[RecoveryPass]:
    """The passes of every step. The caller computes each pass's loss and calls its ``backward``; once the passes of a
    step are done, Adam updates the pixels. Ranks share the batches of a step.

    Args:
        config: settings of the method.
        run: the run.
        synthetic: whose ``images`` are learned.
        guides: which teacher guides which batches.
        batches: all of them; their numbers are their places.
        clamp: keep pixels in the range of pixels.
        mask: factor on the updates of the images, one row for each.
    """
    task, images = run.task, synthetic.images
    low, high = (task.transform(torch.full((task.shape[0], 1, 1), end, device=run.device)) for end in (0.0, 1.0))
    group = ParamGroup(
        lr=config.lr_img,
        optimizer="adam",
        betas=(0.5, 0.9),
        schedule=cosine_lr_factor,
        clamp=(low, high) if clamp else None,
    )
    sizes = [len(batch.classes) if config.per_image else 1 for batch in batches]
    view_rows = torch.arange(sum(sizes)).split(sizes)  # rows of the step's matrices that belong to each batch
    for turn in _turns(batches, config.at_once):
        rows = torch.cat([batches[g].rows for g in turn]).unique()
        whole = len(rows) == len(images)
        chosen = rows.to(run.device)
        part = synthetic if whole else SyntheticSet(task, images.detach()[chosen], synthetic.classes[chosen])
        own, part_mask = turn[run.ranks.rank :: run.ranks.world_size], None if mask is None else mask[chosen]
        own_rows = torch.cat([view_rows[g] for g in own]) if own else view_rows[0][:0]
        plans = _plan_passes(guides, batches, own, rows, own_rows, view_rows, run)
        try:
            for step in run.optimise(part, config.steps, sharded=run.ranks.world_size > 1, images=group):
                matrices = draw_crops(config, run, step.index, sum(sizes), own_rows)
                gradient, total = torch.zeros_like(part.images), torch.zeros((), device=run.device)
                for plan in plans:
                    recovery_pass = RecoveryPass(plan, part.images, gradient, matrices, config.per_image, run)
                    yield recovery_pass
                    total += recovery_pass.loss
                step.apply({"images": gradient}, total, mask=part_mask)
        finally:  # a run that diverged keeps what it has learned, too
            if not whole:
                with torch.no_grad():
                    images[chosen] = part.images


def _plan_passes(
    guides: Sequence[Guide],
    batches: Sequence[Batch],
    own: Sequence[int],
    rows: Tensor,
    own_rows: Tensor,
    view_rows: Sequence[Tensor],
    run: Run,
) -> list[TrainingPlan]:
    """The passes of each step for the batches ``own``; ``rows`` (learned images) and ``own_rows`` (drawn views)
    ascend."""
    plans, mine = [], set(own)
    for guide in guides:
        for numbers in _chunks([g for g in guide.weights if g in mine], batches, run):
            learned = torch.searchsorted(rows, torch.stack([batches[g].rows for g in numbers]))
            views = torch.searchsorted(own_rows, torch.cat([view_rows[g] for g in numbers]))
            classes = torch.cat([batches[g].classes for g in numbers])
            weights = torch.tensor([guide.weights[g] for g in numbers])
            learned, views, classes, weights = (part.to(run.device) for part in (learned, views, classes, weights))
            fixed = [part for part in (batches[g].fixed_rows for g in numbers) if part is not None]
            fixed_rows, targets = torch.stack(fixed).to(run.device) if fixed else None, None
            if guide.targets is not None:
                batch_class = classes.view(len(numbers), -1)[:, 0]
                targets = [(mean[batch_class], variance[batch_class]) for mean, variance in guide.targets]
            plans.append(TrainingPlan(guide, learned, views, classes, weights, fixed_rows, targets))
    return plans


def _turns(batches: Sequence[Batch], at_once: int | None) -> list[list[int]]:
    """Numbers of the batches that are optimised together: those of ``at_once`` images of each class, or all."""
    indices = sorted({batch.index for batch in batches})
    span = at_once or len(indices)
    chosen = [set(indices[i : i + span]) for i in range(0, len(indices), span)]
    return [[g for g, batch in enumerate(batches) if batch.index in some] for some in chosen]


def _chunks(numbers: Sequence[int], batches: Sequence[Batch], run: Run) -> Iterator[list[int]]:
    """Batches of equal size that pass through a teacher at once, bounded by their pixels; at least one each time."""
    height, width = run.task.shape[1:]
    most = run.forward_chunk_size(gradients=True) or TEACHER_CHUNK_PIXELS // (height * width)
    for size, same in itertools.groupby(numbers, key=lambda g: len(batches[g].classes)):
        equal = list(same)
        span = max(1, most // size)
        yield from (equal[i : i + span] for i in range(0, len(equal), span))


def cosine_lr_factor(progress: float) -> float:
    """Factor on the learning rate: from 1 to 0 over the run."""
    return (1 + math.cos(math.pi * progress)) / 2
