"""Protocols: what every packaged one states, and the budget."""

import pytest

from condense.protocols import Protocol, get_protocol, protocols


def protocol(**changes):
    values = {
        "name": "x", "version": 1, "summary": "", "labels": "hard", "networks": ["own"], "steps": 1000,
        "per_images": 256, "batch": 256, "lr": [0.01], "held_out": 0.1, "momentum": 0.9, "weight_decay": 5e-4,
        "drops": [0.5], "drop_factor": 0.1, "augment": "none", "full_epochs": 60, "runs": 5,
    }  # fmt: skip
    return Protocol(**{**values, **changes})


def test_budgets():
    assert [protocol().recipe(size, mirror=True).steps for size in (10, 256, 257, 500)] == [1000, 1000, 2000, 2000]
    assert protocol().recipe(10, mirror=True).rate(499) == 0.01
    assert protocol().recipe(10, mirror=True).rate(500) == pytest.approx(0.001)
    assert protocol().recipe(10, mirror=True, lr=0.5, steps=7).lr == 0.5


def test_every_packaged_protocol_is_whole():
    assert {"dc-v1", "dc-soft-v1", "dc-tuned-v1", "quick-v1", "quick-soft-v1"} <= set(protocols())
    for name, found in protocols().items():
        assert found.name == name and name.endswith(f"-v{found.version}")
        assert found.labels in ("hard", "soft") and found.networks and found.lr and found.summary
        assert "flip" not in str(found.recipe(10, mirror=False).augment)


def test_soft_protocols_differ_from_hard_ones_in_labels_only():
    for pair in (("dc-v1", "dc-soft-v1"), ("quick-v1", "quick-soft-v1")):
        hard, soft = map(get_protocol, pair)
        assert hard.recipe(10, mirror=True) == soft.recipe(10, mirror=True)
        assert (hard.labels, soft.labels) == ("hard", "soft")
