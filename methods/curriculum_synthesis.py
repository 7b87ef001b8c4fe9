"""Curriculum synthesis: images that trained teachers take for the real data, by their answers and BatchNorm statistics.

Squeeze the real data into teachers, recover images from them, relabel these. Each method below is a way through the
same steps; what papers change are arguments: who guides which images, where these start, how they are cropped, what may
move, and what labels the set brings.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condense import rng
from condense.augment import CropViews, ViewRule, Views, neighbours, send
from condense.config import one_of, require
from condense.errors import CondenseError
from condense.labels import (
    STATISTICS,
    DistanceLabels,
    HardLabels,
    Labels,
    PerViewLabels,
    SoftLabels,
    StaticLabels,
    TeacherLabels,
    answers,
    content,
    stored_answers,
    view_answers,
    view_distances,
)
from condense.light_labels import PoolLabels, Pruning, pool_answers
from condense.networks import Network
from condense.optimizer import Group
from condense.registry import method
from condense.run import VIEW_LABELS, VIEW_LABELS_STATE, Interrupted, Run
from condense.synthetic import Compensated, SyntheticOptions, SyntheticSet
from condense.tasks import Task, unit
from condense.teachers import Committee, TeacherOptions, provide

# -- BatchNorm moments ------------------------------------------------------------------------------------------------

Moments = tuple[Tensor, Tensor]
"""Means and biased variances of channels, a row for each group or class."""


class _Matched(torch.autograd.Function):
    """A BatchNorm by its running statistics, and how far each group's moments lie from ``mean`` and ``variance``, (C,)
    or a row for each group, in one node.

    With a frozen teacher both slopes are known beforehand, so backward is one pass over the map: dy * scale, plus what
    moves mean and variance.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, variance: Tensor, groups: int, shares: Any
    ) -> tuple[Tensor, Tensor]:
        wide, count = torch.promote_types(x.dtype, torch.float32), len(x) // groups
        flat = x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)
        # From sums, as torch's own var_mean is ten times as slow on a CPU: what cancels is (mean / deviation)^2 in
        # 10^7, and a conv's outputs have means of the size of their deviation.
        values, size = flat.to(wide), count * flat.shape[2]
        squares = torch.linalg.vector_norm(values, dim=2).square().view(groups, count, -1).sum(1) / size
        m = values.sum(2).view(groups, count, -1).sum(1) / size
        s = squares - m.square()
        gaps = m - mean.to(wide), s - variance.to(wide)
        lengths = [gap.norm(dim=1) for gap in gaps]
        # The slope of a length is a unit vector; 0 where there is no gap.
        along_mean, along_variance = (
            share / size * gap / length.clamp(min=torch.finfo(wide).tiny)[:, None]
            for share, gap, length in zip(shares, gaps, lengths)
        )
        ctx.save_for_backward(x, scale, m, along_mean, 2 * along_variance)
        shaped = (1, x.shape[1], *[1] * (x.dim() - 2))
        y = (x * scale.to(x.dtype).view(shaped)).add_(shift.to(x.dtype).view(shaped))
        return y, shares[0] * lengths[0] + shares[1] * lengths[1]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor, weight: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, m, along_mean, along_variance = ctx.saved_tensors
        factor = weight[:, None] * along_variance
        offset = weight[:, None] * along_mean - factor * m
        shaped = (len(x), x.shape[1], *[1] * (x.dim() - 2))
        each = len(x) // len(m)
        factor, offset = (part.repeat_interleave(each, 0).view(shaped).to(x.dtype) for part in (factor, offset))
        moved = (slope * scale.to(x.dtype).view(1, *shaped[1:])).add_(offset).add_(x * factor)
        return (moved, *[None] * 6)


class MatchedNorm(nn.Module):
    """A BatchNorm of a frozen teacher in eval mode that notes ``distances`` (groups,) of the moments that it sees.

    The distance of a group is ``importance * (shares[0] * |mean - running mean| + shares[1] * |variance - running
    variance|)``, plain Euclidean lengths over channels, variance biased; moments are taken over the images and pixels
    of the group. ``targets``, two tensors (groups, C), stand in for the running ones there, not in what comes out.
    """

    def __init__(
        self, norm: nn.modules.batchnorm._BatchNorm, shares: tuple[float, float], importance: float = 1.0
    ) -> None:
        super().__init__()
        assert norm.running_mean is not None and norm.running_var is not None
        ones = torch.ones_like(norm.running_mean)
        self.weight = nn.Parameter(ones.clone() if norm.weight is None else norm.weight.detach(), requires_grad=False)
        self.bias = nn.Parameter(ones - ones if norm.bias is None else norm.bias.detach(), requires_grad=False)
        self.running_mean: Tensor
        self.running_var: Tensor
        self.register_buffer("running_mean", norm.running_mean)
        self.register_buffer("running_var", norm.running_var)
        self.shares, self.importance = (importance * shares[0], importance * shares[1]), importance
        self.eps, self.groups = norm.eps, 1
        self.targets: Moments | None = None
        self.distances: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, ...) to the same shape and dtype; image i is of group i // (N / groups)."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - scale * self.running_mean
        mean, variance = self.targets or (self.running_mean, self.running_var)
        y, self.distances = _Matched.apply(x, scale, shift, mean, variance, self.groups, self.shares)
        return y


