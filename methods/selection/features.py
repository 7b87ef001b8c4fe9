"""Selections by features: herding, k-center, k-means, graph cut, facility location, moderate."""

from __future__ import annotations

from dataclasses import dataclass

from condense import rng, selection
from condense.data import Task
from condense.engine import Run
from condense.errors import CondenseError
from condense.methods.selection.settings import (
    EmbeddingOptions,
    GradientOptions,
    embed_images,
    select_images,
    similarities,
)
from condense.registry import method
from condense.sets import SyntheticSet


@method(
    "herding",
    config=EmbeddingOptions,
    paper="Herding Dynamical Weights to Learn",
    year=2009,
    order=0,
    pretrains="teachers",
)
def herding(task: Task, config: EmbeddingOptions, run: Run) -> SyntheticSet:
    """Selects real images one by one so that their mean feature stays nearest to that of their class.

    When to use: as the classical coreset at few images per class; its images are typical ones. Cost: a short training
    of one network, and one pass over the data. Known failure: no diversity beyond the mean, so from about a tenth of
    the data random images are as good.

    Welling, ICML 2009; the greedy form is that of iCaRL. Several published libraries select the farthest image in each
    step instead of the nearest one, which is worse than random; numbers of herding in tables that used them are of
    that.
    """
    features = embed_images(config, run)
    return select_images(config, run, lambda ids, count, c: selection.herding(features[ids], count))


@method(
    "kcenter",
    config=EmbeddingOptions,
    paper="Active Learning for Convolutional Neural Networks: A Core-Set Approach",
    year=2018,
    order=0,
    pretrains="teachers",
)
def kcenter(task: Task, config: EmbeddingOptions, run: Run) -> SyntheticSet:
    """Selects real images one by one, each the farthest from those selected so far (greedy k-center).

    When to use: for large selections that must cover the data. Cost: a short training of one network, and one pass
    over the data. Known failure: takes outliers first, so at few images per class it loses to random images.

    Sener and Savarese, ICLR 2018. The first image is random. The largest distance of an image to its nearest selected
    one is at most twice the least possible.
    """
    features = embed_images(config, run)
    draws = rng.Draws(run.seed, "first")
    firsts = [int(draws.bits(1)) for _ in range(task.num_classes)]
    return select_images(
        config, run, lambda ids, count, c: selection.k_center(features[ids], count, firsts[c] % len(ids))
    )


@method(
    "kmeans",
    config=EmbeddingOptions,
    paper="DC-BENCH: Dataset Condensation Benchmark",
    year=2022,
    order=0,
    pretrains="teachers",
)
def kmeans(task: Task, config: EmbeddingOptions, run: Run) -> SyntheticSet:
    """Selects the real images nearest to the k-means centroids of each class in feature space.

    When to use: as the strongest simple selection at 1 to 50 images per class. Cost: a short training of one network,
    one pass over the data, and k-means. Known failure: centroids follow density, so rare kinds of images are missed.

    The baseline K-Means-emb of DC-BENCH (Cui et al., NeurIPS 2022). k-means++ and Lloyd's iterations are those of
    scikit-learn, with one initialisation.
    """
    features = embed_images(config, run)
    return select_images(
        config,
        run,
        lambda ids, count, c: selection.nearest_to_centroids(features[ids], count, rng.key(run.seed, "kmeans", c)),
    )


@method(
    "graphcut",
    config=GradientOptions,
    paper="DeepCore: A Comprehensive Library for Coreset Selection in Deep Learning",
    year=2022,
    order=0,
    pretrains="teachers",
)
def graphcut(task: Task, config: GradientOptions, run: Run) -> SyntheticSet:
    """Selects real images one by one that are similar to all images of their class and unlike those selected.

    When to use: at up to one percent of the data, where it led the comparison of DeepCore. Cost: a short training of
    one network, and one pass over the data. Known failure: the two sums balance at half of the class, so large
    selections hold the rare images only.

    Guo, Zhao and Bai, 2022. The gain is the sum of s over all images less twice the sum over the selected ones. Sums
    are updated, so that the greedy choice is exact and no matrix of all pairs is held.
    """
    kernel = similarities(config, run)
    return select_images(config, run, lambda ids, count, c: selection.graph_cut(kernel(ids), count))


@method(
    "facility",
    config=GradientOptions,
    paper="Submodularity in Data Subset Selection and Active Learning",
    year=2015,
    order=0,
    pretrains="teachers",
)
def facility(task: Task, config: GradientOptions, run: Run) -> SyntheticSet:
    """Selects real images one by one so that each image of a class has a similar one among those selected.

    When to use: as a coreset that represents every image. Cost: a short training of one network, one pass over the
    data, and time that grows with the square of the class size. Known failure: typical images come first, so little is
    gained over k-means.

    Wei, Iyer and Bilmes, ICML 2015. Lazy greedy, whose choice is that of the plain greedy algorithm.
    """
    kernel = similarities(config, run)
    return select_images(config, run, lambda ids, count, c: selection.facility_location(kernel(ids), count))


@dataclass(frozen=True)
class Moderate(EmbeddingOptions):
    """Hyper-parameters of the moderate coreset."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.balance == "free":
            raise CondenseError("balance=free: moderate ranks images within their class; leave it out")


@method(
    "moderate",
    config=Moderate,
    paper="Moderate Coreset: A Universal Method of Data Selection for Real-world Data-efficient Deep Learning",
    year=2023,
    order=0,
    pretrains="teachers",
)
def moderate(task: Task, config: Moderate, run: Run) -> SyntheticSet:
    """Selects the real images whose distance to the mean of their class is nearest to the median distance.

    When to use: for large selections of noisy data; it avoids easy images and outliers alike. Cost: a short training
    of one network, and one pass over the data. Known failure: no diversity, so few images per class may be alike.

    Xia et al., ICLR 2023. The released program takes the coordinate-wise median of a class as its centre and ranks all
    classes together, around the middle rank; this is the paper's mean, median distance and class budget.
    """
    features = embed_images(config, run)
    return select_images(config, run, lambda ids, count, c: selection.moderate(features[ids], count))
