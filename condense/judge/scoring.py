"""Scores: means, intervals, DD-Ranking's scores, cross-architecture loss and time to accuracy."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from condense import rng

RESAMPLES = 10000
"""Bootstrap samples for the intervals of LRS and ARS."""

REUSE_COUNTS = (1, 10, 100)
"""Numbers of networks trained on one set; the time to make the set is divided by these."""


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Mean, sample std and 95 % t-interval of the mean; std and interval are None for a single value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return {"mean": mean, "std": None, "ci95": None}
    from scipy.stats import t

    std = statistics.stdev(values)
    half = float(t.ppf(0.975, len(values) - 1)) * std / math.sqrt(len(values))
    return {"mean": mean, "std": std, "ci95": [mean - half, mean + half]}


def _interval(values: Sequence[float]) -> dict[str, Any]:
    """Mean of paired differences with its t-interval."""
    statistics_ = summary(values)
    return {"value": statistics_["mean"], "ci95": statistics_["ci95"]}


def normalise_score(alpha: float) -> float:
    """Maps a difference of accuracies in [-1,1] to [0,1] as DD-Ranking does: (e^a - e^-1) / (e - e^-1); 0.2689 at 0."""
    return (math.exp(alpha) - math.exp(-1)) / (math.e - math.exp(-1))


def bootstrap_score(score: Callable[..., float], *arms: Sequence[float]) -> dict[str, Any]:
    """Computes ``score`` of the mean accuracies of arms, with a 95 % bootstrap interval.

    Runs are resampled, the same ones in every arm. With few runs the interval is too narrow: three runs have only ten
    different resamples.
    """
    value = score(*(statistics.fmean(arm) for arm in arms))
    runs = len(arms[0])
    if runs < 2:
        return {"value": value, "ci95": None}
    resamples = rng.Draws("bootstrap", runs).integers(runs, (RESAMPLES, runs))
    means = [torch.tensor(arm, dtype=torch.float64)[resamples].mean(1).tolist() for arm in arms]
    samples = torch.tensor([score(*row) for row in zip(*means)], dtype=torch.float64)
    low, high = torch.quantile(samples, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"value": value, "ci95": [low, high]}


def _minus(a: Sequence[float], b: Sequence[float]) -> list[float]:
    return [x - y for x, y in zip(a, b)]


def compute_scores(results: Sequence[dict[str, Any]], label_kind: str = "hard") -> dict[str, Any]:
    """Computes DD-Ranking's scores per network from accuracies in [0,1], as far as the arms allow.

    IOR = distilled - random, both with the labels of the track. HLR = full - distilled, both with hard labels.
    LRS = n((IOR - HLR) / 2) and ARS = n((IOR with augmentation + IOR without) / 2), n as in :func:`normalised`.
    Run k of every arm starts from the same weights, so IOR and HLR have the t-interval of paired differences. LRS and
    ARS have the interval of resampled runs.

    Args:
        results: entries of ``results`` of a record.
        label_kind: label kind of the set; a set with hard labels has no other arm with hard labels.
    """
    by_network: dict[str, Any] = {}
    for network in dict.fromkeys(entry["network"] for entry in results):
        arms = {
            (entry["arm"], entry["labels"], entry["augment"]): entry["accuracies"]
            for entry in results
            if entry["network"] == network
        }
        augmented = is_augmented(results)
        track = "own" if ("distilled", "own", augmented) in arms else "hard"
        distilled, control = (arms.get((arm, track, augmented)) for arm in ("distilled", "random"))
        hard = arms.get(("distilled", "own" if label_kind == "hard" else "hard", augmented))
        full = arms.get(("full", "hard", augmented))
        plain = [arms.get((arm, track, False)) for arm in ("distilled", "random")] if augmented else [None, None]
        values: dict[str, Any] = {}
        if distilled and control:
            values["IOR"] = _interval(_minus(distilled, control))
        if full and hard:
            values["HLR"] = _interval(_minus(full, hard))
        if distilled and control and full and hard:
            values["LRS"] = bootstrap_score(_lrs, distilled, control, full, hard)
        if distilled and control and plain[0] and plain[1]:
            values["ARS"] = bootstrap_score(_ars, distilled, control, plain[0], plain[1])
        by_network[network] = values
    return by_network


def is_augmented(results: Sequence[dict[str, Any]]) -> bool:
    """Whether the protocol augments, that is, whether any arm is augmented."""
    return any(entry["augment"] for entry in results)


def _lrs(distilled: float, control: float, full: float, hard: float) -> float:
    return normalise_score(0.5 * (distilled - control) - 0.5 * (full - hard))


def _ars(distilled: float, control: float, plain_distilled: float, plain_control: float) -> float:
    return normalise_score(0.5 * (distilled - control) + 0.5 * (plain_distilled - plain_control))


def cross_architecture(results: Sequence[dict[str, Any]], own: str) -> dict[str, Any] | None:
    """Accuracy lost on networks that the set was not made with: its own network's minus the mean of the others.

    Paired by run. Returns None if the set's own network or all others were not evaluated.
    """
    by_network = {entry["network"]: entry["accuracies"] for entry in results if _is_main(entry, results)}
    others = [network for network in by_network if network != own]
    if own not in by_network or not others:
        return None
    means = [statistics.fmean(run) for run in zip(*(by_network[network] for network in others))]
    return {"network": own, "others": others, "drop": _interval(_minus(by_network[own], means))}


def _is_main(entry: dict[str, Any], results: Sequence[dict[str, Any]]) -> bool:
    """Whether the entry is the augmented distilled arm, with its own labels if any entry has them."""
    has_own = any(other["arm"] == "distilled" and other["labels"] == "own" for other in results)
    return (
        entry["arm"] == "distilled"
        and entry["labels"] == ("own" if has_own else "hard")
        and entry["augment"] == is_augmented(results)
    )


def means_by_arm(record: dict[str, Any]) -> dict[str, float]:
    """Mean accuracy of each arm in ``results``; of an arm that is there several times, that of its first entry."""
    return {entry["arm"]: entry["mean"] for entry in reversed(record["results"])}


def main_entries(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Entries of the distilled set in ``results``, one per network."""
    return [entry for entry in record["results"] if _is_main(entry, record["results"])]


def time_to_accuracy(results: Sequence[dict[str, Any]], cost: dict[str, Any]) -> list[dict[str, Any]]:
    """Accuracy and time until a network is trained, including the time to make the set.

    Args:
        results: entries of ``results`` of a record.
        cost: cost of the set; ``seconds`` and ``preparation_seconds`` (experts, teachers, labels).

    Returns:
        One entry per arm and network: ``accuracy``, ``train_seconds`` of one student, ``made_seconds`` of its training
        data (None if unknown, 0 for real data), and ``total_seconds`` by number of uses: made / uses + train.
    """
    set_seconds = float(cost["seconds"] + cost.get("preparation_seconds", 0.0)) if "seconds" in cost else None
    entries = []
    for entry in results:
        train = entry["seconds"] / len(entry["accuracies"])
        made_seconds = set_seconds if entry["arm"] == "distilled" else 0.0
        entries.append(
            {
                **{key: entry[key] for key in ("arm", "labels", "augment", "network")},
                "accuracy": entry["mean"],
                "train_seconds": round(train, 3),
                "made_seconds": made_seconds,
                "total_seconds": {
                    str(uses): None if made_seconds is None else round(made_seconds / uses + train, 3)
                    for uses in REUSE_COUNTS
                },
            }
        )
    return entries
