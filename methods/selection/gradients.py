"""Selections that approximate the gradient of a whole class: CRAIG and GRAD-MATCH."""

from __future__ import annotations

import math
from dataclasses import dataclass

from condense import selection
from condense.config import require_range
from condense.data import Task
from condense.engine import Run
from condense.methods.selection.settings import SelectionOptions, last_layer_gradients, select_images
from condense.registry import method
from condense.selection import GradientDistanceKernel
from condense.sets import SyntheticSet


@method(
    "craig",
    config=SelectionOptions,
    paper="Coresets for Data-efficient Training of Machine Learning Models",
    year=2020,
    order=0,
    pretrains="teachers",
)
def craig(task: Task, config: SelectionOptions, run: Run) -> SyntheticSet:
    """Selects real images one by one so that each image of a class has one with a near gradient among those selected.

    When to use: as a coreset with a bound on the error of the gradient. Cost: a short training of one network, one
    pass over the data, and time that grows with the square of the class size. Known failure: gradients change during
    training, and those of the last layer of one network stand for all.

    Mirzasoleiman, Bilmes and Leskovec, ICML 2020: facility location, lazily, with a constant less the Euclidean
    distance as similarity. The paper trains with the sizes of the clusters as weights and selects again in each epoch;
    a set here has no weights, and its images are fixed.
    """
    gradients = last_layer_gradients(config, run)
    return select_images(
        config,
        run,
        lambda ids, count, c: selection.facility_location(GradientDistanceKernel(gradients.select(ids)), count),
    )


@dataclass(frozen=True)
class GradMatch(SelectionOptions):
    """Hyper-parameters of GRAD-MATCH."""

    ridge: float = 1.0
    """Penalty of the squared weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self, ridge=(1e-12, math.inf))


@method(
    "gradmatch",
    config=GradMatch,
    paper="GRAD-MATCH: Gradient Matching based Data Subset Selection for Efficient Deep Model Training",
    year=2021,
    order=0,
    pretrains="teachers",
)
def gradmatch(task: Task, config: GradMatch, run: Run) -> SyntheticSet:
    """Selects real images one by one whose weighted gradients sum to the mean gradient of their class.

    When to use: as the coreset closest in aim to gradient matching. Cost: a short training of one network, one pass
    over the data, and for each image a least-squares problem of all selected ones, so that time grows with at least
    the third power of the selection: for hundreds of images per class take craig. Known failure: without the weights,
    which a set does not store, the selected images are as hard as their gradients are large.

    Killamsetty et al., ICML 2021: orthogonal matching pursuit on gradients of the last layer, with weights of at least
    0 (scipy's nnls) and ridge regression. The paper trains with these weights and selects again every few epochs; a set
    here has no weights, and its images are fixed.
    """
    gradients = last_layer_gradients(config, run)
    return select_images(
        config,
        run,
        lambda ids, count, c: selection.gradient_match(gradients.select(ids), count, config.ridge)[0],
    )
