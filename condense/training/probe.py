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
    labels = torch.as_tensor(task.train.labels).to(device)
    fitted, held = [0, 0], []
    for ids in torch.arange(len(task.train)).split(TEST_CHUNK):
        with autocast(device, precision):
            features = net.embed(task.batch(ids)).double()
        features = F.pad(features, (0, 1), value=1.0)
        classes = labels[ids.to(device)]
        targets = F.one_hot(classes, task.num_classes).double()
        is_held = (ids % HELD_OUT == 0).to(device)
        for k, rows in enumerate((~is_held, is_held)):
            fitted[k] = fitted[k] + features[rows].T @ torch.cat([features[rows], targets[rows]], 1)
        held.append((features[is_held], classes[is_held]))
    rest, whole = fitted[0], fitted[0] + fitted[1]
    points, classes = (torch.cat(parts) for parts in zip(*held))
    correct = [int(((points @ _solve(rest, ridge)).argmax(1) == classes).sum()) for ridge in RIDGES]
    weights = _solve(whole, RIDGES[correct.index(max(correct))]).float()
    probe = nn.Linear(len(weights) - 1, task.num_classes, device=device)
    probe.weight.copy_(weights[:-1].T)
    probe.bias.copy_(weights[-1])
    return probe


def _solve(sums: Tensor, ridge: float) -> Tensor:
    """Weights (D, classes) from X^T [X, Y], float64 (D, D + classes)."""
    gram, products = sums[:, : len(sums)], sums[:, len(sums) :]
    penalty = ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(gram + penalty, products)
