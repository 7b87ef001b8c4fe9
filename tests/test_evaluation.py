"""The judge: arms under one budget, numbers by hand, the cache, and the record."""

import json

import numpy as np
import pytest
import torch
from conftest import change_protocols, tiny_archive, tiny_arrays

import condense
from condense import tracking
from condense.errors import CondenseError
from condense.judge import arms as arms_module
from condense.judge import get_protocol, records
from condense.judge import students as students_module
from condense.labels import SoftLabels
from condense.training import loop

NETWORK = "convnet-d2-w8-in"


@pytest.fixture
def made(tiny):
    return condense.distill("dm", tiny, 2, network=NETWORK, steps=2, batch_real=6)


@pytest.fixture(autouse=True)
def short_protocols(monkeypatch, tmp_path_factory):
    """Every protocol with 20 steps, two passes over the full data and two runs."""
    folder = tmp_path_factory.mktemp("short") / "protocols"
    change_protocols(monkeypatch, folder, steps=20, full_epochs=2, runs=2)


def count_trainings(monkeypatch):
    counted = []
    original = loop.train

    def watch(students, *arguments, **options):
        counted.append(len(students))
        return original(students, *arguments, **options)

    monkeypatch.setattr(students_module, "train", watch)
    return counted


def test_the_record_has_the_contracts_fields(made, tiny):
    controls = ["random", "random-bytes", "noise", "full", "full-equal"]
    record = condense.evaluate(made, tiny, networks=[NETWORK, "mlp"], runs=2, protocol="quick-v1", controls=controls)
    assert record["schema"] == "condense.record/1"
    assert set(record) >= {"set", "protocol", "runs", "seed", "results", "scores", "cost", "environment", "command"}
    assert set(record["set"]) >= {"name", "sha256", "method", "dataset", "ipc", "label_kind", "bytes"}
    bytes_ = record["set"]["bytes"]
    assert set(bytes_) == {"images", "labels", "auxiliary", "external", "total", "stored"}
    assert bytes_["stored"] == bytes_["total"] - bytes_["external"]
    assert record["set"]["labelling"] == {"exactness": "approximate", "step_cost": "none"}
    assert record["protocol"] == {"name": "quick-v1", "version": 1, "labels": "hard"}
    assert len(record["results"]) == 2 * 6
    assert records.check_record(json.loads(json.dumps(record))) == []
    for entry in record["results"]:
        assert set(entry) >= {"arm", "labels", "augment", "network", "accuracies", "mean", "std", "ci95", "seconds"}
        assert len(entry["accuracies"]) == 2
        assert all(accuracy in [right / 18 for right in range(19)] for accuracy in entry["accuracies"])
    by_arm = {entry["arm"]: entry for entry in record["results"] if entry["network"] == NETWORK}
    assert by_arm["full-equal"]["steps"] == by_arm["distilled"]["steps"] == by_arm["random"]["steps"] == 20
    assert by_arm["full"]["steps"] == 20  # two passes over 36 images are 2 steps: fewer than the distilled arm's
    assert "random" in records.format_record(record)
    assert record["cross_architecture"]["others"] == ["mlp"]
    made_in = record["cost"]["seconds"]
    first = record["time"][0]
    assert first["arm"] == "distilled" and first["made_seconds"] == made_in
    assert first["total_seconds"]["10"] == pytest.approx(made_in / 10 + first["train_seconds"], abs=2e-3)


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


def test_random_sets_are_worth_random_sets(tiny):
    """Over eight random sets the improvement over random is 0 within its 99.9 % interval."""
    found = []
    for seed in range(8):
        chosen = condense.distill("random", tiny, 1, network=NETWORK, seed=seed)
        record = condense.evaluate(chosen, tiny, runs=2, protocol="quick-v1", seed=seed)
        found.append(record["scores"][NETWORK]["IOR"]["value"])
    spread = np.std(found, ddof=1) / np.sqrt(len(found))
    assert spread > 0 and abs(np.mean(found)) <= 5.41 * spread  # t for 7 degrees of freedom


