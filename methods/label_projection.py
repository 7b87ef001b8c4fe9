"""Label projection (HeLlO, ICCV 2025): a public network with few changed weights says what images show."""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condense import networks, projectors, rng
from condense.augment import Standardise, ViewRule
from condense.banks import groups
from condense.config import one_of, require
from condense.errors import CondenseError
from condense.labels import Labels, answers, check_loss, mixed
from condense.methods.curriculum_synthesis import (
    LABELS,
    RDED,
    Relabelling,
    confident_patches,
    cropped,
    cut_up,
    finished,
    from_pixels,
    side,
    squeezed,
    surest,
)
from condense.optimizer import Group
from condense.projectors import Backbone, Encoder, Projector, ProjectorLabels
from condense.registry import method
from condense.run import Run
from condense.students import Recipe, Student, train
from condense.synthetic import SyntheticSet
from condense.tasks import Task
from condense.teachers import Committee

MEANS = 200
"""Real images of each class whose mean features start a projector's head."""
REHEARSED = 4
"""Steps that tell how long one takes, the first apart."""
TILES = 256
"""Patches that pass through the public network at once while images are refined."""

# Making a projector ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Projection:
    """How a projector is made."""

    backbone: str = projectors.SHIPPED[0]
    """Public network: one that comes with the package, FILE.h5 of `condense teachers`, or torchvision:NAME, timm:NAME
    or open_clip:NAME@TAG, each also with @FILE of its weights. Published is a CLIP, open_clip:RN50@openai."""
    adapter_rank: int = 8
    """Rank of the changes of its weights."""
    head: str = ""
    """How the head starts: text (names of classes in the backbone's text tower) or mean (the classes' mean features);
    text where there is such a tower."""
    head_rank: int = 64
    """Rank of the change of a head of text; a head of means is stored whole."""
    prompts: str = projectors.PROMPT
    """What names of classes are put into, several joined by |."""
    projector_steps: int = 1000
    """Steps of its training on the real data."""
    projector_lr: float = 2e-3
    """Learning rate of AdamW in it; it falls to 0 along a cosine."""
    projector_batch: int = 128
    """Real images of a step."""
    hard_weight: float = 0.1
    """Weight of the cross-entropy with the real classes (lambda) beside the squared difference to the teachers'
    logits. Not published."""

    def check_projection(self) -> None:
        """For ``__post_init__``: refuses settings out of range, and words that are none."""
        one_of(self, head=("", *projectors.HEADS))
        require(
            self, adapter_rank=(1, math.inf), head_rank=(1, math.inf), projector_steps=(1, math.inf),
            projector_batch=(1, math.inf), projector_lr=(0, sys.float_info.max), hard_weight=(0, sys.float_info.max),
        )  # fmt: skip
        if not all("{}" in prompt for prompt in self.prompts.split("|")):
            raise CondenseError(f"prompts={self.prompts}: each needs {{}} where the class stands")


