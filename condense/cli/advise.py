"""The verb `advise`: which methods suit some data, a number of images and a time, and the command to run."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from condense.cli.parameters import (
    AsJson,
    Data,
    Device,
    Download,
    Images,
    Ipc,
    NetworkOption,
    Precision,
    number_option,
    plugin_options,
)
from condense.cli.request import RunRequest
from condense.errors import CondenseError
from condense.formatting import aligned, duration, shorten
from condense.registry import METHODS

if TYPE_CHECKING:
    from condense.data import Task

LABELS = ("any", "hard")
DEFAULT_NETWORK = "convnet-d3-w128-in"
"""That of most candidates; it must fit the images."""
MIN_SHARE = 0.1
"""Share of a method's default steps below which it is not recommended."""


@dataclass(frozen=True)
class Situation:
    """What decides which methods are worth planning."""

    ipc: int
    side: int
    """Shorter side of an image in pixels."""
    classes: int
    share: float
    """Images of the set per real training image."""


@dataclass(frozen=True)
class Candidate:
    """A method, when it is worth planning, and why."""

    method: str
    suits: Callable[[Situation], bool]
    why: str


CANDIDATES = (
    Candidate("ccs", lambda s: s.ipc >= 50 and s.share >= 0.05, "real images, evenly over easy and hard ones"),
    Candidate("datm", lambda s: 10 <= s.ipc <= 50 and s.side <= 64 and s.classes <= 200, "needs expert trajectories"),
    Candidate("rded", lambda s: s.ipc >= 10 or s.side > 64 or s.classes > 100, "crops with a teacher's labels"),
    Candidate("dance", lambda s: s.ipc >= 10 and s.side <= 64, "led the hard labels at 10 images per class"),
    Candidate("idm", lambda s: s.ipc < 10 and s.side <= 64, "led the hard labels at 1 image per class"),
    Candidate("dm", lambda s: s.ipc <= 50, "the quickest synthetic images; no pretraining"),
    Candidate("kmeans", lambda s: True, "real images near centroids; the baseline to beat"),
)
"""In order of the accuracy to expect where time does not matter. docs/results.md has the measurements."""


def advise(
    data: Data,
    ipc: Ipc = None,
    images: Images = None,
    minutes: Annotated[float, number_option("--minutes", float, "time at hand")] = 30.0,
    labels: Annotated[str, typer.Option(help="any, or hard for classes only")] = "any",
    network: NetworkOption = None,
    device: Device = "auto",
    precision: Precision = "auto",
    download: Download = False,
    as_json: AsJson = False,
) -> None:
    """Plans methods that suit your data and time.

    Prints the estimates of the candidates and the command to run.
    """
    from condense import api, jobs, networks
    from condense.device import pick_device, pick_precision

    if labels not in LABELS:
        raise CondenseError(f"--labels {labels}: must be any or hard")
    if (ipc is None) == (images is None):
        raise CondenseError("give --ipc N or --images N, one of them")
    if not minutes > 0:
        raise CondenseError(f"--minutes {minutes:g}: must be more than 0")
    jobs.run_checks(
        lambda: networks.check_network(network) if network else None,
        lambda: pick_precision(precision, pick_device(device)),
    )
    real = api.image_task(data, download=download)
    per_class = RunRequest("", data, ipc, images=images).images_per_class(real)
    try:
        jobs.check_fit(real, per_class, network or DEFAULT_NETWORK)
    except CondenseError as fault:
        hint = "; --network names another" if network is None and "convnet-d3" in str(fault) else ""
        raise CondenseError(f"{fault}{hint}") from fault
    share = per_class * real.num_classes / len(real.train)
    situation = Situation(per_class, min(real.shape[1:]), real.num_classes, share)
    chosen = [
        candidate
        for candidate in CANDIDATES
        if candidate.suits(situation) and (labels == "any" or METHODS.get(candidate.method).labels == "hard")
    ]
    plans = [_plan(candidate, real, per_class, minutes, network, device, precision) for candidate in chosen]
    if all(plan["fault"] for plan in plans):
        raise CondenseError("; ".join(dict.fromkeys(plan["fault"] for plan in plans)))
    best = next((plan for plan in plans if plan["fits"]), None)
    count = ["--ipc", str(per_class)] if images is None else ["--images", str(images)]
    choices = {"--device": device, "--precision": precision}
    command = None
    if best is not None:
        words = ["condense", "distill", best["method"], "--data", data, *count]
        words += ["--network", network] if network else []
        words += [word for flag, value in choices.items() if value != "auto" for word in (flag, value)]
        words += plugin_options(real.source, network)
        words += ["--minutes", f"{minutes:g}"] if best["seconds"] > 60 * minutes else []
        command = shlex.join(words)
    if as_json:
        print(json.dumps({"candidates": plans, "command": command}, indent=1))
        return
    rows = [["method", "labels", "whole run", f"in {minutes:g} min", "why"]]
    for plan in plans:
        fitting = shorten(plan["fault"], 60) or _format_share(plan)
        rows.append([plan["method"], plan["labels"], duration(plan["seconds"]), fitting, plan["why"]])
    size = f"{per_class:,} of each of {real.num_classes:,} classes, {100 * share:.2g} % of the data"
    print(f"{real.name}: {size}; best first where time does not matter\n")
    print(aligned(rows, ruled=True))
    print(f"\nrun: {command}" if command else "\nnothing fits; give more --minutes or a smaller --network")


def _plan(
    candidate: Candidate, real: Task, ipc: int, minutes: float, network: str | None, device: str, precision: str
) -> dict[str, Any]:
    """The estimate of a candidate's whole run, and the share of it that fits into the time."""
    from condense import jobs

    plan = {"method": candidate.method, "labels": METHODS.get(candidate.method).labels, "why": candidate.why}
    try:
        estimate = jobs.estimate_cost(candidate.method, real, ipc, network=network, device=device, precision=precision)
    except CondenseError as fault:
        return {**plan, "seconds": 0.0, "share": 0.0, "fits": False, "fault": str(fault)}
    seconds, steps = estimate["seconds"], estimate["steps"]
    share = min(1.0, 60 * minutes / max(seconds, 1e-9))
    if steps and share < 1:  # what comes before the steps is needed in any case
        fixed = seconds - steps * estimate["seconds_per_step"]
        share = max(0.0, 60 * minutes - fixed) / max(steps * estimate["seconds_per_step"], 1e-9)
    fits = share >= (MIN_SHARE if steps else 1)
    return {**plan, "seconds": seconds, "share": share, "fits": fits, "fault": ""}


def _format_share(plan: dict[str, Any]) -> str:
    if plan["share"] >= 1:
        return "all of it"
    return f"{100 * plan['share']:.0f} % of its steps" if plan["fits"] else "too long"
