"""TODO-DOC."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from condense import rng

RESAMPLES = 10000
"""Bootstrap samples of the runs behind the intervals of LRS and ARS."""

USES = (1, 10, 100)
"""Numbers of networks trained on one set, over which the time to make it is shared out."""

# -- numbers ----------------------------------------------------------------------------------------------------------


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Mean, sample standard deviation and 95 % t-interval of the mean (None for both with a single value)."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return {"mean": mean, "std": None, "ci95": None}
    from scipy.stats import t

    std = statistics.stdev(values)
    half = float(t.ppf(0.975, len(values) - 1)) * std / math.sqrt(len(values))
    return {"mean": mean, "std": std, "ci95": [mean - half, mean + half]}


def _interval(values: Sequence[float]) -> dict[str, Any]:
    """A score that is a mean of paired differences, with its t-interval."""
    found = summary(values)
    return {"value": found["mean"], "ci95": found["ci95"]}


def normalised(alpha: float) -> float:
    """DD-Ranking's map of a difference of accuracies in [-1,1] to [0,1]: (e^a - e^-1) / (e - e^-1); 0.2689 at 0."""
    return (math.exp(alpha) - math.exp(-1)) / (math.e - math.exp(-1))


def resampled(score: Callable[..., float], *arms: Sequence[float]) -> dict[str, Any]:
    """``score`` of the arms' mean accuracies, with a 95 % interval from resampling runs, the same ones in every arm.

    With few runs the interval is too narrow: three runs have only ten different resamples.
    """
    value = score(*(statistics.fmean(arm) for arm in arms))
    runs = len(arms[0])
    if runs < 2:
        return {"value": value, "ci95": None}
    picks = rng.Draws("bootstrap", runs).integers(runs, (RESAMPLES, runs))
    means = [torch.tensor(arm, dtype=torch.float64)[picks].mean(1).tolist() for arm in arms]
    samples = torch.tensor([score(*row) for row in zip(*means)], dtype=torch.float64)
    low, high = torch.quantile(samples, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"value": value, "ci95": [low, high]}


def _minus(a: Sequence[float], b: Sequence[float]) -> list[float]:
    return [x - y for x, y in zip(a, b)]


def scores(results: Sequence[dict[str, Any]], label_kind: str = "hard") -> dict[str, Any]:
    """DD-Ranking's scores per network, on fractions, as far as the arms that were run allow.

    IOR = distilled - random, both with the labels of the track. HLR = full - distilled, both with hard labels.
    LRS = n((IOR - HLR) / 2) and ARS = n((IOR with augmentation + IOR without) / 2), n as in :func:`normalised`.
    Run k of every arm starts from the same weights, so IOR and HLR carry the t-interval of paired differences; LRS and
    ARS that of resampled runs.

    Args:
        results: the record's entries.
        label_kind: of the set; a set with hard labels has no other arm with them.
    """
    found: dict[str, Any] = {}
    for network in dict.fromkeys(entry["network"] for entry in results):
        arms = {
            (entry["arm"], entry["labels"], entry["augment"]): entry["accuracies"]
            for entry in results
            if entry["network"] == network
        }
        augmented = _augmented(results)
        track = "own" if ("distilled", "own", augmented) in arms else "hard"
        made, control = (arms.get((arm, track, augmented)) for arm in ("distilled", "random"))
        hard = arms.get(("distilled", "own" if label_kind == "hard" else "hard", augmented))
        full = arms.get(("full", "hard", augmented))
        plain = [arms.get((arm, track, False)) for arm in ("distilled", "random")] if augmented else [None, None]
        values: dict[str, Any] = {}
        if made and control:
            values["IOR"] = _interval(_minus(made, control))
        if full and hard:
            values["HLR"] = _interval(_minus(full, hard))
        if made and control and full and hard:
            values["LRS"] = resampled(_lrs, made, control, full, hard)
        if made and control and plain[0] and plain[1]:
            values["ARS"] = resampled(_ars, made, control, plain[0], plain[1])
        found[network] = values
    return found


def _augmented(results: Sequence[dict[str, Any]]) -> bool:
    """Whether the protocol augments: False only where no arm does."""
    return any(entry["augment"] for entry in results)


def _lrs(made: float, control: float, full: float, hard: float) -> float:
    return normalised(0.5 * (made - control) - 0.5 * (full - hard))


def _ars(made: float, control: float, plain_made: float, plain_control: float) -> float:
    return normalised(0.5 * (made - control) + 0.5 * (plain_made - plain_control))


def cross_architecture(results: Sequence[dict[str, Any]], own: str) -> dict[str, Any] | None:
    """How much accuracy the set loses on networks that it was not made with: own minus the mean of the others.

    Paired by run. None where the set's own network or any other was not judged.
    """
    by_network = {entry["network"]: entry["accuracies"] for entry in results if _is_main(entry, results)}
    others = [network for network in by_network if network != own]
    if own not in by_network or not others:
        return None
    means = [statistics.fmean(run) for run in zip(*(by_network[network] for network in others))]
    return {"network": own, "others": others, "drop": _interval(_minus(by_network[own], means))}


def _is_main(entry: dict[str, Any], results: Sequence[dict[str, Any]]) -> bool:
    """Whether the entry is the distilled arm as its track judges it: own labels where there are such, augmented."""
    own = any(e["arm"] == "distilled" and e["labels"] == "own" for e in results)
    return (
        entry["arm"] == "distilled"
        and entry["labels"] == ("own" if own else "hard")
        and entry["augment"] == _augmented(results)
    )


def main_entries(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The record's entries of the distilled set itself, one per network."""
    return [entry for entry in record["results"] if _is_main(entry, record["results"])]


def time_to_accuracy(results: Sequence[dict[str, Any]], cost: dict[str, Any]) -> list[dict[str, Any]]:
    """Seconds from nothing to a trained network, per arm and network, and the accuracy that they buy.

    Args:
        results: the record's entries.
        cost: the set's; ``seconds`` and ``preparation_seconds`` (experts, teachers, labels made elsewhere).

    Returns:
        One entry for each: ``train_seconds`` of one student, ``made_seconds`` of what it learns from (None where
        unknown, 0 for real data), and ``total_seconds`` by number of uses: made / uses + train.
    """
    made = float(cost["seconds"] + cost.get("preparation_seconds", 0.0)) if "seconds" in cost else None
    found = []
    for entry in results:
        train = entry["seconds"] / len(entry["accuracies"])
        before = made if entry["arm"] == "distilled" else 0.0
        found.append(
            {
                **{key: entry[key] for key in ("arm", "labels", "augment", "network")},
                "accuracy": entry["mean"],
                "train_seconds": round(train, 3),
                "made_seconds": before,
                "total_seconds": {
                    str(uses): None if before is None else round(before / uses + train, 3) for uses in USES
                },
            }
        )
    return found
