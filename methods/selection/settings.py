"""Settings that selections share, and the features and gradients that they select by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from condense import networks, selection
from condense.config import require_one_of
from condense.data import ORDERS, to_unit_range
from condense.engine import Run
from condense.errors import CondenseError
from condense.labels import SoftLabels, compute_logits
from condense.pretraining import Committee, ScoreOptions, TeacherOptions, get_committee
from condense.selection import (
    BALANCES,
    CosineKernel,
    GradientCosineKernel,
    Kernel,
    LastLayerGradients,
)
from condense.sets import SyntheticSet

STORES = ("images", "indices")

EMBEDDINGS = ("trained", "random", "pixels")


@dataclass(frozen=True)
class Storage:
    """What the file of a selection holds."""

    store: str = "images"
    """images, or indices into the real data, which whoever uses the file then needs."""


@dataclass(frozen=True)
class Labelling(TeacherOptions, Storage):
    """Labels of a selection, and the teacher that gives them."""

    labels: str = "class"
    """class, or teacher: the teacher's logits for each image, for protocols of the soft track (dc-soft-v1)."""
    teacher_epochs: int = 10
    """{inherited}"""
    teacher_lr: float = 0.02
    """{inherited}"""

    def __post_init__(self) -> None:
        self.check_teachers()
        require_one_of(self, store=STORES, labels=("class", "teacher"))

    @property
    def default_protocol(self) -> str | None:
        """Protocol of evaluations unless one is given; None for that of the method."""
        return "dc-soft-v1" if self.labels == "teacher" else None


@dataclass(frozen=True)
class SelectionOptions(Labelling):
    """Settings that selections share: how many images of which classes, and their labels."""

    balance: str = "class"
    """class: ipc images of every class. free: as many in total, whatever their classes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_one_of(self, balance=BALANCES)
        if self.balance == "free" and self.labels == "teacher":
            raise CondenseError("labels=teacher: needs equally many images of every class; leave out balance=free")


@dataclass(frozen=True)
class EmbeddingOptions(SelectionOptions):
    """Settings of selections by features."""

    embedding: str = "trained"
    """Features of the images: trained (the input of the last layer of a teacher, the first of several), random (the
    same of an untrained network) or pixels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_one_of(self, embedding=EMBEDDINGS)


@dataclass(frozen=True)
class GradientOptions(EmbeddingOptions):
    """Settings of selections by similarities of features or of gradients."""

    kernel: str = "gradients"
    """Similarity of two images: (1 + cosine) / 2 of their gradients of a trained network's last layer (gradients), or
    of their features (features)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_one_of(self, kernel=("features", "gradients"))
        if self.kernel == "gradients" and self.embedding != "trained":
            raise CondenseError(
                f"embedding={self.embedding}: gradients are those of a trained network; give kernel=features too"
            )


@dataclass(frozen=True)
class ScoredOptions(ScoreOptions, SelectionOptions):
    """Settings of selections by scores."""

    take: str = "hardest"
    """Images to take by their score: hardest, easiest or middle (around the median)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_scores()
        require_one_of(self, take=ORDERS)


def embed_images(config: EmbeddingOptions, run: Run) -> Tensor:
    """Features of all train images, float32 (n, D), on the run's device."""
    if config.embedding == "pixels":
        return torch.cat([run.task.pixels(ids).flatten(1) for ids in run.train_id_chunks()])
    net = run.random_network(0) if config.embedding == "random" else teacher_network(config, run)
    return torch.cat([_forward(run, net, ids) for ids in run.train_id_chunks()])


def last_layer_gradients(config: TeacherOptions, run: Run) -> LastLayerGradients:
    """Gradients of the cross-entropy of all train images with respect to the last layer of a teacher."""
    net, features, errors = teacher_network(config, run), [], []
    for ids in run.train_id_chunks():
        features.append(_forward(run, net, ids))
        labels = torch.from_numpy(run.task.train.labels[ids.numpy()]).to(run.device)
        with torch.no_grad():
            probabilities = net.classify(features[-1]).softmax(1)
        errors.append(probabilities - F.one_hot(labels, run.task.num_classes))
    return LastLayerGradients(torch.cat(errors), torch.cat(features))


def similarities(config: GradientOptions, run: Run) -> Callable[[Tensor], Kernel]:
    """A function that returns the similarities among the train images of the given ids."""
    if config.kernel == "gradients":
        gradients = last_layer_gradients(config, run)
        return lambda ids: GradientCosineKernel(gradients.select(ids))
    features = embed_images(config, run)
    return lambda ids: CosineKernel(features[ids])


_COMMITTEES: WeakKeyDictionary[Run, Committee] = WeakKeyDictionary()


def committee_of(config: TeacherOptions, run: Run) -> Committee:
    """The teachers of a run, for features, gradients and labels alike; loaded or trained at the first call."""
    if run not in _COMMITTEES:
        _COMMITTEES[run] = get_committee(config, run)
    return _COMMITTEES[run]


def choose_images(config: SelectionOptions, run: Run, choose: Callable[[Tensor, int, int], Tensor]) -> SyntheticSet:
    """The set of the images that ``choose`` selects of each class, or of all images, with their classes as labels; see
    :func:`condense.selection.select_by_class`."""
    task = run.task
    ids = selection.select_by_class(task.train.labels, task.num_classes, run.ipc, config.balance, choose)
    return SyntheticSet.select(task, ids)


def select_images(config: SelectionOptions, run: Run, choose: Callable[[Tensor, int, int], Tensor]) -> SyntheticSet:
    """As :func:`choose_images`, with the labels that ``config`` asks for."""
    return add_labels(choose_images(config, run, choose), config, run)


def add_labels(synthetic: SyntheticSet, config: Labelling, run: Run) -> SyntheticSet:
    """Labels a selection by its teacher if ``config`` says so; returns it."""
    if config.labels == "teacher":
        committee = committee_of(config, run)
        synthetic.labels = SoftLabels(teacher_logits(synthetic, committee, run))
    return synthetic


def teacher_logits(synthetic: SyntheticSet, committee: Committee, run: Run) -> Tensor:
    """Mean logits, float32 (N, C) on the CPU, of a committee for the images of a selection, which records the teachers
    as the source of its labels."""
    synthetic.label_source = {"teachers": committee.describe(), "weights": None}
    teacher = committee.ensemble()
    with run.autocast():
        parts = [
            compute_logits(teacher, run.task.transform(to_unit_range(images.to(run.device)))).cpu()
            for images in synthetic.images.split(1024)
        ]
    return torch.cat(parts)


def teacher_network(config: TeacherOptions, run: Run) -> networks.Network:
    """The network that features and gradients are taken from: the first of the run's teachers, in eval mode."""
    member = committee_of(config, run).members[0]
    networks.require_embedding(member.network, member.name, run.name)
    return member.network


@torch.no_grad()
def _forward(run: Run, net: networks.Network, ids: Tensor) -> Tensor:
    with run.autocast():
        return net.embed(run.task.batch(ids)).float()
