"""Protocols: what every packaged one states, and the budget."""

import pytest

from condense.judge import Protocol, get_protocol, protocols


def protocol(**changes):
    values = {
        "name": "x",
        "version": 1,
        "summary": "",
        "labels": "hard",
        "networks": ["own"],
        "steps": 1000,
        "per_images": 256,
        "batch": 256,
        "lr": [0.01],
        "held_out": 0.1,
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "drops": [0.5],
        "drop_factor": 0.1,
        "augment": "none",
        "full_epochs": 60,
        "runs": 5,
    }
    return Protocol(**{**values, **changes})


def test_budgets():
    assert [protocol().recipe(size, mirror=True).steps for size in (10, 256, 257, 500)] == [1000, 1000, 2000, 2000]
    assert protocol().recipe(10, mirror=True).lr_at(499) == 0.01
    assert protocol().recipe(10, mirror=True).lr_at(500) == pytest.approx(0.001)
    assert protocol().recipe(10, mirror=True, lr=0.5, steps=7).lr == 0.5


def test_every_packaged_protocol_is_whole():
    assert {"dc-v1", "dc-soft-v1", "dc-tuned-v1", "quick-v1", "quick-soft-v1"} <= set(protocols())
    for name, found in protocols().items():
        assert found.name == name and name.endswith(f"-v{found.version}")
        assert found.labels in ("hard", "soft") and found.networks and found.lr and found.summary
        augment = found.recipe(10, mirror=False).augment
        assert augment is None or "flip" not in augment.ops


def test_soft_protocols_differ_from_hard_ones_in_labels_only():
    for pair in (("dc-v1", "dc-soft-v1"), ("quick-v1", "quick-soft-v1")):
        hard, soft = map(get_protocol, pair)
        assert hard.recipe(10, mirror=True) == soft.recipe(10, mirror=True)
        assert (hard.labels, soft.labels) == ("hard", "soft")


def test_a_protocol_that_changes_gets_a_new_version():
    """What decides a student, by name; an edit belongs into a new version with a digest of its own."""
    import dataclasses
    import hashlib
    import json

    digests = {
        "dc-v1": "2b8420661199ce6f",
        "dc-plain-v1": "b469886364bd4363",
        "dc-soft-v1": "4ad60779b158fcc6",
        "dc-tuned-v1": "777bc14eedc5168c",
        "quick-v1": "c1fbf6299bd29d23",
        "quick-soft-v1": "338031c47fa1d896",
        "idc-v1": "b9eb0e50e55e214a",
        "mtt-v1": "ef52309bf3865c42",
        "mtt-soft-v1": "d637ac30b00f7671",
        "cvdd-v1": "3bf6b6c5a592ac6b",
        "cvdd-v2": "cdf15729e958140d",
        "cvdd-half-v1": "2fc9bd7ec06b5b6b",
        "dwa-v1": "2b0c46165221d0e5",
        "dwa-v2": "95dd41963a2e099f",
        "infer-v1": "920cbea8e1df5140",
        "infer-v2": "860f661ce367d72c",
    }
    for name, digest in digests.items():
        protocol = get_protocol(name)
        # A field that came later stands at what was done before it existed.
        content = {
            field.name: getattr(protocol, field.name)
            for field in dataclasses.fields(protocol)
            if field.name != "summary" and getattr(protocol, field.name) != field.default
        }
        assert hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16] == digest, name