class Matcher(nn.Module):
    """A frozen copy of a teacher that answers, and says how far its maps lie from its BatchNorm statistics.

    Args:
        net: the teacher; it is not changed.
        first: weight of the first BatchNorm, in the order of the network's modules; all others weigh 1.
        shares: weights of means and of variances.
        averaged: distances are means over BatchNorms by their weights, not sums.
    """

    def __init__(
        self, net: Network, first: float = 10.0, shares: tuple[float, float] = (1.0, 1.0), averaged: bool = False
    ) -> None:
        super().__init__()
        self.averaged = averaged
        self.net: Network = copy.deepcopy(net).eval().requires_grad_(False)
        found = [(n, m) for n, m in self.net.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self.norms: list[MatchedNorm] = []
        for number, (name, norm) in enumerate(found):
            self.norms.append(MatchedNorm(norm, shares, 1.0 if number else first))
            self.net.set_submodule(name, self.norms[-1])

    def forward(
        self, views: Tensor, groups: int, fast: Callable[[], Any], targets: Sequence[Moments] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits float32 (N, classes) of views (N,C,H,W) of ``groups`` equal groups, and distances (groups,).

        ``fast``: makes the context for matrix work. ``targets``: what moments shall be, for each norm and group; the
        running statistics where None. A norm that is not used counts nothing.
        """
        for number, norm in enumerate(self.norms):
            norm.groups, norm.distances = groups, None
            norm.targets = None if targets is None else targets[number]
        with fast():
            embedding = self.net.embed(views)
        logits = self.net.classify(embedding.to(torch.promote_types(embedding.dtype, torch.float32)))
        used = [(norm.importance, norm.distances) for norm in self.norms if norm.distances is not None]
        total = torch.stack([distances for _, distances in used]).sum(0)
        return logits, total / sum(importance for importance, _ in used) if self.averaged else total


# -- views ------------------------------------------------------------------------------------------------------------

SCHEDULES = ("fixed", "step", "linear", "cosine")
LEAST = 0.08
"""Least share of the image that a crop keeps."""


def crop_scale(schedule: str, t: int, steps: int, milestone: float, least: float = LEAST) -> float:
    """CDA's lower bound of the crop's area at iteration ``t`` of ``steps``, from 1 (whole images) to ``least``.

    Args:
        schedule: fixed (``least`` all the time), step (1 until the milestone), linear or cosine (falling until then).
        t: iteration, from 0.
        steps: of the whole run.
        milestone: fraction of the steps after which it is ``least``.
        least: share of the area.
    """
    if schedule == "fixed" or t >= milestone * steps:
        return least
    done = t / (milestone * steps)
    falling = {"step": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return least + (1 - least) * falling[schedule]


def resampling(views: Views, shift: Tensor, size: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
    """Matrices that crop, enlarge, mirror and roll: a view of x (..., H, W) is ``rows @ x @ columns.mT``.

    Bilinear, like ``CropViews.apply``, then a cyclic roll. Products with small matrices have cheap, deterministic
    transposes, where indexing would add atomically.

    Args:
        views: R of them.
        shift: int64 (R, 2), by how many pixels down and to the right the view is rolled.
        size: of the view; the image's by default.

    Returns:
        rows (R, H', H) and columns (R, W', W), float32.
    """
    top, left, height, width = views.box.unbind(1)
    out = size or views.image_size
    rows = _stretching(views.image_size[0], out[0], top, height, torch.zeros_like(views.mirrored), shift[:, 0])
    return rows, _stretching(views.image_size[1], out[1], left, width, views.mirrored, shift[:, 1])


def _stretching(size: int, out: int, start: Tensor, length: Tensor, mirrored: Tensor, shift: Tensor) -> Tensor:
    """(R, out, size): ``length`` (R,) pixels from ``start`` drawn out to ``out``, mirrored, rolled by ``shift``."""
    places = (torch.arange(out)[None] - shift[:, None]) % out
    places = torch.where(mirrored[:, None], out - 1 - places, places)
    below, above, part = neighbours(places, out, length[:, None])
    share = part.float() / (2 * out)
    matrix = torch.zeros(len(start), out, size)
    matrix.scatter_add_(2, (start[:, None] + below)[..., None], (1 - share)[..., None])
    return matrix.scatter_add_(2, (start[:, None] + above)[..., None], share[..., None])


def seen(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Views (G, B, C, H', W') of images (G, B, C, H, W) by matrices (G, H', H) and (G, W', W), one pair a group."""
    groups, count, channels, height, width = images.shape
    tall = images.reshape(groups, count * channels * height, width) @ columns.mT
    tall = tall.view(groups, count * channels, height, -1)
    return (rows[:, None] @ tall).view(groups, count, channels, rows.shape[1], columns.shape[1])


# -- settings that all share ------------------------------------------------------------------------------------------

STORES = {"uint8": torch.uint8, "float16": torch.float16, "float32": torch.float32}
STARTS = ("noise", "real", "patches")
LABELS = ("per-view", "teacher", "static", "distances", "soft", "hard")
CHUNK_PIXELS = 1024 * 1024
"""Pixels that pass through a teacher at once on an accelerator: 1,024 images of 32x32, 20 of 224x224."""


@dataclass(frozen=True)
class Relabelling(TeacherOptions):
    """What labels a set brings, and who gives them."""

    labels: str = "per-view"
    """per-view (stored logits of augmented views), teacher (the teachers' weights; they answer while students learn),
    static (one vector of logits an image, mixed as images are), distances (NRR-DD's two numbers a view), soft, hard."""
    label_epochs: int = 300
    """Epochs of views that are labelled, where labels belong to views."""
    temperature: float = 20.0
    """Temperature of targets and loss."""
    squared: bool = True
    """Whether the loss is multiplied by the squared temperature. Released students on CIFAR and ImageNet-1K do without;
    their AdamW hardly minds, but SGD would hardly move."""
    label_scale: float = LEAST
    """Least share of the image in a labelled view."""
    label_pad: int = 0
    """Labelled views are shifted by up to so many pixels instead of being cropped; 0: cropped."""
    mix: str = "cutmix"
    """How labelled views are mixed with those of other images: none, cutmix or mixup."""
    mix_alpha: float = 1.0
    """Shares of the mixture are drawn from Beta(mix_alpha, mix_alpha)."""
    label_statistics: str = "running"
    """BatchNorm of the teachers that label: running, or batch (that of the labelled views themselves)."""
    label_micro: int = 8
    """Views that share statistics where label_statistics=batch."""
    calibrate: str = ""
    """FerKD's LOW,MID,TOP of the teacher's confidence in a view, for labels=per-view: below LOW and above TOP the view
    is left out, below MID its class, smoothed, takes the label's place. Empty: all labels as they are."""
    store: str = "uint8"
    """How images are kept: uint8, float16 or float32. Labels are those of the images as kept."""

    kinds: ClassVar[tuple[str, ...]] = LABELS  # pool too, where the settings have those of Pruning

    def __post_init__(self) -> None:
        self.check_teachers()
        one_of(self, labels=self.kinds, store=STORES, label_statistics=STATISTICS)
        require(self, label_epochs=(1, math.inf), label_micro=(2, math.inf), temperature=(1e-6, sys.float_info.max))
        self.rule(mirror=True)
        self.thresholds()
        if self.labels == "distances" and self.mix == "none":
            raise CondenseError("mix=none: labels=distances are to the classes of two images; take cutmix or mixup")

    def thresholds(self) -> list[float] | None:
        """``calibrate`` as three numbers; None where it is empty."""
        if not self.calibrate:
            return None
        if self.labels != "per-view":
            raise CondenseError(f"calibrate={self.calibrate}: serves labels=per-view, not labels={self.labels}")
        try:
            low, mid, top = map(float, self.calibrate.split(","))
        except ValueError:
            raise CondenseError(f"calibrate={self.calibrate}: must be LOW,MID,TOP, e.g. 0.15,0.3,0.95") from None
        return [low, mid, top]

    def rule(self, mirror: bool) -> ViewRule:
        """The views that are labelled."""
        return ViewRule(self.label_scale, 1.0, mirror, self.label_pad, self.mix, self.mix_alpha)


@dataclass(frozen=True)
class Recovery(Relabelling):
    """Hyper-parameters of recovering images from teachers; SRe2L's on small images."""

    steps: int = 1000
    """Iterations of each image."""
    init: str = "noise"
    """How images start: noise (N(0,1)), real (random real images) or patches (RDED's)."""
    lr_img: float = 0.25
    """Learning rate of Adam on the pixels; it falls to 0 along a cosine."""
    bn_weight: float = 0.01
    """Weight of the distances to BatchNorm statistics (lambda), which are sums over layers: deep teachers need less."""
    bn_first: float = 10.0
    """Weight of the first BatchNorm; all others weigh 1."""
    bn_mean: bool = False
    """Average the distances over BatchNorms instead of adding them up: one weight then serves teachers of any depth."""
    bn_variance: float = 1.0
    """Weight of variances; means weigh 1."""
    batch_classes: int = 100
    """Classes of a batch, which has one image of each; its images share moments and crops."""
    min_scale: float = LEAST
    """Least share of the image that a crop keeps; 1 for no crops."""
    schedule: str = "fixed"
    """Curriculum of the least share: fixed, or falling from 1 by step, linear or cosine (CDA)."""
    milestone: float = 1.0
    """Fraction of the steps at which the curriculum has arrived."""
    flip: bool = True
    """Whether views are mirrored at random; never where a mirror image is another class."""
    jitter: int = 4
    """Views are rolled by up to so many pixels, to the right and down."""
    two_sided: bool = False
    """Rolled to the left and up as well, as in SRe2L's program for Tiny-ImageNet."""
    per_image: bool = False
    """Crops drawn for each image; by default for each batch, as in all published programs."""

    at_once: int | None = None
    """Images of each class that move together; all by default. Fewer need less memory: beside all pixels once, some
    eight times the float32 pixels of these. A time limit then leaves the last ones as they started."""

    starts: ClassVar[tuple[str, ...]] = STARTS

    def __post_init__(self) -> None:
        super().__post_init__()
        largest = sys.float_info.max
        one_of(self, init=self.starts, schedule=SCHEDULES)
        require(
            self, steps=(1, math.inf), lr_img=(0, largest), bn_weight=(0, largest), bn_first=(0, largest),
            bn_variance=(0, largest), batch_classes=(1, math.inf), min_scale=(1e-4, 1), milestone=(0, 1),
            jitter=(0, math.inf), at_once=(1, math.inf),
        )  # fmt: skip


# -- steps that the methods share -------------------------------------------------------------------------------------


def squeezed(config: TeacherOptions, run: Run) -> Committee:
    """The teachers of a run, all with BatchNorm: of the file that was named, of the cache, or trained now."""
    if run.task.transform.kind != "standardise":
        raise CondenseError("zca=true: recovered pixels are kept in their range, which whitening does not have")
    start = getattr(config, "init", "")
    if start in ("patches", "critical"):
        side(run.task, 1, f"init={start}")
    return provide(
        run, config.squeezing(run.task), file=config.teachers, architectures=config.architectures(run.network),
        count=config.num_teachers, batch_norm=True,
    )  # fmt: skip


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


def drawn(config: Recovery, run: Run, index: int, rows: int, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Matrices of the views of step ``index`` (see :func:`resampling`).

    Args:
        config: of the method.
        run: its run.
        index: the step.
        rows: views that are drawn, one for each batch or image of the set.
        wanted: which of them are made into matrices, int64.
    """
    least = crop_scale(config.schedule, index, config.steps, config.milestone, config.min_scale)
    crops = CropViews(least, 1.0, config.flip and run.task.mirror)
    views = crops.draw(rng.Draws(run.seed, "crop", index), rows, (run.task.shape[1], run.task.shape[2]))
    reach, low = (2 * config.jitter + 1, config.jitter) if config.two_sided else (config.jitter + 1, 0)
    shift = rng.Draws(run.seed, "roll", index).integers(reach, (rows, 2)) - low
    tall, wide = (send(matrix, run.device) for matrix in resampling(views[wanted], shift[wanted]))
    return tall, wide


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


def started(config: Recovery, run: Run, net: Network) -> SyntheticSet:
    """The set as it starts: noise, real images, or RDED's patches, scored by ``net``."""
    if config.init == "patches":
        return from_pixels(run, confident_patches(run, net, RDED()))
    return SyntheticSet.create(run.task, run.ipc, SyntheticOptions(init=config.init), seed=run.seed, device=run.device)


def from_pixels(run: Run, pixels: Tensor) -> SyntheticSet:
    """A set that starts from images (classes * ipc, C,H,W) in pixel space, sorted by class."""
    classes = torch.arange(run.task.num_classes).repeat_interleave(run.ipc)
    return SyntheticSet(run.task, run.task.transform(pixels.to(run.device)).contiguous(), classes)


def finished(
    config: Relabelling,
    run: Run,
    images: Tensor,
    classes: Tensor,
    committee: Committee,
    weights: Sequence[float] | None = None,
    labelling: Callable[..., Labels] | None = None,
) -> SyntheticSet:
    """The set as it is kept, with the labels that the committee gives the images as kept.

    Args:
        config: of the method.
        run: its run.
        images: (N,C,H,W) in training space, sorted by class.
        classes: int64 (N,).
        committee: the teachers.
        weights: of their logits; equal where None.
        labelling: what makes the labels, in place of :func:`relabelled`.
    """
    stored = kept(run.task.transform.inverse(images.detach()).clamp(0, 1), config.store)
    labels = (labelling or relabelled)(config, run, stored, classes, committee, weights)
    made = SyntheticSet(run.task, stored, classes, space="pixel", labels=labels)
    made.tensors["images"].requires_grad_(False)
    if labels.kind != "hard":
        made.label_source = {"teachers": committee.describe(), "weights": list(weights) if weights else None}
    return made


def kept(pixels: Tensor, store: str) -> Tensor:
    """Pixels in [0,1] as a file keeps them; uint8 are rounded, never compressed."""
    return (pixels * 255).round().to(torch.uint8) if store == "uint8" else pixels.to(STORES[store])


def relabelled(
    config: Relabelling,
    run: Run,
    stored: Tensor,
    classes: Tensor,
    committee: Committee,
    weights: Sequence[float] | None = None,
) -> Labels:
    """The labels that a committee gives stored images (N,C,H,W), of the kind that ``config`` names."""
    task, count = run.task, run.task.num_classes
    images, rule = task.transform(unit(stored)), config.rule(task.mirror)
    seed, teacher = rng.key(run.seed, "labels"), committee.mean(weights)
    kind, temperature, squared = config.labels, config.temperature, config.squared
    statistics: dict[str, Any] = {"statistics": config.label_statistics, "micro": config.label_micro}
    # A rehearsal asks once, and is told the size of all.
    epochs, began = 1 if run.rehearses else config.label_epochs, time.monotonic()
    how: dict[str, Any] = {**statistics, "classes": count, "quiet": run.quiet or not run.ranks.leads}
    with run.fast():
        if kind == "hard":
            return HardLabels(classes, count)
        if kind == "soft":
            return SoftLabels(answers(teacher, images, **statistics))
        if kind == "static":
            return StaticLabels(answers(teacher, images, **statistics).half(), seed, rule, temperature, squared)
        if kind == "teacher":
            members, names = zip(*((member.network, member.name) for member in committee.members))
            return TeacherLabels(
                members, len(images), seed, rule, temperature, squared, weights=weights, names=names,
                shape=task.shape, **statistics,
            )  # fmt: skip
        two, pruning = kind == "distances", config if kind == "pool" and isinstance(config, Pruning) else None
        records = asked = config.label_epochs if pruning is None else pruning.count(config.label_epochs)
        if pruning is not None and config.label_statistics == "batch":  # those beside what is kept are asked about too
            asked = min(config.label_epochs, records * count)
        with in_making(config, run, stored, seed, records, 2 if two else count) as where:
            if two:
                found = view_distances(teacher, images, classes, epochs, rule, seed, **how, **where)
            elif pruning is not None and not run.rehearses:
                found = pool_answers(teacher, images, classes, epochs, rule, seed, records, **how, **where)
            else:
                found = view_answers(teacher, images, epochs, rule, seed, **how, **where)
    if run.rehearses:
        run.expected_labelling = (time.monotonic() - began) * asked
        found = found.expand(records, -1, -1)
    if two:
        return DistanceLabels(found, classes, count, seed, rule, **statistics)
    if pruning is not None:
        return PoolLabels.recorded(
            found, config.label_epochs, pruning.encode, pruning.cooled(), seed=seed, views=rule,
            temperature=temperature, squared=squared, hard=classes, **statistics,
        )  # fmt: skip
    return PerViewLabels(
        found, seed, rule, temperature, squared, calibrate=config.thresholds(),
        hard=classes if config.calibrate else None, **statistics,
    )  # fmt: skip


@contextlib.contextmanager
def in_making(
    config: Relabelling, run: Run, stored: Tensor, seed: int, records: int, width: int
) -> Iterator[dict[str, Any]]:
    """Where ``records`` labels of views of each image go while they are made, as keywords of ``view_answers``: into a
    file of the run's folder, so that memory holds one epoch and a run that was killed goes on in the middle; else into
    memory."""
    if run.directory is None or run.rehearses or not run.ranks.leads:
        yield {}
        return

    def stop() -> None:
        if run.asked_to_stop and run.ranks.world == 1:
            raise Interrupted(f"stopped while labelling views; go on with: condense resume {run.directory}")

    path, state = run.directory / VIEW_LABELS, run.directory / VIEW_LABELS_STATE
    key = [content({"images": stored}), seed, str(config)]
    with stored_answers(path, state, key, (records, len(stored), width), stop) as where:
        yield where


# -- SRe2L and CDA ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SRe2L(Recovery):
    """Hyper-parameters of SRe2L."""


@method(
    "sre2l", config=SRe2L, year=2023, labels="per-view", protocol="sre2l-v1", network="resnet18-bn",
    paper="Squeeze, Recover and Relabel: Dataset Condensation at ImageNet Scale From A New Perspective",
)  # fmt: skip
def sre2l(task: Task, config: SRe2L, run: Run) -> SyntheticSet:
    """Dreams images that a teacher gives their class and finds the real data's moments in; then labels their views.

    When to use: many classes and large images, where matching costs too much; with soft labels. Cost: a teacher, then
    ``steps`` passes forward and back over the set. Known failure: with hard labels such images teach little; small
    nets with few BatchNorms say little about images.

    Yin, Xing & Shen, NeurIPS 2023. L = CE + bn_weight * (sum over BatchNorms, the first times 10, of |mean - running
    mean| + |variance - running variance|). The released program saves JPEG, crops nothing at 32x32 (min_scale=1
    flip=false), and labels CIFAR with batch statistics (label_statistics=batch); images here are 8-bit at least.
    """
    committee = squeezed(config, run)
    synthetic = started(config, run, committee.members[0].network)
    batches, count = by_class(run, config.batch_classes), len(committee.members)
    # Several teachers take turns: image number k is recovered from teacher k modulo their number.
    guides = [
        Guide(matcher(config, member.network), {g: 1.0 for g, one in enumerate(batches) if one.index % count == m})
        for m, member in enumerate(committee.members)
    ]
    run.salvage = functools.partial(finished, config, run, synthetic.images, synthetic.classes, committee)
    recover(config, run, synthetic, guides, batches)
    return run.salvage()


def matcher(config: Recovery, net: Network) -> Matcher:
    """A teacher as it guides."""
    return Matcher(net, config.bn_first, (1.0, config.bn_variance), config.bn_mean)


@dataclass(frozen=True)
class CDA(Recovery):
    """Hyper-parameters of CDA; those of Tiny-ImageNet."""

    steps: int = 4000
    """See SRe2L's."""
    lr_img: float = 0.4
    """See SRe2L's."""
    bn_weight: float = 0.05
    """See SRe2L's."""
    schedule: str = "cosine"
    """See SRe2L's. The released program's default milestone of 0 means none."""


@method(
    "cda", config=CDA, year=2024, labels="per-view", protocol="cda-v1", network="resnet18-bn",
    paper="Dataset Distillation via Curriculum Data Synthesis in Large Data Era",
)  # fmt: skip
def cda(task: Task, config: CDA, run: Run) -> SyntheticSet:
    """SRe2L from easy to hard: crops hold the whole image at first, and ever smaller parts of it later.

    When to use: in place of SRe2L, at no cost. Cost: as SRe2L. Known failure: as SRe2L.

    Yin & Shen, TMLR 2024. Only the lower bound of the crop's area falls; the upper one is 1 throughout.
    """
    return sre2l(task, config, run)


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
    run.salvage = functools.partial(finished, config, run, synthetic.images, synthetic.classes, committee)
    recover(config, run, synthetic, guides, batches)
    return run.salvage()


# -- CV-DD ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CVDD(Recovery):
    """Hyper-parameters of CV-DD."""

    steps: int = 4000
    """See SRe2L's."""
    init: str = "patches"
    """See SRe2L's."""
    label_statistics: str = "batch"
    """See SRe2L's."""
    num_teachers: int = 5
    """Teachers of each architecture."""
    voters: int = 2
    """Teachers that guide an image together."""
    priors: str = ""
    """How well students do on sets made from each teacher alone, in per cent, joined by commas; by default all vote
    alike."""
    vote_temperature: float = 5.0
    """Temperature of the votes in recovery."""
    label_temperature: float = 10.0
    """Temperature of the votes in labels, where all teachers take part."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, voters=(1, math.inf), vote_temperature=(1e-6, math.inf), label_temperature=(1e-6, math.inf))
        self.prior_list()

    def prior_list(self) -> list[float]:
        """The priors as numbers; none where none are given."""
        try:
            return [float(word) for word in self.priors.split(",")] if self.priors else []
        except ValueError:
            raise CondenseError(f"priors={self.priors}: must be numbers joined by commas, one a teacher") from None


def votes(priors: Sequence[float], temperature: float) -> list[float]:
    """Weights of teachers: the softmax of their priors (in per cent) over ``temperature``."""
    return torch.tensor(priors, dtype=torch.float64).div(temperature).softmax(0).tolist()


def committees(priors: Sequence[float], voters: int, ipc: int, key: Sequence[int | str]) -> list[tuple[int, ...]]:
    """Which teachers guide image number k of every class, for each k below ``ipc``.

    One image: the teachers with the highest priors. Else all subsets in turn, in random order, then random ones.
    """
    if ipc == 1:
        best = sorted(range(len(priors)), key=lambda i: -priors[i])[:voters]
        return [tuple(sorted(best))]
    every = list(itertools.combinations(range(len(priors)), voters))
    draws = rng.Draws(*key)
    order = draws.permutation(len(every)).tolist()
    more = draws.integers(len(every), max(ipc - len(every), 0)).tolist()
    return [every[i] for i in [*order, *more][:ipc]]


@method(
    "cvdd", config=CVDD, year=2025, labels="per-view", protocol="cvdd-v1", network="resnet18-bn",
    paper="Dataset Distillation via Committee Voting",
)  # fmt: skip
def cvdd(task: Task, config: CVDD, run: Run) -> SyntheticSet:
    """SRe2L from real patches, each image guided by two teachers of a committee, labelled by all with batch statistics.

    When to use: where several teachers can be afforded. Cost: SRe2L's times ``voters``, and the teachers. Known
    failure: labels by batch statistics depend on the views labelled together.

    Cui, Li, Ma, Bi, Luo & Shen, 2025. Votes are the softmax of priors over 5 in recovery, over 10 in labels; priors are
    what students reach on a set from one teacher alone, so they cost a distillation each: by default all vote alike.
    The released labels keep dropout on; here it is off.
    """
    wanted, given = config.wanted(run.network), config.prior_list()
    if len(given) not in (0, wanted) or config.voters > wanted:
        raise CondenseError(
            f"priors={config.priors or 'none'}, voters={config.voters}: there are {wanted} teachers; give a prior for "
            "each and at most as many voters (num_teachers=, committee=)"
        )
    committee = squeezed(config, run)
    count = len(committee.members)  # fewer than wanted where time was short
    priors, voters = given[:count] or [0.0] * count, min(config.voters, count)
    synthetic = started(config, run, committee.members[0].network)
    batches = by_class(run, config.batch_classes)
    chosen = committees(priors, voters, run.ipc, (run.seed, "committees"))
    shares = [dict(zip(some, votes([priors[m] for m in some], config.vote_temperature))) for some in chosen]
    guides = [
        Guide(
            matcher(config, member.network),
            {g: shares[one.index][m] for g, one in enumerate(batches) if m in shares[one.index]},
        )
        for m, member in enumerate(committee.members)
    ]
    weights = votes(priors, config.label_temperature)
    run.salvage = functools.partial(finished, config, run, synthetic.images, synthetic.classes, committee, weights)
    recover(config, run, synthetic, guides, batches)
    return run.salvage()


# -- INFER ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class INFER(Recovery):
    """Hyper-parameters of INFER; those of CIFAR."""

    init: str = "real"
    """What compensators are added to: real (random real images)."""
    bn_weight: float = 1.0
    """See SRe2L's; 0.01 for ImageNet-1K."""
    min_scale: float = 1.0
    """See SRe2L's; 0.08 for larger images."""
    flip: bool = False
    """See SRe2L's; true for larger images."""
    num_teachers: int = 4
    """Teachers of each architecture; each has compensators of its own (M in all)."""
    labels: str = "static"
    """See SRe2L's."""
    temperature: float = 30.0
    """See SRe2L's."""
    label_pad: int = 4
    """See SRe2L's."""
    mix: str = "mixup"
    """See SRe2L's."""
    mix_alpha: float = 0.8
    """See SRe2L's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init != "real":
            raise CondenseError(f"init={self.init}: compensators are added to real images; leave it at real")


def indices(ipc: int, classes: int, teachers: int) -> int:
    """K: real images a class, so that these and K * ``teachers`` compensators need no more room than ``ipc`` images."""
    return math.floor(ipc / (teachers / classes + 1))


@method(
    "infer", config=INFER, year=2025, labels="static", protocol="infer-v1", network="resnet18-bn",
    paper="Breaking Class Barriers: Efficient Dataset Distillation via Inter-Class Feature Compensator",
)  # fmt: skip
def infer(task: Task, config: INFER, run: Run) -> SyntheticSet:
    """Adds to real images compensators that all classes share, one for each teacher, and keeps one label an image.

    When to use: where labels must be small, from some images per class on. Cost: SRe2L's for one image in each batch.
    Known failure: needs more than one image per class; students see (M + 1) times as many images as are kept apart.

    Zhang, Du, Li, Xie & Zhou, ICLR 2025. Kept are K real images a class and K * M compensators, added when the set is
    used; K is such that they need the room of ``ipc`` images a class. Labels are the teachers' mean logits, mixed as
    images are. The released program keeps every sum as a JPEG.
    """
    committee = squeezed(config, run)
    count, teachers = task.num_classes, len(committee.members)
    number = indices(run.ipc, count, teachers)
    if number < 1:
        raise CondenseError(
            f"--ipc {run.ipc}: {teachers} compensators and the real images of {count} classes do not fit; give at "
            f"least {math.ceil(1 + teachers / count)}, or num_teachers="
        )
    real = SyntheticSet.create(task, number, SyntheticOptions(), seed=run.seed, device=run.device)
    base = real.images.detach()
    shared = SyntheticSet(task, torch.zeros(number * teachers, *task.shape, device=run.device),
                          torch.zeros(number * teachers, dtype=torch.int64))  # fmt: skip
    # Batches of other classes add to the same compensator.
    batches = [
        Batch(k, torch.tensor([k * teachers + m]), part, part * number + k)
        for k in range(number) for m in range(teachers) for part in torch.arange(count).split(config.batch_classes)
    ]  # fmt: skip
    guides = [
        Guide(
            matcher(config, member.network), {g: 1.0 for g, one in enumerate(batches) if int(one.rows) % teachers == m}
        )
        for m, member in enumerate(committee.members)
    ]

    def done() -> SyntheticSet:
        stage, inverse = Compensated(count, number, teachers), task.transform.inverse
        added = inverse(shared.images.detach()) - inverse(torch.zeros_like(shared.images))
        stored = kept(torch.cat([inverse(base).clamp(0, 1), stage.encode(added)]), config.store)
        decoded, _ = stage(unit(stored), torch.arange(len(stored)))
        classes = torch.arange(count, device=run.device).repeat_interleave(stage.decoded)
        labels = relabelled(config, run, decoded, classes, committee)
        rows = torch.cat([real.classes, shared.classes.to(run.device)])
        made = SyntheticSet(task, stored, rows, space="pixel", stages=[stage], labels=labels)
        made.tensors["images"].requires_grad_(False)
        made.label_source = {"teachers": committee.describe(), "weights": None}
        return made

    run.salvage = done
    recover(config, run, shared, guides, batches, fixed=base, clamp=False)
    return done()


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
    run.salvage = functools.partial(finished, config, run, synthetic.images, own, committee)
    recover(config, run, synthetic, [guide], batches, mask=mask)
    return run.salvage()


# -- RDED -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RDED(Relabelling):
    """Hyper-parameters of RDED."""

    pool: int = 300
    """Real images of each class that crops are taken from."""
    crops: int = 5
    """Crops of each of these, of which the surest counts."""
    factor: int = 1
    """Each image is a collage of factor x factor crops; 2 from 128x128 pixels on."""
    labels: str = "teacher"
    """See SRe2L's."""
    label_scale: float = 1.0
    """See SRe2L's; published is 1 / factor."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, pool=(1, math.inf), crops=(1, math.inf), factor=(1, math.inf))


def square_crops(images: Tensor, draws: rng.Draws, crops: int, size: int) -> tuple[Tensor, Views]:
    """Random square crops (N * crops, C, size, size) of images (N,C,S,S'), and their boxes; image by image.

    Areas are uniform in 8 to 100 % of the largest square, places too.
    """
    count, _, height, width = images.shape
    rows = count * crops
    edge = (draws.uniform(rows, LEAST, 1.0).double().sqrt() * min(height, width)).round().long().clamp(min=1)
    unit = draws.uniform((rows, 2)).double()
    top = (unit[:, 0] * (height - edge + 1)).long()
    left = (unit[:, 1] * (width - edge + 1)).long()
    views = Views((height, width), torch.stack([top, left, edge, edge], 1), torch.zeros(rows, dtype=torch.bool))
    return cropped(images.repeat_interleave(crops, 0), views, size), views


def cropped(images: Tensor, views: Views, size: int) -> Tensor:
    """The box of each image (N,C,H,W), resized to (N,C,size,size)."""
    tall, wide = resampling(views, torch.zeros(len(views), 2, dtype=torch.int64), (size, size))
    return seen(images[:, None], tall.to(images.device), wide.to(images.device))[:, 0]


def _scores(run: Run, net: Network, crops: Tensor, classes: Tensor) -> Tensor:
    """Cross-entropy (N,) of crops, padded with zeros to the size of images."""
    height, width = run.task.shape[1:]
    down, right = height - crops.shape[2], width - crops.shape[3]
    padded = F.pad(crops, (right // 2, right - right // 2, down // 2, down - down // 2))
    return F.cross_entropy(answers(net, padded), classes, reduction="none")


def pooled(run: Run, c: int, pool: int) -> Tensor:
    """Up to ``pool`` random real images of class ``c``, in training space."""
    return run.task.per_class(pool, (run.seed, "pool"), [c])[0]


def side(task: Task, factor: int, words: str) -> int:
    """Of a crop, in pixels; refuses what cannot be cut into squares, by the user's ``words``."""
    _, height, width = task.shape
    if height != width or height % factor:
        raise CondenseError(f"{words}: images of {task.name} are {height}x{width}; crops need squares"
                            + f" that {factor} divides" * (factor > 1))  # fmt: skip
    return height // factor


def surest(run: Run, net: Network, config: RDED, c: int) -> tuple[Tensor, Tensor, Views]:
    """The crops (M,C,s,s) of class ``c`` that the teacher is surest of, M = ipc * factor^2, whole real images
    (M,C,H,W) that they are of, and where they lie.

    Of each real image the crop with the lowest cross-entropy counts, of these the lowest are taken; where the pool is
    too small, crops come again.
    """
    size, need = side(run.task, config.factor, f"factor={config.factor}"), run.ipc * config.factor**2
    images = pooled(run, c, config.pool)
    crops, views = square_crops(images, rng.Draws(run.seed, "patches", c), config.crops, size)
    classes = torch.full((len(crops),), c, device=crops.device)
    scores = _scores(run, net, crops, classes).view(len(images), config.crops)
    least, which = scores.min(1)
    order = least.argsort(stable=True)
    order = order[torch.arange(need, device=order.device) % len(order)]
    chosen = order * config.crops + which[order]
    return crops[chosen], images[order], views[chosen.cpu()]


def confident_patches(run: Run, net: Network, config: RDED) -> Tensor:
    """RDED's images (classes * ipc, C,H,W) in pixel space: collages of the crops that the teacher is surest of."""
    tiles = torch.cat([surest(run, net, config, c)[0] for c in range(run.task.num_classes)])
    return run.task.transform.inverse(collages(tiles, config.factor)).clamp(0, 1)


def collages(tiles: Tensor, factor: int) -> Tensor:
    """Images (N,C,S,S) of factor x factor tiles (N * factor^2,C,s,s) each, row by row."""
    grid = tiles.view(-1, factor, factor, *tiles.shape[1:])
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(len(grid), tiles.shape[1], factor * tiles.shape[2], -1)


def cut_up(images: Tensor, factor: int) -> Tensor:
    """The tiles of :func:`collages`."""
    count, channels, height, width = images.shape
    grid = images.view(count, channels, factor, height // factor, factor, width // factor)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels, height // factor, width // factor)


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


@method(
    "rded", config=RDED, year=2024, order=0, labels="teacher", protocol="rded-v1", network="resnet18-bn",
    paper="On the Diversity and Realism of Distilled Dataset: An Efficient Dataset Distillation Paradigm",
)  # fmt: skip
def rded(task: Task, config: RDED, run: Run) -> SyntheticSet:
    """Keeps the crops of real images that a teacher is surest of, as collages, with the teacher's labels; no descent.

    When to use: as the control that every recovered set must beat, and as a good set in minutes. Cost: a teacher, and
    one pass over some crops. Known failure: sure crops are alike, so gains over random images shrink as sets grow.

    Sun, Shi, Yang & Lin, CVPR 2024. The released students also permute the tiles of collages, which is not done here;
    with factor=1 there is nothing to permute. The paper's labels of regions are not in the released program either. Of
    several teachers the first scores, all label.
    """
    side(task, config.factor, f"factor={config.factor}")
    committee = squeezed(config, run)
    synthetic = from_pixels(run, confident_patches(run, committee.members[0].network, config))
    return finished(config, run, synthetic.images, synthetic.classes, committee)
