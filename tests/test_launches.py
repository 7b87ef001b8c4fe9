"""Kernel launches of a step on a pretended CUDA device: a GPU is idle between them, so each has a budget."""

import pytest
import torch
from pretended import pretended, reason_to_skip

from condense.benchmarks.speed.measure import Case, drive, random_task
from condense.registry import METHODS

pytestmark = pytest.mark.skipif(bool(reason_to_skip()), reason=reason_to_skip())

SHORT = {"idc": {"networks": 1, "snapshots": 2, "net_steps": 1}}


@pytest.mark.parametrize(("name", "budget"), [("dm", 300), ("dc", 900), ("dsa", 900), ("idc", 900)])
def test_a_step_on_ten_classes_stays_within_its_budget_of_launches(name, budget, monkeypatch):
    monkeypatch.setenv("CONDENSE_LOG_SECONDS", "1000")
    counts = []
    with pretended() as log:
        case = Case(random_task(10, 20, (3, 32, 32), 1), 1, 8, torch.device("cuda", 0))
        config = METHODS.get(name).config(steps=3, batch_real=8, **SHORT.get(name, {}))
        drive(name, config, case, lambda run, index: counts.append(sum(log.launches.values())))
    launches = counts[2] - counts[1]  # the first step prepares, the last one ends the run
    assert 0 < launches <= budget
