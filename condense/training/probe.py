"""Linear probes: classifiers on the features of a frozen network."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condense.data import Task
from condense.device import autocast
from condense.networks import Network
from condense.training.loop import TEST_CHUNK

RIDGES = (1e-6, 1e-4, 1e-2)
"""Penalties that are tried, as shares of the mean squared feature."""

HELD_OUT = 10
"""Every tenth train image is held out to choose the penalty."""


@torch.no_grad()
def fit_linear_probe(net: Network, task: Task, *, device: torch.device, precision: str = "fp32") -> nn.Linear:
    """Fits a linear classifier on the features of a network by ridge regression of the classes (1 or 0).

    The penalty is the best one of ``RIDGES`` on held-out train images; then all train images are used. The sums over
    images are float64, and there is nothing random. Puts the network into eval mode.

    Args:
        net: its ``embed`` gives the features.
        task: train images and classes; test images are not used.
        device: device of the network.
        precision: of the network.

    Returns:
        The layer (features to classes), on the device.
    """
    net.to(device).eval()

    def embed(ids: Tensor) -> tuple[Tensor, Tensor]:
        with autocast(device, precision):
            features = net.embed(task.batch(ids)).double()
        return F.pad(features, (0, 1), value=1.0), torch.from_numpy(task.train.labels[ids.numpy()]).to(device)

    def sums_over(ids: Tensor) -> Tensor:
        total: Tensor | None = None
        for part in ids.split(TEST_CHUNK):
            features, classes = embed(part)
            products = features.T @ torch.cat([features, F.one_hot(classes, task.num_classes)], 1)
            total = products if total is None else total + products
        assert total is not None
        return total

    everything = torch.arange(len(task.train))
    held = everything % HELD_OUT == 0
    fitted, rest = sums_over(everything[~held]), sums_over(everything[held])
    weights = [_solve(fitted, ridge) for ridge in RIDGES]
    correct = [0] * len(RIDGES)
    for part in everything[held].split(TEST_CHUNK):
        features, classes = embed(part)
        correct = [
            count + int(((features @ weight).argmax(1) == classes).sum()) for count, weight in zip(correct, weights)
        ]
    chosen = _solve(fitted + rest, RIDGES[correct.index(max(correct))]).float()
    probe = nn.Linear(len(chosen) - 1, task.num_classes, device=device)
    probe.weight.copy_(chosen[:-1].T)
    probe.bias.copy_(chosen[-1])
    return probe


def _solve(sums: Tensor, ridge: float) -> Tensor:
    """Weights (D, classes) from X^T [X, Y], float64 (D, D + classes)."""
    gram, products = sums[:, : len(sums)], sums[:, len(sums) :]
    penalty = ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(gram + penalty, products)
