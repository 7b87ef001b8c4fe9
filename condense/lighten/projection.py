"""TODO-DOC."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condense import networks, rng
from condense.augment import ViewRule
from condense.config import require_one_of, require_range
from condense.data import Standardise, Task
from condense.errors import CondenseError
from condense.labels import Projector, ProjectorLabels, adapters, compute_logits, mix_rows
from condense.networks import Backbone, Encoder, pretrained
from condense.training import Student, TrainConfig, train


@torch.no_grad()
def compute_class_mean_features(encoder: Encoder, batches: Sequence[Callable[[], Tensor]]) -> Tensor:
    """(D, classes): of each class the mean of its unit features, minus the mean over classes, at unit length.

    What all classes share moves all logits of an image alike, and no softmax.

    Args:
        encoder: of the features.
        batches: of each class, gives pixels (B,C,H,W).
    """
    found = torch.stack([F.normalize(compute_logits(encoder, pixels()), dim=1).mean(0) for pixels in batches], 1)
    return F.normalize(found - found.mean(1, keepdim=True), dim=0)


HEAD_IMAGES_PER_CLASS = 200
"""Real images of each class whose mean features start a projector's head."""

# Making a projector ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Projection:
    """How a projector is made."""

    backbone: str = pretrained.BUNDLED_BACKBONES[0]
    """Public network: one that comes with the package, FILE.h5 of `condense teachers`, or torchvision:NAME, timm:NAME
    or open_clip:NAME@TAG, each also with @FILE of its weights. Published is a CLIP, open_clip:RN50@openai."""
    adapter_rank: int = 8
    """Rank of the changes of its weights."""
    head: str = ""
    """How the head starts: text (names of classes in the backbone's text tower) or mean (the classes' mean features);
    text where there is such a tower."""
    head_rank: int = 64
    """Rank of the change of a head of text; a head of means is stored whole."""
    prompts: str = pretrained.PROMPT
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
        require_one_of(self, head=("", *adapters.HEADS))
        require_range(
            self,
            adapter_rank=(1, math.inf),
            head_rank=(1, math.inf),
            projector_steps=(1, math.inf),
            projector_batch=(1, math.inf),
            projector_lr=(0, sys.float_info.max),
            hard_weight=(0, sys.float_info.max),
        )
        if not all("{}" in prompt for prompt in self.prompts.split("|")):
            raise CondenseError(f"prompts={self.prompts}: each needs {{}} where the class stands")


class ProjectorSource:
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
        return views, torch.stack([compute_logits(self.weak, views, **self.asked), mix_rows(truth, own, drawn)], 1)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """MSE(f(x), y') + lambda CE(f(x), y)."""
        return F.mse_loss(logits, targets[:, 0]) + self.hard_weight * F.cross_entropy(logits, targets[:, 1])


def train_projector(
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
    transform = adapters.require_standardise(task.transform, "labels=projector")
    backbone = pretrained.find_backbone(config.backbone, task.shape, device)
    if head_kind(config, backbone) == "text":
        assert backbone.text is not None
        start = backbone.text([str(name) for name in task.classes], config.prompts.split("|"))
    else:

        def some(c: int) -> Tensor:
            return transform.inverse(task.per_class(HEAD_IMAGES_PER_CLASS, (seed, "means"), [c])[0])

        each = [functools.partial(some, c) for c in range(task.num_classes)]
        start = compute_class_mean_features(backbone.encoder, each)
    pixels = transform.inverse(task.batch(torch.arange(2)))
    made, known = new_projector(backbone, config, task.classes, start.to(device), transform, pixels, seed)
    recipe = TrainConfig(
        steps=config.projector_steps,
        batch=config.projector_batch,
        lr=config.projector_lr,
        momentum=0.9,
        weight_decay=0.0,
        lr_milestones=(),
        optimizer="adamw",
        schedule="cosine",
    )
    lessons = ProjectorSource(task, weak, rule, seed, config.hard_weight, statistics, micro, str(config))
    train(
        [Student(made, lessons, rng.key(seed, "projector"))],
        recipe,
        device=device,
        precision=precision,
        report=report,
        checkpoint=checkpoint,
        together=False,
    )
    if not all(bool(weight.half().isfinite().all()) for weight in made.parameters()):  # as they will be kept
        raise CondenseError(
            f"diverged: the projector's weights are not finite; lower projector_lr, now {config.projector_lr:g}"
        )
    return made, known


def head_kind(config: Projection, backbone: Backbone) -> str:
    """How the head starts.

    Raises:
        CondenseError: of text, which the backbone does not have.
    """
    if config.head == "text" and backbone.text is None:
        raise CondenseError(f"head=text: backbone={config.backbone} has no text tower; take head=mean")
    return config.head or ("text" if backbone.text is not None else "mean")


def new_projector(
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
    head, names = head_kind(config, backbone), adapters.adapted_weight_names(backbone.encoder, pixels)
    rank = config.head_rank if head == "text" else 0
    made = Projector(backbone.encoder, names, config.adapter_rank, start, rank, backbone.scale, transform, seed)
    known = {
        "backbone": {**backbone.known, "bytes": backbone.external(head)},
        "names": names,
        "rank": config.adapter_rank,
        "head_rank": rank,
        "head": head,
        "shape": list(pixels.shape[1:]),
        "mean": transform.mean.tolist(),
        "std": transform.std.tolist(),
    }
    if head == "text":
        known |= {"classes": [str(name) for name in classes], "prompts": config.prompts.split("|")}
    return made, known


def projector_bytes(shape: networks.Shape, classes: Sequence[Any], config: Projection | None = None) -> tuple[int, int]:
    """Bytes of labels=projector for images (C,H,W), in the file and of the public network; settings are the usual ones
    when None."""
    config = config or Projection()
    backbone = pretrained.find_backbone(config.backbone, shape, torch.device("cpu"))
    pixels, middle = torch.rand(2, *shape, generator=rng.generator("layout")), torch.full((shape[0],), 0.5)
    start = torch.zeros(compute_logits(backbone.encoder, pixels).shape[1], len(classes))
    made, known = new_projector(backbone, config, classes, start, Standardise(middle, middle), pixels)
    labels = ProjectorLabels(known, made.arrays(), 0, 0)
    return labels.nbytes(), labels.external_nbytes()
