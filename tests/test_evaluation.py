"""The judge: arms under one budget, numbers by hand, the cache, and the record."""

import json
import math

import pytest
import torch

import condense
from condense import evaluation
from condense.errors import CondenseError

NETWORK = "convnet-d2-w8-in"


@pytest.fixture
def made(tiny):
    return condense.distill("dm", tiny, 2, network=NETWORK, steps=2, batch_real=6)


@pytest.fixture(autouse=True)
def short_protocol(monkeypatch):
    """quick-v1 with 20 steps and two runs."""
    import dataclasses

    quick = dataclasses.replace(evaluation.get_protocol("quick-v1"), steps=20, full_epochs=2, runs=2)
    monkeypatch.setattr(evaluation, "protocols", lambda: {"quick-v1": quick, "dc-v1": quick})


def count_trainings(monkeypatch):
    counted = []
    original = evaluation.train

    def watch(students, *arguments, **options):
        counted.append(len(students))
        return original(students, *arguments, **options)

    monkeypatch.setattr(evaluation, "train", watch)
    return counted


def test_the_record_has_the_contracts_fields(made, tiny):
    controls = ["random", "noise", "full", "full-equal"]
    record = condense.evaluate(made, tiny, networks=[NETWORK, "mlp"], runs=2, protocol="quick-v1", controls=controls)
    assert record["schema"] == "condense.record/1"
    assert set(record) >= {"set", "protocol", "runs", "seed", "results", "scores", "cost", "environment", "command"}
    assert set(record["set"]) >= {"name", "sha256", "method", "dataset", "ipc", "label_kind", "bytes"}
    assert set(record["set"]["bytes"]) == {"images", "labels", "auxiliary", "total"}
    assert record["protocol"] == {"name": "quick-v1", "version": 1}
    assert len(record["results"]) == 2 * 5
    for entry in record["results"]:
        assert set(entry) >= {"arm", "labels", "augment", "network", "accuracies", "mean", "std", "ci95", "seconds"}
        assert len(entry["accuracies"]) == 2
        assert all(0 <= accuracy <= 1 for accuracy in entry["accuracies"])
    by_arm = {entry["arm"]: entry for entry in record["results"] if entry["network"] == NETWORK}
    assert by_arm["full-equal"]["steps"] == by_arm["distilled"]["steps"] == by_arm["random"]["steps"] == 20
    assert by_arm["full"]["steps"] == 20  # two passes over 36 images are 2 steps: fewer than the distilled arm's
    json.dumps(record)
    assert "random" in evaluation.table(record)


def test_an_identical_evaluation_trains_nothing_and_a_second_set_only_its_own_arm(made, tiny, monkeypatch):
    counted = count_trainings(monkeypatch)
    first = condense.evaluate(made, tiny, runs=2)
    assert len(counted) == 4
    again = condense.evaluate(made, tiny, runs=2)
    assert len(counted) == 4
    assert [entry["accuracies"] for entry in first["results"]] == [entry["accuracies"] for entry in again["results"]]
    other = condense.distill("dm", tiny, 2, network=NETWORK, steps=1, seed=5, batch_real=6)
    condense.evaluate(other, tiny, runs=2)
    assert len(counted) == 6
    condense.evaluate(other, tiny, runs=3)  # one more run of each arm
    assert len(counted) == 8


def test_the_cache_is_never_needed(made, tiny, monkeypatch):
    cached = condense.evaluate(made, tiny, runs=2)
    fresh = condense.evaluate(made, tiny, runs=2, cache=False)
    assert [entry["accuracies"] for entry in cached["results"]] == [entry["accuracies"] for entry in fresh["results"]]


def test_a_random_set_is_worth_a_random_set(tiny):
    chosen = condense.distill("random", tiny, 2, network=NETWORK)
    record = condense.evaluate(chosen, tiny, runs=3)
    low, high = record["results"][0]["ci95"]
    margin = (high - low) / 2 + (record["results"][1]["ci95"][1] - record["results"][1]["ci95"][0]) / 2
    assert abs(record["scores"][NETWORK]["IOR"]) <= margin


