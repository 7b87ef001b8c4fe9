"""Training of projectors: low-rank changes of a public network's weights, learned from teachers on the real data."""

from __future__ import annotations

import dataclasses
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
    """Returns (D, classes): for each class the mean of its unit features, minus the mean over classes, at unit length.

    The part that all classes share shifts all logits of an image equally, which does not change the softmax.

    Args:
        encoder: of the features.
        batches: one function for each class that returns pixels (B,C,H,W).
    """
    means = torch.stack([F.normalize(compute_logits(encoder, pixels()), dim=1).mean(0) for pixels in batches], 1)
    return F.normalize(means - means.mean(1, keepdim=True), dim=0)


HEAD_IMAGES_PER_CLASS = 200
"""Real images of each class whose mean features initialise a projector's head."""


@dataclass(frozen=True)
class Projection:
    """Settings of a projector and its training."""

    backbone: str = pretrained.BUNDLED_BACKBONES[0]
    """Public network: one that is included in the package, FILE.h5 of `condense teachers`, or torchvision:NAME,
    timm:NAME or open_clip:NAME@TAG, each also with @FILE of its weights. Published is a CLIP, open_clip:RN50@openai."""
    adapter_rank: int = 8
    """Rank of the changes of its weights."""
    head: str = ""
    """Initial head: text (class names through the backbone's text tower) or mean (the classes' mean features); by
    default text if there is such a tower."""
    head_rank: int = 64
    """Rank of the change of a text head; a mean head is stored whole."""
    prompts: str = pretrained.PROMPT
    """Templates for class names, joined by |."""
    projector_steps: int = 1000
    """Steps of its training on the real data."""
    projector_lr: float = 2e-3
    """Learning rate of AdamW, annealed to 0 along a cosine."""
    projector_batch: int = 128
    """Real images per training step."""
    hard_weight: float = 0.1
    """Weight of the cross-entropy with the real classes (lambda), relative to the squared difference to the teachers'
    logits. Not published."""

    def check_projection(self) -> None:
        """Checks the settings, for ``__post_init__``."""
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
            raise CondenseError(f"prompts={self.prompts}: each needs {{}} in place of the class")


class ProjectorSource:
    """Training data of a projector: views of real images, with the teachers' logits (row 0 of the targets) and their
    classes (row 1)."""

    per_view = True

    def __init__(
        self,
        task: Task,
        teacher: nn.Module,
        rule: ViewRule,
        seed: int,
        hard_weight: float,
        statistics: str = "running",
        micro: int = 8,
        key: str = "",
    ) -> None:
        self.task, self.teacher, self.seed, self.hard_weight = task, teacher, seed, hard_weight
        self.rule = rule = dataclasses.replace(rule, tiles=0)  # real images are no collages
        self.statistics: dict[str, Any] = {"statistics": statistics, "micro": micro}
        self.key = f"{rule} {seed} {hard_weight} {self.statistics} {key}"
        self.size = len(task.train)
        self.labels = torch.as_tensor(task.train.labels)

    def batch(self, ids: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """Views (B,C,H,W) of the images ``ids``, mixed among themselves, and targets (B, 2, classes)."""
        images = self.task.batch(ids)
        own = torch.arange(len(ids), device=images.device)
        seed = rng.key(self.seed, "lesson", epoch, int(ids[0]))  # an image occurs once per epoch
        drawn = self.rule.draw(seed, 0, len(ids), self.task.shape[1:]).to(images.device)
        views = self.rule.apply(images, own, drawn)
        truth = F.one_hot(self.labels[ids.cpu()], self.task.num_classes).float().to(images.device)
        return views, torch.stack(
            [compute_logits(self.teacher, views, **self.statistics), mix_rows(truth, own, drawn)], 1
        )

    def labelled_groups(self, epoch: int, size: int) -> list[Tensor] | None:
        """None: every batch is labelled as it is."""
        return None

    def mixed_batches(self, epoch: int, size: int) -> list[Tensor] | None:
        """None: every batch is mixed as it is."""
        return None

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """MSE(f(x), y') + lambda CE(f(x), y)."""
        return F.mse_loss(logits, targets[:, 0]) + self.hard_weight * F.cross_entropy(logits, targets[:, 1])


def train_projector(
    task: Task,
    teacher: nn.Module,
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
    """Trains a projector on the real data; returns it with its description for the file.

    Args:
        task: the real data, with classes and training space.
        teacher: maps images in training space to logits.
        config: what is adapted and how it is trained.
        rule: of the training views; use the rule of the labels.
        seed: of all random draws.
        statistics, micro: of the teachers' BatchNorm, see :func:`condense.labels.compute_logits`.
        device, precision: of the training.
        checkpoint, report: see :func:`condense.training.train`.

    Raises:
        CondenseError: the backbone is unavailable or does not accept such images, or has no such head.
    """
    transform = adapters.require_standardise(task.transform, "labels=projector")
    backbone = pretrained.find_backbone(config.backbone, task.shape, device)
    if head_kind(config, backbone) == "text":
        assert backbone.text is not None
        start = backbone.text([str(name) for name in task.classes], config.prompts.split("|"))
    else:

        def sample_pixels(c: int) -> Tensor:
            return transform.inverse(task.per_class(HEAD_IMAGES_PER_CLASS, (seed, "means"), [c])[0])

        batches = [functools.partial(sample_pixels, c) for c in range(task.num_classes)]
        start = compute_class_mean_features(backbone.encoder, batches)
    pixels = transform.inverse(task.batch(torch.arange(2)))
    projector, description = new_projector(backbone, config, task.classes, start.to(device), transform, pixels, seed)
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
    source = ProjectorSource(task, teacher, rule, seed, config.hard_weight, statistics, micro, str(config))
    train(
        [Student(projector, source, rng.key(seed, "projector"))],
        recipe,
        device=device,
        precision=precision,
        report=report,
        checkpoint=checkpoint,
        together=False,
    )
    if not all(bool(weight.half().isfinite().all()) for weight in projector.parameters()):  # stored as float16
        raise CondenseError(
            f"diverged: the projector's weights are not finite; lower projector_lr, now {config.projector_lr:g}"
        )
    return projector, description


def head_kind(config: Projection, backbone: Backbone) -> str:
    """Returns the kind of the initial head, text or mean.

    Raises:
        CondenseError: a text head for a backbone without a text tower.
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
    """Returns an untrained projector and its description for the file.

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
    projector = Projector(backbone.encoder, names, config.adapter_rank, start, rank, backbone.scale, transform, seed)
    description = {
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
        description |= {"classes": [str(name) for name in classes], "prompts": config.prompts.split("|")}
    return projector, description


def projector_bytes(shape: networks.Shape, classes: Sequence[Any], config: Projection | None = None) -> tuple[int, int]:
    """Returns the bytes of labels=projector for images (C,H,W): in the file, and of the public network. ``config`` None
    means the default settings."""
    config = config or Projection()
    backbone = pretrained.find_backbone(config.backbone, shape, torch.device("cpu"))
    pixels, middle = torch.rand(2, *shape, generator=rng.generator("layout")), torch.full((shape[0],), 0.5)
    start = torch.zeros(compute_logits(backbone.encoder, pixels).shape[1], len(classes))
    projector, description = new_projector(backbone, config, classes, start, Standardise(middle, middle), pixels)
    labels = ProjectorLabels(description, projector.arrays(), 0, 0)
    return labels.nbytes(), labels.external_nbytes()
