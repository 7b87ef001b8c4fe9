"""Selections by scores of training: uncertainty, EL2N, GraNd, forgetting, AUM, CCS, D2 and DUAL."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from condense import rng, selection
from condense.config import require_one_of, require_range
from condense.data import Task
from condense.engine import Run
from condense.methods.selection.settings import ScoredOptions, select_images
from condense.pretraining import load_or_train_scores
from condense.registry import method
from condense.sets import SyntheticSet


def take_by_score(name: str, config: ScoredOptions, run: Run) -> SyntheticSet:
    """The set of the hardest, easiest or middle images by a column of the table of scores."""
    difficulty = load_or_train_scores(run, config).difficulty(name)
    return select_images(
        config,
        run,
        lambda ids, count, c: selection.take_in_order(
            difficulty[ids], count, config.take, rng.Draws(run.seed, "ties", c)
        ),
    )


@dataclass(frozen=True)
class Uncertainty(ScoredOptions):
    """Hyper-parameters of selection by uncertainty."""

    score: str = "margin"
    """leastconf (largest probability), margin (largest less second largest), entropy, or loss (which also uses the
    class)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_one_of(self, score=("leastconf", "margin", "entropy", "loss"))


@method(
    "uncertainty",
    config=Uncertainty,
    paper="Selection via Proxy: Efficient Data Selection for Deep Learning",
    year=2020,
    order=0,
    pretrains="scores",
)
def uncertainty(task: Task, config: Uncertainty, run: Run) -> SyntheticSet:
    """Selects the real images that a trained network is least certain of: by confidence, margin, entropy or loss.

    When to use: for more than a third of the data. Cost: the training of one network with a pass over the data in each
    epoch. Known failure: at few images per class the hardest ones are outliers and wrong labels; take=easiest is then
    better.

    Coleman et al., ICLR 2020. Scores are of probabilities; some published programs take the largest logit as
    confidence.
    """
    return take_by_score(config.score, config, run)


@method(
    "forgetting",
    config=ScoredOptions,
    paper="An Empirical Study of Example Forgetting during Deep Neural Network Learning",
    year=2019,
    order=0,
    pretrains="scores",
)
def forgetting(task: Task, config: ScoredOptions, run: Run) -> SyntheticSet:
    """Selects the real images that a network in training forgets most often.

    When to use: for more than a third of the data. Cost: the training of one network with a pass over the data in each
    epoch. Known failure: at few images per class the hardest ones are outliers and wrong labels; take=easiest is then
    better.

    Toneva et al., ICLR 2019. Images that were never learned count as most forgotten; several published programs count
    them as never forgotten. The paper asks the network about an image when it trains on it, this program after each
    epoch.
    """
    return take_by_score("forgetting", config, run)


@method(
    "el2n",
    config=ScoredOptions,
    paper="Deep Learning on a Data Diet: Finding Important Examples Early in Training",
    year=2021,
    order=0,
    pretrains="scores",
)
def el2n(task: Task, config: ScoredOptions, run: Run) -> SyntheticSet:
    """Selects the real images with the largest error of the predicted probabilities early in training.

    When to use: for more than a third of the data, with a short training; score_epochs need not exceed score_early.
    Cost: the training of one or more networks with a pass over the data in each epoch. Known failure: at few images
    per class the hardest ones are outliers and wrong labels; take=easiest is then better.

    Paul, Ganguli and Dziugaite, NeurIPS 2021, who average ten networks (score_networks=10).
    """
    return take_by_score("el2n", config, run)


@method(
    "grand",
    config=ScoredOptions,
    paper="Deep Learning on a Data Diet: Finding Important Examples Early in Training",
    year=2021,
    order=0,
    pretrains="scores",
)
def grand(task: Task, config: ScoredOptions, run: Run) -> SyntheticSet:
    """Selects the real images with the largest gradients of the last layer early in training.

    When to use: as el2n, to compare. Cost: the training of one or more networks with a pass over the data in each
    epoch. Known failure: as el2n; a single network is noisy.

    Paul, Ganguli and Dziugaite, NeurIPS 2021, who average ten networks and take the gradient of all weights; that of
    the last layer has the closed form |p - y| sqrt(1 + |e|^2) for each image alone, whatever its batch.
    """
    return take_by_score("grand", config, run)


@method(
    "aum",
    config=ScoredOptions,
    paper="Identifying Mislabeled Data using the Area Under the Margin Ranking",
    year=2020,
    order=0,
    pretrains="scores",
)
def aum(task: Task, config: ScoredOptions, run: Run) -> SyntheticSet:
    """Selects the real images with the smallest margin of their class, averaged over the training.

    When to use: with take=easiest at few images per class, and to find wrong labels. Cost: the training of one network
    with a pass over the data in each epoch. Known failure: the hardest images are largely wrong labels and outliers.

    Pleiss et al., NeurIPS 2020, who find wrong labels by it; as a selection in CCS and in later works.
    """
    return take_by_score("aum", config, run)