def test_the_very_images_of_the_random_arm_have_no_improvement_over_it(made, tiny):
    """The set is what the random arm of run 0 draws, so its only run gives the same student, and 0 exactly."""
    images, labels = tiny.per_class(2, (0, "random-arm", 0))
    assert torch.equal(labels, made.labels.labels)
    same = condense.DistilledSet(images, made.labels, made.transform, {**made.manifest, "space": "training"})
    record = condense.evaluate(same, tiny, runs=1)
    assert record["scores"][NETWORK]["IOR"] == {"value": 0.0, "ci95": None}


# -- random images of equal bytes -------------------------------------------------------------------------------------


def test_equal_bytes_are_counted_with_labels_and_transform(made, tiny):
    stored = 6 * 64 * 4 + 2 + 8  # six float32 images, six labels of two bits, mean and std
    assert made.nbytes()["total"] == stored
    count = arms_module.equal_byte_count(made)
    assert count == stored * 8 // (64 * 8 + 2) == 24
    source = arms_module.random_bytes_source(0, 26, tiny, 0)
    counts = torch.bincount(source.labels.labels, minlength=3).tolist()
    assert sum(counts) == 26 and sorted(counts) == [8, 9, 9]
    assert arms_module.even_shares(10, [2, 9, 9]) == [2, 4, 4] and arms_module.even_shares(11, [5, 5, 1]) == [5, 5, 1]
    assert sum(arms_module.random_bytes_source(0, 2, tiny, 0).labels.labels.bincount(minlength=3)) == 2
    assert arms_module.random_bytes_source(0, 1000, tiny, 0).size == 36  # all there are


# -- learning rates ---------------------------------------------------------------------------------------------------


def test_the_rate_is_chosen_on_held_out_training_images_never_on_test_images(made, tiny):
    """Poisoned test labels change accuracies, but no choice."""
    train_images, train_labels, test_images, test_labels = tiny_arrays()
    poisoned = condense.task((train_images, train_labels, test_images, (test_labels + 1) % 3), name="tiny")
    controls = ["random", "noise", "full"]
    good, bad = (
        condense.evaluate(made, task, networks="mlp", runs=2, protocol="dc-tuned-v1", controls=controls)
        for task in (tiny, poisoned)
    )
    assert [entry["lr_from"] for entry in good["results"]] == ["held-out"] * 4
    assert [entry["lr"] for entry in good["results"]] == [entry["lr"] for entry in bad["results"]]
    assert good["results"][3]["mean"] > 0.6 > 0.4 > bad["results"][3]["mean"]


def test_the_search_follows_the_held_out_images(made, tiny, monkeypatch):
    """The rate with the best student on the held-out images wins; the students are those of the inner task."""
    seen = []
    original = loop.correct_by_class

    def watch(network, task, **options):
        correct = original(network, task, **options)
        seen.append((task.test.rows is not None, len(task.train), sum(correct) / len(task.test)))
        return correct

    monkeypatch.setattr(students_module, "correct_by_class", watch)
    record = condense.evaluate(made, tiny, networks="mlp", runs=1, protocol="dc-tuned-v1", controls=[])
    tried = [value for held_out, size, value in seen if held_out and size == 33]
    assert len(tried) == 5 and len(seen) == 6
    rates = get_protocol("dc-tuned-v1").lr
    assert record["results"][0]["lr"] == rates[tried.index(max(tried))]


def test_a_learned_rate_is_the_sets_own_and_the_controls_may_take_it_too(made, tiny):
    taught = condense.DistilledSet(made.stored, made.labels, made.transform, {**made.manifest, "learned_lr": 0.3})
    record = condense.evaluate(taught, tiny, networks="mlp", runs=1, protocol="quick-v1", controls=["random", "full"])
    distilled, control, full = record["results"]
    assert (distilled["lr"], distilled["lr_from"]) == (0.3, "learned")
    assert control["lr"] in (0.01, 0.3) and control["lr_from"] == "held-out"
    assert (full["lr"], full["lr_from"]) == (0.01, "protocol")