def test_summary_by_hand():
    got = evaluation.summary([0.5, 0.6, 0.7])
    assert got["mean"] == pytest.approx(0.6)
    assert got["std"] == pytest.approx(0.1)
    half = 4.302653 * 0.1 / math.sqrt(3)  # t for 2 degrees of freedom, 97.5 %
    assert got["ci95"] == pytest.approx([0.6 - half, 0.6 + half])
    assert evaluation.summary([0.5]) == {"mean": 0.5, "std": None, "ci95": None}


def test_scores_equal_worked_values():
    def entries(distilled, random, full):
        return [{"arm": arm, "network": "n", "mean": mean} for arm, mean in
                (("distilled", distilled), ("random", random), ("full", full))]  # fmt: skip

    for hlr, ior, lrs in ((0.40, 0.10, 0.2097), (0.20, 0.05, 0.2382), (0.30, -0.05, 0.2006)):
        got = evaluation.scores(entries(0.5, 0.5 - ior, 0.5 + hlr))["n"]
        assert got["HLR"] == pytest.approx(hlr) and got["IOR"] == pytest.approx(ior)
        assert got["LRS"] == pytest.approx(lrs, abs=5e-5)


def test_protocol_budgets():
    from condense.evaluation import Protocol

    protocol = Protocol("x", 1, "", "hard", 1000, 256, 256, 0.01, 0.9, 5e-4, [0.5], 0.1, "none", 60, 5)
    assert [protocol.recipe(size, mirror=True).steps for size in (10, 256, 257, 500)] == [1000, 1000, 2000, 2000]
    assert protocol.recipe(10, mirror=True).rate(499) == 0.01
    assert protocol.recipe(10, mirror=True).rate(500) == pytest.approx(0.001)


def test_data_that_do_not_fit(made, tiny_colour):
    with pytest.raises(CondenseError, match=r"--data tiny: images are 3x8x8, those of the set 1x8x8"):
        condense.evaluate(made, tiny_colour)
    with pytest.raises(CondenseError, match="--data digits: has the classes 10"):
        condense.evaluate(made, condense.task("digits"))


def test_unknown_words(made, tiny):
    with pytest.raises(CondenseError, match="--controls rando: unknown; did you mean 'random'"):
        condense.evaluate(made, tiny, controls=["rando"])
    with pytest.raises(CondenseError, match="unknown protocol 'quick-v2'; did you mean 'quick-v1'"):
        condense.evaluate(made, tiny, protocol="quick-v2")
    with pytest.raises(CondenseError, match="mpl"):
        condense.evaluate(made, tiny, networks=["mpl"])
    with pytest.raises(CondenseError, match="--runs 0"):
        condense.evaluate(made, tiny, runs=0)


def test_control_arms_get_the_steps_of_the_decoded_set(tiny):
    packed = condense.distill("dm", tiny, 12, network=NETWORK, steps=1, batch_real=6, factor=3, init="collage")
    record = condense.evaluate(packed, tiny, runs=1, controls=["random", "noise", "full-equal"])
    assert len(packed) == 3 * 12 * 9  # 324 images: two started 256
    assert [entry["steps"] for entry in record["results"]] == [40] * 4


def test_factories_and_single_names(made, tiny):
    def small():
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))

    record = condense.evaluate(made, tiny, networks=small, runs=1, controls=[])
    assert record["results"][0]["network"].startswith("python:")
    assert condense.evaluate(made, tiny, networks="mlp", runs=1, controls=[])["results"][0]["network"] == "mlp"


def test_a_network_that_does_not_fit_is_found_before_any_training(made, tiny, monkeypatch):
    counted = count_trainings(monkeypatch)
    with pytest.raises(CondenseError, match="too deep"):
        condense.evaluate(made, tiny, networks=["mlp", "convnet-d6-w8-in"])
    assert counted == []


def test_fit_returns_a_trained_network(made, tiny):
    net = condense.fit(made, NETWORK, protocol="quick-v1")
    assert not net.training
    assert net(made.transform(made.images)).shape == (6, 3)
