"""Protocols: what every packaged one states, and the budget."""

import pytest

from condense.augment import Augmentation, CropViews
from condense.config import packaged_yaml
from condense.errors import CondenseError
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
        flips = (
            augment.flip
            if isinstance(augment, CropViews)
            else isinstance(augment, Augmentation) and "flip" in augment.ops
        )
        assert not flips


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


@pytest.mark.parametrize(
    "name, size, steps, batch, changes",
    [
        ("datadam-v1", 100, 3600, 64, {"augment": "color_crop_cutout_flip_scale_rotate", "drops": [0.5]}),
        ("dance-v1", 40, 1500, 64, {"cutmix": 0.5, "augment_variant": "idc", "drop_factor": 0.2}),
        ("dc-mnist-v1", 10, 1000, 256, {"augment": "crop_scale_rotate", "augment_variant": "dc"}),
        ("dc-bench-randaugment-v1", 10, 1000, 256, {"augment": "randaugment"}),
        ("dc-bench-autoaugment-v1", 10, 1000, 256, {"augment": "autoaugment"}),
        ("idc-mnist-v1", 10, 1000, 64, {"cutmix": 0.0, "augment": "color_crop_scale_rotate"}),
        ("rded-b10-v1", 10, 300, 10, {"stretch": 2.0, "optimizer": "adamw"}),
        ("rded-b20-v1", 100, 1500, 20, {"stretch": 2.0, "lr": [0.001]}),
        ("rded-b50-v1", 100, 600, 50, {"stretch": 2.0, "schedule": "cosine"}),
        ("rded-b200-v1", 5000, 7500, 200, {"stretch": 2.0, "weight_decay": 0.01}),
        ("sre2l-tiny-v1", 10_000, 4000, 256, {"lr": [0.2], "optimizer": "sgd", "warmup": 0.05, "schedule": "cosine"}),
        ("lpld-tiny-v1", 10_000, 15_700, 64, {"lr": [0.2], "optimizer": "sgd", "warmup": 0.05}),
        ("dwa-tiny-v1", 10_000, 31_400, 64, {"lr": [0.2], "optimizer": "sgd", "weight_decay": 0.0001, "warmup": 0.025}),
        ("idc-svhn-ipc1-v1", 10, 1000, 64, {"cutmix": 0.0, "augment": "color_crop_cutout_scale_rotate"}),
    ],
)
def test_protocols_as_published(name, size, steps, batch, changes):
    rules = get_protocol(name)
    assert (rules.budget(size), rules.batch) == (steps, batch)
    assert {key: getattr(rules, key) for key in changes} == changes


def test_warm_up_raises_the_learning_rate():
    recipe = get_protocol("dwa-tiny-v1").recipe(64, mirror=True)  # 200 steps
    assert recipe.lr_at(0) == pytest.approx(0.2 / 5, rel=1e-3) and recipe.lr_at(1) == pytest.approx(0.4 / 5, rel=1e-3)
    assert recipe.lr_at(5) == pytest.approx(0.2, rel=2e-3) and recipe.lr_at(199) < 1e-4


def test_a_protocol_of_ones_own(tmp_path):
    text = next(f for f in packaged_yaml("benchmarks/protocols") if f.name == "quick-v1.yaml").read_text()
    own = tmp_path / "mine.yaml"
    own.write_text(text.replace("name: quick-v1", "name: mine-v1").replace("steps: 300", "steps: 7"))
    assert get_protocol(str(own)).steps == 7 and get_protocol(str(own)).name == "mine-v1"
    own.write_text(text)
    assert get_protocol(str(own)) == get_protocol("quick-v1")
    own.write_text(text.replace("steps: 300", "steps: 7"))
    with pytest.raises(CondenseError, match="'quick-v1' is another protocol's name"):
        get_protocol(str(own))
    with pytest.raises(CondenseError, match="no such file; `condense ls protocols`"):
        get_protocol(str(tmp_path / "other.yaml"))


def test_a_folder_of_protocols(tmp_path, monkeypatch):
    """The file of a protocol has its name, and finding one reads no other."""
    text = next(f for f in packaged_yaml("benchmarks/protocols") if f.name == "quick-v1.yaml").read_text()
    (tmp_path / "mine-v1.yaml").write_text(text.replace("name: quick-v1", "name: mine-v1").replace("300", "7"))
    (tmp_path / "theirs.yaml").write_text(text.replace("name: quick-v1", "name: theirs-v1"))
    monkeypatch.setenv("CONDENSE_PROTOCOLS", str(tmp_path))
    assert get_protocol("mine-v1").steps == 7 and get_protocol("quick-v1").steps == 300
    with pytest.raises(CondenseError, match=r"theirs\.yaml: name=theirs-v1: must be that of the file"):
        get_protocol("theirs")
    with pytest.raises(CondenseError, match="unknown protocol 'mine-v2'; did you mean 'mine-v1'"):
        get_protocol("mine-v2")
    (tmp_path / "theirs.yaml").rename(tmp_path / "theirs-v1.yaml")
    assert {"mine-v1", "theirs-v1", "quick-v1"} <= set(protocols())