@dataclass(frozen=True)
class CCS(ScoredOptions):
    """Hyper-parameters of CCS."""

    score: str = "aum"
    """Column of the table of scores."""
    strata: int = 50
    """Intervals of equal width between the least and the largest score."""
    cutoff: float = 0.0
    """Share of the hardest images that are left out first; the paper tunes it for each share of the data."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_one_of(self, score=selection.COLUMNS)
        require_range(self, strata=(1, math.inf), cutoff=(0, 0.999))


@method(
    "ccs",
    config=CCS,
    paper="Coverage-centric Coreset Selection for High Pruning Rates",
    year=2023,
    order=0,
    pretrains="scores",
)
def ccs(task: Task, config: CCS, run: Run) -> SyntheticSet:
    """Selects real images evenly over the intervals of a score, without the hardest ones.

    When to use: for 5 to 30 percent of the data, where selections of the hardest images fail. Cost: the training of one
    network with a pass over the data in each epoch. Known failure: cutoff must be chosen; 0 keeps wrong labels.

    Zheng, Liu, Lai and Prakash, ICLR 2023, whose budget is free (balance=free). take is not used.
    """
    difficulty = load_or_train_scores(run, config).difficulty(config.score)

    def choose(ids: Tensor, count: int, c: int) -> Tensor:
        return selection.sample_strata(
            difficulty[ids], count, config.strata, config.cutoff, rng.Draws(run.seed, "strata", c)
        )

    return select_images(config, run, choose)


@dataclass(frozen=True)
class D2(ScoredOptions):
    """Hyper-parameters of D2 pruning."""

    score: str = "forgetting"
    """Column of the table of scores, scaled to [0, 1]."""
    gamma: float = 1.0
    """Decay of the messages that a selected image sends to its neighbours; smaller values spread the selection."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_one_of(self, score=selection.COLUMNS)
        require_range(self, gamma=(0, math.inf))


@method(
    "d2",
    config=D2,
    paper="D2 Pruning: Message Passing for Balancing Diversity and Difficulty in Data Pruning",
    year=2024,
    order=0,
    pretrains="scores",
)
def d2(task: Task, config: D2, run: Run) -> SyntheticSet:
    """Selects hard real images in regions of hard images, and lowers the scores of the neighbours of each.

    When to use: for 10 to 50 percent of the data, where both difficulty and diversity count. Cost: the training of one
    network with a pass over the data in each epoch, and the nearest neighbours of every image. Known failure: at few
    images per class it keeps the hardest regions only.

    Maharana, Yadav and Bansal, ICLR 2024. Distances are of features of length 1, so that exp(-distance) does not depend
    on the network's scale; the paper takes features as they are. take=easiest reverses the score.
    """
    table = load_or_train_scores(run, config)
    difficulty = table.difficulty(config.score) * (-1 if config.take == "easiest" else 1)
    spread = (difficulty.max() - difficulty.min()).clamp(min=1e-12)
    scaled = (difficulty - difficulty.min()) / spread

    def choose(ids: Tensor, count: int, c: int) -> Tensor:
        chosen = selection.select_by_messages(
            scaled, table.neighbours, table.distances, count, config.gamma, candidates=ids
        )
        position = {int(i): row for row, i in enumerate(ids)}
        return ids.new_tensor([position[int(i)] for i in chosen])

    return select_images(config, run, choose)


@dataclass(frozen=True)
class Dual(ScoredOptions):
    """Hyper-parameters of DUAL."""

    sampling: str = "beta"
    """beta (probability proportional to the score and a Beta density that prefers easier images the fewer are kept) or
    top (the largest scores)."""
    exponent: float = 4.0
    """c_D of the Beta density, which depends on the data; the released commands for CIFAR-100 take 4."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_one_of(self, sampling=("beta", "top"))
        require_range(self, exponent=(0, math.inf))


@method(
    "dual",
    config=Dual,
    paper="Lightweight Dataset Pruning without Full Training via Example Difficulty and Prediction Uncertainty",
    year=2025,
    order=0,
    pretrains="scores",
)
def dual(task: Task, config: Dual, run: Run) -> SyntheticSet:
    """Samples real images that are hard and uncertain early in training, easier ones the fewer are kept.

    When to use: for 10 to 70 percent of the data. Cost: the training of one network with a pass over the data in each
    epoch. Known failure: needs about 30 epochs, for windows of 10 to tell images apart.

    Cho et al., ICML 2025. The paper's budget is free (balance=free), and it records probabilities while it trains, with
    augmentation; this program does after each epoch, without. The constants of the Beta density, 15 and 16, are those
    of the released program.
    """
    table = load_or_train_scores(run, config)
    scores, target = table.columns["dual"], table.columns["target"]

    def choose(ids: Tensor, count: int, c: int) -> Tensor:
        draws = rng.Draws(run.seed, "dual", c)
        if config.sampling == "top":
            return selection.take_in_order(scores[ids], count, config.take, draws)
        return selection.sample_beta(scores[ids], target[ids], count, len(ids), config.exponent, draws)

    return select_images(config, run, choose)