def test_held_out_images_leave_training(tiny):
    inner = tiny.hold_out(0.25, ("x",))
    assert inner.counts.tolist() == [9, 9, 9] and np.bincount(inner.test.labels).tolist() == [3, 3, 3]
    parts = [inner.batch(torch.arange(27)), inner.test_batch(torch.arange(9))]
    everything = tiny.batch(torch.arange(36))
    together = {tuple(image.flatten().tolist()) for image in torch.cat(parts)}
    assert together == {tuple(image.flatten().tolist()) for image in everything} and len(together) == 36
    images, labels = inner.per_class(9, ("y",))
    rows = [int((everything == image).flatten(1).all(1).nonzero()[0, 0]) for image in images]
    assert [int(tiny.train.labels[row]) for row in rows] == labels.tolist()
    again = inner.hold_out(0.3, ("z",))  # rows of rows
    assert torch.equal(again.batch(torch.tensor([0])), everything[torch.from_numpy(again.train.rows[:1])])


# -- label tracks -----------------------------------------------------------------------------------------------------


@pytest.fixture
def soft(made):
    return condense.DistilledSet(
        made.stored, SoftLabels(torch.randn(6, 3)), made.transform, {**made.manifest, "protocol": None}
    )


def test_the_hard_track_judges_images_with_their_classes(soft, made, tiny):
    record = condense.evaluate(soft, tiny, protocol="quick-v1", runs=2, controls=["random", "full"])
    hard = condense.evaluate(made, tiny, protocol="quick-v1", runs=2, controls=["random", "full"])
    assert [entry["labels"] for entry in record["results"]] == ["hard", "hard", "hard"]
    assert [e["accuracies"] for e in record["results"]] == [e["accuracies"] for e in hard["results"]]
    assert "quick-v1 judges hard labels" in record["missing"][0]["why"]
    assert set(record["scores"][NETWORK]) == {"IOR", "HLR", "LRS"}


def test_the_soft_track_judges_own_labels_and_never_replaces_them(soft, tiny):
    record = condense.evaluate(soft, tiny, runs=1, controls=["random", "noise", "full", "random-bytes"])
    assert record["protocol"]["name"] == "dc-soft-v1"
    arms = [(entry["arm"], entry["labels"]) for entry in record["results"]]
    assert arms == [
        ("distilled", "own"),
        ("distilled", "hard"),
        ("noise", "own"),
        ("full", "hard"),
        ("random-bytes", "hard"),
    ]
    assert [entry["arm"] for entry in record["missing"]] == ["random"]
    assert set(record["scores"][NETWORK]) == {"HLR"}


@pytest.mark.parametrize("kind", ["soft", "per-view"])
def test_with_their_teacher_random_images_get_the_same_kind_of_labels(made, tiny, kind):
    from condense import networks, rng
    from condense.sets import relabel

    with rng.seeded("teacher"):
        teacher = networks.build_network(NETWORK, tiny.shape, 3)
    taught = relabel(made, teacher, 3)
    if kind == "soft":
        images = made.training_images()[0]
        taught = condense.DistilledSet(
            made.stored, SoftLabels(teacher(images).detach()), made.transform, taught.manifest
        )
    record = condense.evaluate(taught, tiny, runs=2, controls=["random", "noise"], teacher=teacher)
    assert [(e["arm"], e["labels"]) for e in record["results"]] == [
        ("distilled", "own"),
        ("random", "own"),
        ("noise", "own"),
    ]
    assert not record["missing"] and set(record["scores"][NETWORK]) == {"IOR"}
    labels = taught.labels.label_images(tiny.per_class(2, (0, "random-arm", 0))[0], teacher, 0)
    assert labels.kind == kind and labels.cache_key() == taught.labels.cache_key() and len(labels) == 6


