"""Similarities between images that greedy selectors maximise, without a matrix of all pairs."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

EPSILON = 1e-12
"""Smallest norm that a vector is divided by."""


class Kernel(Protocol):
    """Similarities s(i, j) >= 0 of n points."""

    size: int
    """Number of points."""

    def row(self, i: int) -> Tensor:
        """Returns s(i, j) for all j, (n,)."""

    def sums(self) -> Tensor:
        """Returns the sum of s(i, j) over all i for each j, float64 (n,)."""


class CosineKernel:
    """(1 + cos) / 2 of features (n, D). The sums need one pass over the features, because the cosine is linear in each
    normalised vector."""

    def __init__(self, features: Tensor) -> None:
        self.unit = features / features.norm(dim=1, keepdim=True).clamp(min=EPSILON)
        self.size = len(features)

    def row(self, i: int) -> Tensor:
        return (1 + self.unit @ self.unit[i]) / 2

    def sums(self) -> Tensor:
        return (self.size + (self.unit @ self.unit.sum(0)).double()) / 2


class LastLayerGradients:
    """Gradients of the cross-entropy with respect to the last linear layer, one for each image.

    That of image i is the outer product of d_i = softmax(z_i) - onehot(y_i) and (1, e_i), so that
    <g_i, g_j> = (d_i . d_j)(1 + e_i . e_j): the gradients themselves, of C (D + 1) values each, are never built.

    Args:
        errors: d, (n, C).
        features: e, (n, D), the input of the layer.
    """

    def __init__(self, errors: Tensor, features: Tensor) -> None:
        self.errors, self.features, self.size = errors, features, len(errors)

    def norms(self) -> Tensor:
        """Returns |g_i|, (n,)."""
        return self.errors.norm(dim=1) * (1 + self.features.square().sum(1)).sqrt()

    def products(self, i: int) -> Tensor:
        """Returns <g_i, g_j> for all j, (n,)."""
        return (self.errors @ self.errors[i]) * (1 + self.features @ self.features[i])

    def products_with_mean(self) -> Tensor:
        """Returns <mean g, g_j> for all j, (n,)."""
        bias, weight = self.errors.mean(0), self.errors.T @ self.features / self.size  # the mean gradient, (C,), (C, D)
        return self.errors @ bias + ((self.errors @ weight) * self.features).sum(1)

    def select(self, rows: Tensor) -> LastLayerGradients:
        """Returns the gradients of some images."""
        return LastLayerGradients(self.errors[rows], self.features[rows])


class GradientCosineKernel:
    """(1 + cos) / 2 of last-layer gradients."""

    def __init__(self, gradients: LastLayerGradients) -> None:
        # Both factors of the outer product are normalised, so products are cosines.
        errors = gradients.errors / gradients.errors.norm(dim=1, keepdim=True).clamp(min=EPSILON)
        scale = (1 + gradients.features.square().sum(1, keepdim=True)).sqrt()
        self.errors, self.extended = errors, torch.cat([1 / scale, gradients.features / scale], 1)
        self.size = gradients.size

    def row(self, i: int) -> Tensor:
        return (1 + (self.errors @ self.errors[i]) * (self.extended @ self.extended[i])) / 2

    def sums(self) -> Tensor:
        total = self.errors.T @ self.extended
        return (self.size + ((self.errors @ total) * self.extended).sum(1).double()) / 2


class GradientDistanceKernel:
    """CRAIG's similarity of last-layer gradients: a constant minus the Euclidean distance. The constant, twice the
    largest norm, is at least any distance and does not change which images are chosen."""

    CHUNK = 256

    def __init__(self, gradients: LastLayerGradients) -> None:
        self.gradients, self.size = gradients, gradients.size
        self.squares = gradients.norms().square()
        self.constant = 2 * self.squares.max().sqrt() if self.size else torch.zeros(())

    def row(self, i: int) -> Tensor:
        squares = self.squares + self.squares[i] - 2 * self.gradients.products(i)
        return self.constant - squares.clamp(min=0).sqrt()

    def sums(self) -> Tensor:
        g, total = self.gradients, torch.zeros(self.size, dtype=torch.float64, device=self.squares.device)
        for start in range(0, self.size, self.CHUNK):
            part = slice(start, start + self.CHUNK)
            products = (g.errors[part] @ g.errors.T) * (1 + g.features[part] @ g.features.T)
            squares = self.squares[part, None] + self.squares - 2 * products
            total += (self.constant - squares.clamp(min=0).sqrt()).sum(0, dtype=torch.float64)
        return total
