"""Scores of images from the predictions of networks while these are trained.

Functions take what one network predicts for n images after each of E epochs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class ScoreColumn(NamedTuple):
    """A column of the table of scores."""

    meaning: str
    sign: int
    """1 if a larger score is a harder image, -1 if it is an easier one."""


COLUMNS: dict[str, ScoreColumn] = {
    "el2n": ScoreColumn("L2 norm of the error of the probabilities, early in training (EL2N)", 1),
    "grand": ScoreColumn("norm of the last layer's gradient, early in training (GraNd)", 1),
    "forgetting": ScoreColumn("times that a correct image became wrong; never learned counts as most", 1),
    "aum": ScoreColumn("margin of the true class in logits, mean over epochs (AUM)", -1),
    "loss": ScoreColumn("cross-entropy after training", 1),
    "entropy": ScoreColumn("entropy of the probabilities after training", 1),
    "margin": ScoreColumn("largest probability less the second largest, after training", -1),
    "leastconf": ScoreColumn("largest probability after training", -1),
    "dual": ScoreColumn("difficulty times uncertainty of the true class in the first epochs (DUAL)", 1),
    "target": ScoreColumn("probability of the true class, mean over the epochs of dual", -1),
}


def image_scores(logits: Tensor, features: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Returns what one pass of one network says of n images, float32 (n,) each.

    Args:
        logits: (n, C).
        features: input of the last layer, (n, D).
        labels: int64 (n,).

    Returns:
        ``target`` (probability of the true class), ``correct`` (0 or 1), ``el2n``, ``grand``, ``aum`` (logit of the
        true class less the largest other), ``loss``, ``entropy``, ``margin`` and ``leastconf``.
    """
    logits = logits.float()
    log_probabilities = F.log_softmax(logits, 1)
    probabilities = log_probabilities.exp()
    truth = labels[:, None]
    error = probabilities.scatter_add(1, truth, torch.full_like(truth, -1, dtype=probabilities.dtype)).norm(dim=1)
    others = logits.scatter(1, truth, -torch.inf).max(1).values
    largest = probabilities.topk(2, dim=1).values
    return {
        "target": probabilities.gather(1, truth)[:, 0],
        "correct": (logits.argmax(1) == labels).float(),
        "el2n": error,
        "grand": error * (1 + features.float().square().sum(1)).sqrt(),
        "aum": logits.gather(1, truth)[:, 0] - others,
        "loss": -log_probabilities.gather(1, truth)[:, 0],
        "entropy": -(probabilities * log_probabilities).sum(1),
        "margin": largest[:, 0] - largest[:, 1],
        "leastconf": largest[:, 0],
    }


def forgetting_counts(correct: Tensor) -> Tensor:
    """Counts how often a correct image became wrong from one epoch to the next (Toneva et al., 2019).

    Images that were never correct count as most forgotten: they get the number of epochs, which no count reaches.

    Args:
        correct: 0 or 1, (E, n).

    Returns:
        float32 (n,).
    """
    right = correct > 0.5
    counts = (right[:-1] & ~right[1:]).sum(0).float()
    return torch.where(right.any(0), counts, torch.full_like(counts, len(correct)))


def dual_scores(target: Tensor, window: int) -> Tensor:
    """DUAL (Cho et al., 2025): the mean over windows of consecutive epochs of (1 - mean) * std of the target
    probability.

    Args:
        target: probability of the true class, (E, n).
        window: epochs in a window, at least 2; at most E are taken.
    """
    windows = target.unfold(0, min(window, len(target)), 1)  # (windows, n, window)
    return ((1 - windows.mean(2)) * windows.std(2)).mean(0)


def summarise(history: dict[str, Tensor], early: int, window: int, dual_epochs: int) -> dict[str, Tensor]:
    """Returns the columns of the table from the history of one network.

    Args:
        history: the values of :func:`image_scores` after each epoch, (E, n) each, E >= 2.
        early: number of the epoch, from 1, after which el2n and grand are taken; at most the last one.
        window: of DUAL.
        dual_epochs: first epochs that DUAL takes.
    """
    epoch = min(early, len(history["el2n"])) - 1
    first = history["target"][:dual_epochs]
    columns = {name: history[name][-1] for name in ("loss", "entropy", "margin", "leastconf")}
    return columns | {
        "el2n": history["el2n"][epoch],
        "grand": history["grand"][epoch],
        "forgetting": forgetting_counts(history["correct"]),
        "aum": history["aum"].mean(0),
        "dual": dual_scores(first, window),
        "target": first.mean(0),
    }