def test_per_view_labels_have_no_arm_without_augmentation(made, tiny):
    from condense import networks
    from condense.sets import relabel

    taught = relabel(made, networks.build_network(NETWORK, tiny.shape, 3), 2)
    record = condense.evaluate(taught, tiny, runs=1, controls=[], without_augmentation=True)
    assert len(record["results"]) == 1 and "augmented views" in record["missing"][0]["why"]


def test_without_augmentation(made, tiny):
    record = condense.evaluate(made, tiny, runs=2, controls=["random", "full"], without_augmentation=True)
    kinds = [(entry["arm"], entry["augment"]) for entry in record["results"]]
    assert kinds == [("distilled", True), ("random", True), ("full", True), ("distilled", False), ("random", False)]
    assert set(record["scores"][NETWORK]) == {"IOR", "HLR", "LRS", "ARS"}
    assert "distilled (not augmented)" in records.format_record(record)


# -- killed and shared out --------------------------------------------------------------------------------------------


def numbers(record):
    """What must be the same however a record came about."""
    timed = ("seconds",)
    return [{key: value for key, value in entry.items() if key not in timed} for entry in record["results"]], record[
        "scores"
    ]


def test_killed_and_called_again_gives_the_same_record_and_trains_only_the_rest(made, tiny, monkeypatch):
    whole = condense.evaluate(made, tiny, runs=2, cache=False)
    original = loop.train
    calls = []

    def dying(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(students_module, "train", dying)
    with pytest.raises(KeyboardInterrupt):
        condense.evaluate(made, tiny, runs=2)
    again = condense.evaluate(made, tiny, runs=2)
    assert len(calls) == 3 + 2
    assert numbers(again) == numbers(whole)


def test_killed_in_the_middle_of_a_student_goes_on_there(made, tiny, monkeypatch):

    whole = condense.evaluate(made, tiny, runs=1, cache=False, controls=[])
    monkeypatch.setenv("CONDENSE_CHECKPOINT_SECONDS", "0")
    steps = []

    class Dying(tracking.Progress):
        def update(self, step, *text):
            steps.append(step)
            if len(steps) == 12:
                raise KeyboardInterrupt

    monkeypatch.setattr(students_module, "Progress", Dying)
    with pytest.raises(KeyboardInterrupt):
        condense.evaluate(made, tiny, runs=1, controls=[])
    again = condense.evaluate(made, tiny, runs=1, controls=[])
    assert steps == list(range(1, 21))  # no step twice: the checkpoint was written before the kill
    assert numbers(again) == numbers(whole)


RANK = """
import json, sys
import numpy, torch, condense
torch.set_num_threads(1)
task = condense.task(sys.argv[1], name="tiny")
made = condense.load(sys.argv[2])
record = condense.evaluate(made, task, networks=["mlp"], runs=3, protocol="dc-tuned-v1", device="cpu",
                           precision="fp32", controls=["random", "full"])
import os
if os.environ.get("RANK", "0") == "0":
    json.dump(record, open(sys.argv[3], "w"))
"""


def test_two_ranks_give_the_record_of_one(made, tmp_path):
    import os
    import subprocess
    import sys

    tiny_archive(tmp_path)
    made.save(tmp_path / "set.h5")
    (tmp_path / "rank.py").write_text(RANK)
    found = []
    for ranks in (1, 2):
        out = tmp_path / f"{ranks}.json"
        cache = {"CONDENSE_CACHE": str(tmp_path / f"cache{ranks}")}
        words = [tmp_path / "rank.py", tmp_path / "tiny.npz", tmp_path / "set.h5", out]
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        subprocess.run([*start, *map(str, words)], check=True, env={**os.environ, **cache}, capture_output=True)
        found.append(json.loads(out.read_text()))
    assert numbers(found[0]) == numbers(found[1])
    assert [entry["lr_from"] for entry in found[1]["results"]] == ["held-out"] * 3


# -- what was given ---------------------------------------------------------------------------------------------------


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
