"""Selection by scores: orders, strata, Beta sampling, message passing, and robust weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from condense import rng

BALANCES = ("class", "free")
"""Budgets: as many images of every class, or of all images together."""


def even_shares(total: int, limits: Sequence[int]) -> list[int]:
    """Splits ``total`` evenly, with no share above its limit; the first shares below their limit get the remainder."""
    shares = [0] * len(limits)
    while total:
        open_ = [index for index, limit in enumerate(limits) if shares[index] < limit]
        share = max(1, total // len(open_))
        for index in open_:
            added = min(share, limits[index] - shares[index], total)
            shares[index] += added
            total -= added
    return shares


def select_by_class(
    labels: np.ndarray, classes: int, per_class: int, balance: str, choose: Callable[[Tensor, int, int], Tensor]
) -> Tensor:
    """Returns the ids that ``choose`` selects of every class, or of all images for ``balance="free"``.

    Args:
        labels: class of each image, int64 (n,).
        classes: number of classes.
        per_class: images of each class; with a free budget, so many for each class in total.
        balance: see :data:`BALANCES`.
        choose: returns the rows that it selects, from the ids of the candidates, the number of images to select and the
            number of the class (0 for a free budget).
    """
    if balance == "free":
        ids = torch.arange(len(labels))
        return ids[choose(ids, min(per_class * classes, len(ids)), 0)]
    parts = []
    for c in range(classes):
        ids = torch.from_numpy(np.flatnonzero(labels == c))
        parts.append(ids[choose(ids, min(per_class, len(ids)), c)])
    return torch.cat(parts)


def alternating_permutation(labels: np.ndarray, draws: rng.Draws) -> Tensor:
    """Returns a random order of all rows in which the classes alternate: each consecutive part has the class shares of
    the whole, up to rounding.

    Args:
        labels: class of each row, int64 (n,).
        draws: of the order.
    """
    order = draws.permutation(len(labels)).numpy()
    shuffled = labels[order]
    counts = np.bincount(shuffled)
    grouped = np.argsort(shuffled, kind="stable")
    rank = np.empty(len(labels))
    rank[grouped] = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    return torch.from_numpy(order[np.argsort((rank + 0.5) / counts[shuffled], kind="stable")])


def take_in_order(difficulty: Tensor, count: int, order: str, draws: rng.Draws) -> Tensor:
    """Returns the rows of the ``count`` hardest or easiest images, or of those around the median.

    Args:
        difficulty: (n,), larger is harder.
        count: at most n.
        order: one of :data:`condense.data.ORDERS`.
        draws: put images of equal difficulty in a random order.
    """
    shuffled = draws.permutation(len(difficulty))
    ascending = shuffled[difficulty.cpu()[shuffled].argsort(stable=True)]
    if order == "easiest":
        return ascending[:count]
    if order == "hardest":
        return ascending.flip(0)[:count]
    start = (len(ascending) - count) // 2
    return ascending[start : start + count]


def sample_strata(difficulty: Tensor, count: int, strata: int, cutoff: float, draws: rng.Draws) -> Tensor:
    """Coverage-centric selection (Zheng et al., CCS, 2023): drops the hardest share, then samples intervals of the
    difficulty evenly.

    Args:
        difficulty: (n,), larger is harder.
        count: images to select, at most n.
        strata: number of intervals of equal width between the least and the largest difficulty that is left.
        cutoff: share of the hardest images that are dropped first, but never so many that fewer than ``count`` stay.
        draws: choose the images of an interval.
    """
    values = difficulty.double().cpu()
    kept = values.argsort(stable=True)[: max(count, len(values) - int(cutoff * len(values)))]
    low, high = float(values[kept].min()), float(values[kept].max())
    width = (high - low) / strata
    stratum = ((values[kept] - low) / width).long().clamp(max=strata - 1) if width > 0 else torch.zeros_like(kept)
    members = [kept[stratum == k] for k in range(strata)]
    shares = even_shares(count, [len(part) for part in members])
    return torch.cat([part[draws.sample(len(part), share)] for part, share in zip(members, shares) if len(part)])


def beta_parameters(pruned: float, anchor: float, exponent: float, scale: float = 15.0) -> tuple[float, float]:
    """Returns (alpha, beta) of DUAL's Beta distribution of mean target probabilities (Cho et al., 2025).

    beta = scale * (1 - anchor) * (1 - pruned ** exponent) and alpha = scale + 1 - beta: the more is pruned, the easier
    are the images that it prefers.

    Args:
        pruned: share of the images that are left out.
        anchor: mean target probability of the images with the highest scores.
        exponent: c_D of the paper.
        scale: C of the paper.
    """
    beta = scale * (1 - anchor) * (1 - pruned**exponent)
    return scale + 1 - beta, beta


def sample_weighted(log_weights: Tensor, count: int, draws: rng.Draws) -> Tensor:
    """Draws ``count`` different rows one after the other, each with probability proportional to its weight.

    Adds Gumbel noise to the logarithms and takes the largest. Rows of weight 0 come last.

    Args:
        log_weights: float64 (n,), may be -inf.
        count: at most n.
    """
    uniform = (draws.bits(len(log_weights)).double() + 0.5) * 2.0**-63
    noise = -(-uniform.log()).log()
    finite = log_weights.double().cpu().clamp(min=-1e300)
    return (finite + noise).argsort(descending=True, stable=True)[:count]


def sample_beta(
    scores: Tensor, target: Tensor, count: int, total: int, exponent: float, draws: rng.Draws, anchors: int = 10
) -> Tensor:
    """DUAL's selection: draws images with probability proportional to score * Beta density of the target probability.

    Args:
        scores: DUAL scores, (n,).
        target: mean probability of the true class in the epochs of the score, (n,).
        count: images to select, at most n.
        total: images that ``count`` is a share of.
        exponent: see :func:`beta_parameters`.
        draws: of the sample.
        anchors: images with the highest scores, whose mean target probability is the anchor.
    """
    scores, target = scores.double().cpu(), target.double().cpu().clamp(1e-6, 1 - 1e-6)
    anchor = float(target[scores.argsort(descending=True, stable=True)[:anchors]].mean())
    alpha, beta = beta_parameters(1 - count / total, anchor, exponent)
    density = (alpha - 1) * target.log() + (beta - 1) * torch.log1p(-target)  # without its constant
    return sample_weighted(scores.log() + density, count, draws)


def pass_messages(difficulty: Tensor, neighbours: Tensor, distances: Tensor) -> Tensor:
    """D2's forward pass: the difficulty of an image plus exp(-distance) times that of each neighbour.

    Args:
        difficulty: at least 0, (n,).
        neighbours: int64 (n, k).
        distances: to these, (n, k).
    """
    return difficulty + (torch.exp(-distances) * difficulty[neighbours]).sum(1)


def select_by_messages(
    difficulty: Tensor, neighbours: Tensor, distances: Tensor, count: int, gamma: float, candidates: Tensor
) -> Tensor:
    """D2 pruning (Maharana et al., 2024): adds the image with the largest message sum, then lowers the sums of its
    neighbours by exp(-gamma * distance) times its own.

    Args:
        difficulty: at least 0, (n,).
        neighbours: int64 (n, k).
        distances: to these, (n, k).
        count: images to select.
        gamma: decay of the reverse messages; a small one spreads the selection.
        candidates: rows that may be selected, int64.

    Returns:
        Rows among the n, int64 (count,).
    """
    sums = pass_messages(difficulty.double(), neighbours, distances.double())
    lowered = torch.exp(-gamma * distances.double())
    closed = torch.ones(len(sums), dtype=torch.bool)
    closed[candidates] = False
    chosen: list[int] = []
    for _ in range(count):
        best = int(sums.masked_fill(closed, -torch.inf).argmax())
        sums[neighbours[best]] -= lowered[best] * sums[best]
        closed[best] = True
        chosen.append(best)
    return torch.tensor(chosen, dtype=torch.int64)


def robust_distribution(gains: Tensor, errors: int = 1) -> tuple[Tensor, float]:
    """Robust active distillation (Baykal et al., 2023): the distribution over images to have labelled that earns most
    when an adversary makes the teacher wrong on ``errors`` images.

    With gains sorted in descending order and H_k = sum of 1 / g_i over the first k, k* maximises (k - 2 errors) / H_k,
    and p_i = 1 / (g_i H_k*) for the first k*, else 0.

    Args:
        gains: informativeness in (0, 1], (n,); smaller values count as 1e-6.
        errors: images on which the teacher is wrong.

    Returns:
        p, float64 (n,), and the value of the game, (k* - 2 errors) / H_k*.
    """
    values, order = gains.double().cpu().clamp(min=1e-6).sort(descending=True, stable=True)
    harmonic = (1 / values).cumsum(0)
    worth = (torch.arange(1, len(values) + 1, dtype=torch.float64) - 2 * errors) / harmonic
    last = int(worth.argmax())
    share = torch.zeros_like(values)
    share[order[: last + 1]] = 1 / values[: last + 1] / harmonic[last]
    return share, float(worth[last])


def graph_of_neighbours(features: Tensor, count: int, chunk: int = 1024) -> tuple[Tensor, Tensor]:
    """Returns the ``count`` nearest other points of each point, int64 (n, count), and their distances (n, count)."""
    centred = features - features.mean(0)
    squares = centred.square().sum(1)
    count = min(count, len(features) - 1)
    found = []
    for start in range(0, len(features), chunk):
        rows = torch.arange(start, min(start + chunk, len(features)), device=features.device)
        table = squares[rows, None] + squares - 2 * centred[rows] @ centred.T
        table[torch.arange(len(rows), device=features.device), rows] = torch.inf
        found.append(table.topk(count, dim=1, largest=False))
    distances = torch.cat([part.values for part in found]).clamp(min=0).sqrt()
    return torch.cat([part.indices for part in found]), distances if count else torch.zeros(len(features), 0)
