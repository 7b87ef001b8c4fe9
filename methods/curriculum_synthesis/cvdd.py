"""CV-DD: recovery and labels by a committee of teachers that vote."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from condense import rng
from condense.config import require_range
from condense.data import Task
from condense.engine import Run
from condense.errors import CondenseError
from condense.methods.curriculum_synthesis.bn_matching import make_matcher
from condense.methods.curriculum_synthesis.initial import create_initial_set
from condense.methods.curriculum_synthesis.recovery import Guide, class_loss, make_class_batches, recovery_passes
from condense.methods.curriculum_synthesis.relabelling import finish_set, get_teachers
from condense.methods.curriculum_synthesis.settings import RecoveryOptions
from condense.registry import method
from condense.sets import SyntheticSet


@dataclass(frozen=True)
class CVDD(RecoveryOptions):
    """Hyper-parameters of CV-DD."""

    steps: int = 4000
    init: str = "patches"
    label_statistics: str = "batch"
    num_teachers: int = 5
    """Teachers of each architecture."""
    voters: int = 2
    """Teachers that guide an image together."""
    priors: str = ""
    """Accuracy of students on sets from each teacher alone, in per cent, joined by commas; by default all votes are
    equal."""
    vote_temperature: float = 5.0
    """Temperature of the votes in recovery."""
    label_temperature: float = 10.0
    """Temperature of the votes in labels, which all teachers give."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self, voters=(1, math.inf), vote_temperature=(1e-6, math.inf), label_temperature=(1e-6, math.inf))
        self.prior_list()

    def prior_list(self) -> list[float]:
        """The priors as numbers; empty if none are given."""
        try:
            return [float(word) for word in self.priors.split(",")] if self.priors else []
        except ValueError:
            raise CondenseError(
                f"priors={self.priors}: must be numbers joined by commas, one for each teacher"
            ) from None


def compute_vote_weights(priors: Sequence[float], temperature: float) -> list[float]:
    """Weights of teachers: the softmax of their priors (in per cent) divided by ``temperature``."""
    return torch.tensor(priors, dtype=torch.float64).div(temperature).softmax(0).tolist()


def assign_teachers(priors: Sequence[float], voters: int, ipc: int, key: Sequence[int | str]) -> list[tuple[int, ...]]:
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
    "cvdd",
    config=CVDD,
    year=2025,
    labels="per-view",
    protocol="cvdd-v2",
    network="resnet18-bn",
    paper="Dataset Distillation via Committee Voting",
    pretrains="teachers",
)
def cvdd(task: Task, config: CVDD, run: Run) -> SyntheticSet:
    """SRe2L from real crops, with two teachers of a committee guiding each image and all labelling with batch
    statistics.

    When to use: if several teachers are affordable. Cost: SRe2L's times ``voters``, plus the teachers. Known
    failure: labels with batch statistics depend on which views are labelled together.

    Cui, Li, Ma, Bi, Luo & Shen, 2025. Vote weights are the softmax of priors over 5 in recovery and over 10 in labels.
    A prior is the accuracy of students on a set from one teacher alone, so each costs a distillation; by default all
    votes are equal. Students under cvdd-v2 learn on the groups of 8 views that were labelled together, as released. The
    released labels keep dropout on; here it is off.
    """
    num_teachers, given = config.count_teachers(run.network), config.prior_list()
    if len(given) not in (0, num_teachers) or config.voters > num_teachers:
        raise CondenseError(
            f"priors={config.priors or 'none'}, voters={config.voters}: there are {num_teachers} teachers; give a "
            "prior for each and at most as many voters (num_teachers=, committee=)"
        )
    committee = get_teachers(config, run)
    count = len(committee.members)  # fewer under a short time limit
    priors, voters = given[:count] or [0.0] * count, min(config.voters, count)
    synthetic = create_initial_set(config, run, committee.members[0].network)
    batches = make_class_batches(run, config.batch_classes)
    assigned = assign_teachers(priors, voters, run.ipc, (run.seed, "committees"))
    shares = [
        dict(zip(some, compute_vote_weights([priors[m] for m in some], config.vote_temperature))) for some in assigned
    ]
    guides = [
        Guide(
            make_matcher(config, member.network),
            {g: shares[batch.index][m] for g, batch in enumerate(batches) if m in shares[batch.index]},
        )
        for m, member in enumerate(committee.members)
    ]
    weights = compute_vote_weights(priors, config.label_temperature)
    finish = functools.partial(finish_set, config, run, synthetic.images, synthetic.classes, committee, weights)
    run.partial_result(finish)
    for batch in recovery_passes(config, run, synthetic, guides, batches):
        logits, distances = batch.forward(batch.views(batch.pixels))
        batch.backward(class_loss(logits, batch.classes, len(distances)) + config.bn_weight * distances)
    return finish()