class Lessons:
    """What a projector learns from: views of real images with the logits that weak teachers give them (row 0 of the
    targets) and their classes (row 1)."""

    per_view = True

    def __init__(
        self,
        task: Task,
        weak: nn.Module,
        rule: ViewRule,
        seed: int,
        hard_weight: float,
        statistics: str = "running",
        micro: int = 8,
        key: str = "",
    ) -> None:
        self.task, self.weak, self.rule, self.seed, self.hard_weight = task, weak, rule, seed, hard_weight
        self.asked: dict[str, Any] = {"statistics": statistics, "micro": micro}
        self.key = f"{rule} {seed} {hard_weight} {self.asked} {key}"
        self.size = len(task.train)
        self.labels = torch.as_tensor(task.train.labels)

    def batch(self, ids: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """Views (B,C,H,W) of the images ``ids``, mixed among themselves, and targets (B, 2, classes)."""
        images = self.task.batch(ids)
        own = torch.arange(len(ids), device=images.device)
        seed = rng.key(self.seed, "lesson", epoch, int(ids[0]))  # an image comes once an epoch
        drawn = self.rule.draw(seed, 0, len(ids), self.task.shape[1:]).to(images.device)
        views = self.rule.apply(images, own, drawn)
        truth = F.one_hot(self.labels[ids.cpu()], self.task.num_classes).float().to(images.device)
        return views, torch.stack([answers(self.weak, views, **self.asked), mixed(truth, own, drawn)], 1)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """MSE(f(x), y') + lambda CE(f(x), y)."""
        return F.mse_loss(logits, targets[:, 0]) + self.hard_weight * F.cross_entropy(logits, targets[:, 1])


def fitted(
    task: Task,
    weak: nn.Module,
    config: Projection,
    rule: ViewRule,
    seed: int,
    *,
    device: torch.device,
    statistics: str = "running",
    micro: int = 8,
    precision: str = "fp32",
    checkpoint: Path | None = None,
    report: Callable[[int], None] | None = None,
) -> tuple[Projector, dict[str, Any]]:
    """A projector trained on the real data, and what a file states of it.

    Args:
        task: the real data; gives classes and training space.
        weak: teachers, from training space to logits.
        config: what is adapted and how it is trained.
        rule: of the views that it learns from, which should be those of its use.
        seed: of everything that is drawn.
        statistics, micro: of the teachers' BatchNorm, see :func:`condense.labels.answers`.
        device, precision: of the training.
        checkpoint, report: see :func:`condense.students.train`.

    Raises:
        CondenseError: the backbone cannot be had or take such images, or its head cannot start as asked.
    """
    transform = projectors.plain(task.transform, "labels=projector")
    backbone = projectors.find(config.backbone, task.shape, device)
    if head_of(config, backbone) == "text":
        assert backbone.text is not None
        start = backbone.text([str(name) for name in task.classes], config.prompts.split("|"))
    else:

        def some(c: int) -> Tensor:
            return transform.inverse(task.per_class(MEANS, (seed, "means"), [c])[0])

        each = [functools.partial(some, c) for c in range(task.num_classes)]
        start = projectors.means(backbone.encoder, each)
    pixels = transform.inverse(task.batch(torch.arange(2)))
    made, known = untrained(backbone, config, task.classes, start.to(device), transform, pixels, seed)
    recipe = Recipe(
        steps=config.projector_steps, batch=config.projector_batch, lr=config.projector_lr, momentum=0.9,
        weight_decay=0.0, drops=(), optimizer="adamw", schedule="cosine",
    )  # fmt: skip
    lessons = Lessons(task, weak, rule, seed, config.hard_weight, statistics, micro, str(config))
    train(
        [Student(made, lessons, rng.key(seed, "projector"))], recipe, device=device, precision=precision,
        report=report, checkpoint=checkpoint, together=False,
    )  # fmt: skip
    if not all(bool(weight.half().isfinite().all()) for weight in made.parameters()):  # as they will be kept
        raise CondenseError(f"diverged: the projector's weights are not finite; lower projector_lr, now "
                            f"{config.projector_lr:g}")  # fmt: skip
    return made, known


def head_of(config: Projection, backbone: Backbone) -> str:
    """How the head starts.

    Raises:
        CondenseError: of text, which the backbone does not have.
    """
    if config.head == "text" and backbone.text is None:
        raise CondenseError(f"head=text: backbone={config.backbone} has no text tower; take head=mean")
    return config.head or ("text" if backbone.text is not None else "mean")


def untrained(
    backbone: Backbone,
    config: Projection,
    classes: Sequence[Any],
    start: Tensor,
    transform: Standardise,
    pixels: Tensor,
    seed: int = 0,
) -> tuple[Projector, dict[str, Any]]:
    """A projector as its training begins, and what a file states of it.

    Args:
        backbone: the public network.
        config: what is adapted.
        classes: their names.
        start: (D, classes), the head.
        transform: from pixels to the training space of the set.
        pixels: (B,C,H,W), some images.
        seed: of its random values.
    """
    head, names = head_of(config, backbone), projectors.adapted(backbone.encoder, pixels)
    rank = config.head_rank if head == "text" else 0
    made = Projector(backbone.encoder, names, config.adapter_rank, start, rank, backbone.scale, transform, seed)
    known = {
        "backbone": {**backbone.known, "bytes": backbone.external(head)}, "names": names, "rank": config.adapter_rank,
        "head_rank": rank, "head": head, "shape": list(pixels.shape[1:]), "mean": transform.mean.tolist(),
        "std": transform.std.tolist(),
    }  # fmt: skip
    if head == "text":
        known |= {"classes": [str(name) for name in classes], "prompts": config.prompts.split("|")}
    return made, known


def projector_bytes(shape: networks.Shape, classes: Sequence[Any], config: Projection | None = None) -> tuple[int, int]:
    """Bytes of labels=projector for images (C,H,W), in the file and of the public network; settings are the usual ones
    when None."""
    config = config or Projection()
    backbone = projectors.find(config.backbone, shape, torch.device("cpu"))
    pixels, middle = torch.rand(2, *shape, generator=rng.generator("layout")), torch.full((shape[0],), 0.5)
    start = torch.zeros(answers(backbone.encoder, pixels).shape[1], len(classes))
    made, known = untrained(backbone, config, classes, start, Standardise(middle, middle), pixels)
    labels = ProjectorLabels(known, made.arrays(), 0, 0)
    return labels.nbytes(), labels.external_nbytes()


# HeLlO ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeLlO(Projection, RDED):
    """Hyper-parameters of HeLlO; what is not published is ours, tried on 32x32 images."""

    labels: str = "projector"
    """See SRe2L's; projector: a public network's answers after small changes of its weights."""
    teacher_epochs: int = 10
    """See SRe2L's. Weak teachers serve small sets best; published are nine checkpoints of one training."""
    refine_steps: int = 100
    """Steps in which patches that are kept smaller than they are seen come nearer to the large ones, in features of
    the public network; with factor=1 none are."""
    refine_lr: float = 0.01
    """Learning rate of Adam on their pixels."""
    loss_kind: str = "kl"
    """Of students: kl (at the temperature), or mse (of logits), as published."""
    gamma: float = 0.0
    """loss_kind=mse: weight of the cross-entropy with the images' classes (beta). Not published."""

    kinds: ClassVar[tuple[str, ...]] = (*LABELS, "projector")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_projection()
        check_loss(self.loss_kind, self.gamma, torch.zeros(0))
        require(self, refine_steps=(0, math.inf), refine_lr=(0, sys.float_info.max))


def features(encoder: Encoder, run: Run, images: Tensor) -> Tensor:
    """Features (N, D) that the public network finds in images (N,C,H,W) in training space."""
    with run.fast():
        parts = [encoder(run.task.transform.inverse(part)).float() for part in images.split(TILES)]
    return torch.cat(parts)


def enlarged(tiles: Tensor, size: int) -> Tensor:
    """Tiles (N,C,s,s) as students see them once they are cut out: (N,C,size,size)."""
    return F.interpolate(tiles, (size, size), mode="bilinear", align_corners=False)


def projected(
    config: Relabelling,
    run: Run,
    stored: Tensor,
    classes: Tensor,
    committee: Committee,
    weights: Sequence[float] | None = None,
) -> Labels:
    """Labels of a projector that the run trains on the real data; in the place of ``relabelled``."""
    assert isinstance(config, HeLlO)
    steps = min(REHEARSED, config.projector_steps) if run.rehearses else config.projector_steps
    again = f"stopped while training its projector; go on with: condense resume {run.directory}"
    rule, seed, began = config.rule(run.task.mirror), rng.key(run.seed, "labels"), time.monotonic()
    place = run.directory if run.ranks.leads and not run.rehearses else None
    ends: list[float] = []

    def note(report: Callable[[int], None], done: int) -> None:
        ends.append(time.monotonic())
        report(done)

    for _, report in groups(run, [0], steps, "a projector", again):
        made, known = fitted(
            run.task, committee.mean(weights), dataclasses.replace(config, projector_steps=steps), rule, seed,
            statistics=config.label_statistics, micro=config.label_micro, device=run.device, precision=run.precision,
            report=functools.partial(note, report),
            checkpoint=None if place is None else place / "projector.train",
        )  # fmt: skip
    if run.rehearses:
        each = (ends[-1] - ends[0]) / max(1, steps - 1)
        run.expected_labelling = ends[0] - began + each * (config.projector_steps - 1)
    return ProjectorLabels.of(
        made, known, len(stored), seed, rule, config.temperature, config.squared,
        loss_kind=config.loss_kind, gamma=config.gamma, hard=classes if config.gamma else None,
    )  # fmt: skip


@method(
    "hello", config=HeLlO, year=2025, labels="projector", protocol="rded-v1", network="resnet18-bn",
    paper="Heavy Labels Out! Dataset Distillation with Label Space Lightening",
)  # fmt: skip
def hello(task: Task, config: HeLlO, run: Run) -> SyntheticSet:
    """RDED's images with labels of a public network whose weights are changed a little, and only that is stored.

    When to use: where stored labels outweigh the images and a public network knows such images. Cost: a teacher, a
    short training of the changes, and a pass through the public network in each step of a student. Known failure: a
    small teacher in 8 bits (labels=teacher of condense lighten) may weigh less; RDED's labels are better on large sets.

    Yu et al., ICCV 2025. No code is public: weight of the classes, steps, rates and prompts are a reconstruction, and
    the mean of all teachers stands for the nine checkpoints. Published students learn by loss_kind=mse with some gamma;
    kl is what the other methods' students learn by. A time limit does not shorten the projector's training.
    """
    side(task, config.factor, f"factor={config.factor}")
    if config.labels == "projector":  # what cannot be had is found before any training
        head_of(config, projectors.find(config.backbone, task.shape, torch.device("cpu")))
    committee = squeezed(config, run)
    scorer = committee.members[0].network
    synthetic = from_pixels(run, confident_patches(run, scorer, config))
    if config.factor > 1 and config.refine_steps:
        encoder = projectors.find(config.backbone, task.shape, run.device).encoder
        wanted = torch.cat([
            features(encoder, run, cropped(*surest(run, scorer, config, c)[1:], task.shape[1]))
            for c in range(task.num_classes)
        ])  # fmt: skip
        low, high = (task.transform(torch.full((task.shape[0], 1, 1), end, device=run.device)) for end in (0.0, 1.0))
        group = Group(lr=config.refine_lr, optimizer="adam", clamp=(low, high))
        for step in run.optimise(synthetic, config.refine_steps, images=group):
            for rows in torch.arange(len(wanted), device=run.device).split(TILES):
                tiles = cut_up(synthetic.images, config.factor)[rows]
                gap = features(encoder, run, enlarged(tiles, task.shape[1])) - wanted[rows]
                step.accumulate(gap.square().mean(1).sum() / len(wanted))
            step.update()
    labelling = projected if config.labels == "projector" else None
    return finished(config, run, synthetic.images, synthetic.classes, committee, labelling=labelling)
