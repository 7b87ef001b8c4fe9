"""Selectors: which of n points to keep, from their features or similarities.

Each function returns the rows that it chooses, int64 (count,) on the CPU, distinct, in the order in which it chose
them. Of equal candidates the first row is taken. No function holds a matrix of all pairs of points.
"""

from __future__ import annotations

import heapq
import warnings

import numpy as np
import torch
from torch import Tensor

from condense.selection.kernels import Kernel, LastLayerGradients

LLOYD_POINTS = 20_000
"""Maximum number of points that k-means passes over in each iteration."""

MINI_BATCH = 4096
"""Minimum number of points in a step of k-means with mini-batches."""


def herding(features: Tensor, count: int) -> Tensor:
    """Adds, one by one, the point that brings the mean of the chosen ones nearest to the mean of all (Welling, 2009).

    Step t adds argmin over x of ||(t + 1) mu - sum of chosen - x||. Centred features have mu = 0.

    Args:
        features: (n, D).
        count: points to choose, at most n.
    """
    centred = features - features.mean(0)
    squares, total = centred.square().sum(1), torch.zeros_like(centred[0])
    chosen: list[int] = []
    for _ in range(count):
        distances = squares + 2 * (centred @ total)  # without the square of `total`, which is the same for all
        distances[chosen] = torch.inf
        chosen.append(int(distances.argmin()))
        total += centred[chosen[-1]]
    return torch.tensor(chosen, dtype=torch.int64)


def k_center(features: Tensor, count: int, first: int) -> Tensor:
    """Adds, one by one, the point that is farthest from the chosen ones (Gonzalez, 1985; Sener and Savarese, 2018).

    The largest distance of a point to its nearest chosen one is at most twice the least possible.

    Args:
        features: (n, D).
        count: points to choose, at most n.
        first: the first point.
    """
    centred = features - features.mean(0)
    squares = centred.square().sum(1)
    nearest = torch.full_like(squares, torch.inf)
    chosen: list[int] = []
    for number in range(count):
        chosen.append(first if number == 0 else int(nearest.argmax()))
        new = chosen[-1]
        nearest = torch.minimum(nearest, (squares + squares[new] - 2 * (centred @ centred[new])).clamp(min=0))
        nearest[chosen] = -1.0  # even where all others equal a chosen one
    return torch.tensor(chosen, dtype=torch.int64)


def graph_cut(kernel: Kernel, count: int, diversity: float = 2.0) -> Tensor:
    """Greedily maximises graph cut: similarity to all points, less similarity among the chosen ones.

    The gain of x is sum over all i of s(i, x) - diversity * sum over chosen j of s(j, x). Each step updates the second
    sum by one row, so that the greedy choice is exact.
    """
    gains = kernel.sums()
    chosen: list[int] = []
    for _ in range(count):
        gains[chosen[-1:]] = -torch.inf
        chosen.append(int(gains.argmax()))
        gains -= diversity * kernel.row(chosen[-1])
    return torch.tensor(chosen, dtype=torch.int64)


def facility_location(kernel: Kernel, count: int) -> Tensor:
    """Greedily maximises facility location: the sum over all points of the similarity to their nearest chosen one.

    Lazy greedy (Minoux, 1978): gains never grow, so an old gain is an upper bound, and only points with the largest
    bounds are computed again. The choice is that of the plain greedy algorithm.
    """
    bounds = [(-gain, row) for row, gain in enumerate(kernel.sums().tolist())]
    heapq.heapify(bounds)
    covered: Tensor | None = None
    chosen: list[int] = []
    while len(chosen) < count:
        bound, candidate = heapq.heappop(bounds)
        row = kernel.row(candidate)
        if covered is None:
            covered = torch.zeros_like(row)
        gain = float((row - covered).clamp(min=0).sum(dtype=torch.float64)) if chosen else -bound
        if bounds and (-gain, candidate) > bounds[0]:
            heapq.heappush(bounds, (-gain, candidate))
            continue
        chosen.append(candidate)
        covered = torch.maximum(covered, row)
    return torch.tensor(chosen, dtype=torch.int64)


def moderate(features: Tensor, count: int) -> Tensor:
    """Returns the points whose distance to the mean is nearest to the median of these distances (Xia et al., 2023)."""
    distances = (features - features.mean(0)).norm(dim=1).cpu()
    median = distances.double().quantile(0.5).to(distances.dtype)
    return (distances - median).abs().argsort(stable=True)[:count]


def nearest_to_centroids(points: Tensor, count: int, key: int) -> Tensor:
    """Returns the points nearest to ``count`` k-means centroids, of each the nearest one that is not yet taken.

    Centroids are those of Lloyd's algorithm, of more than ``LLOYD_POINTS`` points those of mini-batches.

    Args:
        points: float32 (n, D).
        count: number of centroids, at most n.
        key: of the random initialisation.
    """
    from sklearn.cluster import KMeans, MiniBatchKMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    points = points.cpu()
    # One thread: threads meet after every few points, and where other processes run, each meeting costs a time slice.
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different points than centroids: some are equal
        options = {"n_clusters": count, "n_init": 1, "random_state": key % 2**31}
        few = len(points) <= LLOYD_POINTS
        kmeans = KMeans(**options) if few else MiniBatchKMeans(**options, batch_size=max(MINI_BATCH, 4 * count))
        kmeans.fit(points.numpy())
    chosen: list[int] = []
    for centroids in torch.from_numpy(kmeans.cluster_centers_).float().split(256):  # bounds the memory of distances
        for row in torch.cdist(centroids, points):
            row[chosen] = torch.inf
            chosen.append(int(row.argmin()))
    return torch.tensor(chosen)


def gradient_match(gradients: LastLayerGradients, count: int, ridge: float) -> tuple[Tensor, np.ndarray]:
    """Approximates the mean gradient by few gradients: orthogonal matching pursuit with weights of at least 0
    (Killamsetty et al., GRAD-MATCH, 2021).

    Minimises ||sum of w_j g_j - mean g||^2 + ridge * ||w||^2. Each step adds the gradient with the largest product with
    the residual and computes all weights again.

    Args:
        gradients: of n images.
        count: images to choose, at most n.
        ridge: penalty of the squared weights.

    Returns:
        Rows, and their weights (count,).
    """
    from scipy.linalg import solve_triangular
    from scipy.optimize import nnls

    target = gradients.products_with_mean().double()
    rows: list[Tensor] = []
    chosen: list[int] = []
    weights = np.zeros(0)
    for _ in range(count):
        residual = target.clone()
        if rows:
            residual -= torch.stack(rows).T @ torch.from_numpy(weights).to(target.device)
        residual[chosen] = -torch.inf
        chosen.append(int(residual.argmax()))
        rows.append(gradients.products(chosen[-1]).double())
        gram = torch.stack([row[chosen] for row in rows]).cpu().numpy() + ridge * np.eye(len(chosen))
        # |L^T w - L^-1 b|^2 = w^T G w - 2 b^T w + const., with G = L L^T
        lower = np.linalg.cholesky(gram)
        aim = solve_triangular(lower, target[chosen].cpu().numpy(), lower=True)
        weights = nnls(lower.T, aim)[0]
    return torch.tensor(chosen, dtype=torch.int64), weights
