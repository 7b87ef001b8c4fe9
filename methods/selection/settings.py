"""Settings that selections share, and the features and gradients that they select by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from condense import networks, selection
from condense.config import require_one_of
from condense.data import ORDERS
from condense.engine import Run
from condense.errors import CondenseError
from condense.pretraining import ScoreOptions, TeacherOptions, get_committee
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
class Budget:
    """How many images of which classes."""

    balance: str = "class"
    """class: ipc images of every class. free: as many in total, whatever their classes."""
    store: str = "images"
    """images, or indices into the real data, which whoever uses the file then needs."""

    def check_budget(self) -> None:
        """For ``__post_init__``."""
        require_one_of(self, balance=BALANCES, store=STORES)


@dataclass(frozen=True)
class MatchingOptions(TeacherOptions, Budget):
    """Settings of selections by gradients of the last layer."""

    teacher_epochs: int = 10
    """{inherited}"""
    teacher_lr: float = 0.02
    """{inherited}"""

    def __post_init__(self) -> None:
        self.check_budget()
        self.check_teachers()


@dataclass(frozen=True)
class EmbeddingOptions(MatchingOptions):
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
class ScoredBudget(ScoreOptions, Budget):
    """Settings of selections by scores."""

    take: str = "hardest"
    """Images to take by their score: hardest, easiest or middle (around the median)."""

    def __post_init__(self) -> None:
        self.check_budget()
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


def select_images(config: Budget, run: Run, choose: Callable[[Tensor, int, int], Tensor]) -> SyntheticSet:
    """The set of the images that ``choose`` selects of each class, or of all images; see
    :func:`condense.selection.select_by_class`."""
    task = run.task
    ids = selection.select_by_class(task.train.labels, task.num_classes, run.ipc, config.balance, choose)
    return SyntheticSet.select(task, ids)


def teacher_network(config: TeacherOptions, run: Run) -> networks.Network:
    """The network that features and gradients are taken from: the first of the run's teachers, in eval mode."""
    member = get_committee(config, run).members[0]
    networks.require_embedding(member.network, member.name, run.name)
    return member.network


@torch.no_grad()
def _forward(run: Run, net: networks.Network, ids: Tensor) -> Tensor:
    with run.autocast():
        return net.embed(run.task.batch(ids)).float()
