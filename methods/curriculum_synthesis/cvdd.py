"""TODO-DOC."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from condense import rng
from condense.config import require
from condense.data import Task
from condense.engine import Run
from condense.errors import CondenseError
from condense.methods.curriculum_synthesis.bn_matching import matcher
from condense.methods.curriculum_synthesis.initial import started
from condense.methods.curriculum_synthesis.recovery import Guide, by_class, recover
from condense.methods.curriculum_synthesis.relabelling import finished, squeezed
from condense.methods.curriculum_synthesis.settings import Recovery
from condense.registry import method
from condense.sets import SyntheticSet

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
    result = functools.partial(finished, config, run, synthetic.images, synthetic.classes, committee, weights)
    run.partial_result(result)
    recover(config, run, synthetic, guides, batches)
    return result()
