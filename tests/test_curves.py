"""Time-to-accuracy curves: tests of students during their training, which change nothing else."""

import copy
import json
import re

import pytest
from conftest import change_protocols
from leaderboard_records import record, write

import condense
from condense.benchmarks import leaderboard
from condense.errors import CondenseError
from condense.formatting import duration
from condense.judge import records
from condense.judge import students as students_module
from condense.training import loop

NETWORK = "convnet-d2-w8-in"


@pytest.fixture(autouse=True)
def short_protocols(monkeypatch, tmp_path_factory):
    """quick-v1 with 10 steps in batches of 4, and two runs."""
    folder = tmp_path_factory.mktemp("short") / "protocols"
    change_protocols(monkeypatch, folder, {"quick-v1"}, steps=10, batch=4, full_epochs=2, runs=2)


@pytest.fixture
def made(tiny):
    return condense.distill("random", tiny, 2, network=NETWORK, protocol="quick-v1")


def test_a_curve_ends_at_the_accuracies_and_changes_none(made, tiny):
    plain = condense.evaluate(made, tiny, controls=["rs2"], cache=False)
    record = condense.evaluate(made, tiny, controls=["rs2"], curve=[1, 0.25, 0.5], cache=False)
    assert records.check_record(json.loads(json.dumps(record))) == []
    for entry, before in zip(record["results"], plain["results"], strict=True):
        assert "curve" not in before and entry["accuracies"] == before["accuracies"]
        curve = entry["curve"]
        assert curve["steps"] == [2, 5, 10]
        assert curve["images"] == [6, 16, 30]  # an epoch is a batch of four images and one of two
        assert [row[-1] for row in curve["accuracies"]] == entry["accuracies"]
        assert curve["seconds"][-1] == pytest.approx(entry["seconds"] / 2, abs=0.01)
    assert "--curve 0.25,0.5,1" in record["command"] and "after 16 images" in records.format_record(record)


def test_a_point_is_the_accuracy_of_the_student_at_that_step(made, tiny, monkeypatch):
    """A second training is stopped there and tested."""
    record = condense.evaluate(made, tiny, runs=1, controls=[], curve=[0.3], cache=False)
    tested = []
    original = loop.train

    def watched(students, recipe, **options):
        def test_now(k, step, state):
            if step == 3:
                network = copy.deepcopy(students[k].network)
                network.load_state_dict(state)
                tested.append(loop.accuracy(network, tiny, device=tiny.device))

        return original(students, recipe, **{**options, "watch": test_now})

    monkeypatch.setattr(students_module, "train", watched)
    condense.evaluate(made, tiny, runs=1, controls=[], cache=False, precision=record["environment"]["precision"])
    assert record["results"][0]["curve"]["accuracies"] == [tested]


def test_cached_scores_serve_every_curve_whose_points_they_have(made, tiny, monkeypatch):
    trained = []
    original = loop.train

    def count(students, *arguments, **options):
        trained.append(len(students))
        return original(students, *arguments, **options)

    monkeypatch.setattr(students_module, "train", count)
    first = condense.evaluate(made, tiny, runs=1, controls=[])
    assert len(trained) == 1
    curve = condense.evaluate(made, tiny, runs=1, controls=[], curve=[0.2, 0.6, 1])
    assert len(trained) == 2  # the points were not there
    part = condense.evaluate(made, tiny, runs=1, controls=[], curve=[0.6])
    again = condense.evaluate(made, tiny, runs=1, controls=[])
    assert len(trained) == 2
    points = curve["results"][0]["curve"]["accuracies"][0]
    assert part["results"][0]["curve"]["accuracies"] == [[points[1]]] and part["results"][0]["curve"]["steps"] == [6]
    assert "curve" not in again["results"][0]
    assert first["results"][0]["accuracies"] == again["results"][0]["accuracies"]


def test_records_with_impossible_curves_are_refused(made, tiny):
    record = condense.evaluate(made, tiny, controls=[], curve=[0.5, 1])
    for change, message in (
        (lambda curve: curve["images"].pop(), "not one value for each"),
        (lambda curve: curve["accuracies"].pop(), "not one value for each"),
        (lambda curve: curve["steps"].__setitem__(0, 10), "do not ascend"),
        (lambda curve: curve["accuracies"][0].__setitem__(-1, 0.123), "does not end at the accuracies"),
        (lambda curve: curve.update(seen=[1]), "foreign field 'seen'"),
    ):
        changed = copy.deepcopy(record)
        change(changed["results"][0]["curve"])
        assert message in "; ".join(records.check_record(changed))


def test_shares_are_checked(made, tiny, call):
    for share in (0, 1.5, "half"):
        with pytest.raises(CondenseError, match=f"--curve {share}: must be shares of the training"):
            condense.evaluate(made, tiny, curve=[share])
    made.save("set.h5")
    assert "--curve a,b: must be numbers joined by commas" in call("evaluate set.h5 --data tiny.npz --curve a,b").err
    out = call("evaluate set.h5 --data tiny.npz --curve 0.5,1 --runs 1 --controls none --json r.json").out
    assert "after 30 images" in out and records.read_record("r.json")["results"][0]["curve"]["steps"] == [5, 10]


def test_the_leaderboard_draws_curves_where_records_have_them(tmp_path):
    content = record("dm", ipc=10, accuracy=0.49, random=0.26)
    write(tmp_path / "results", "plain", content)
    page = leaderboard.build_page(tmp_path / "results", tmp_path / "site", None)
    assert "Accuracy during training" not in page.index.read_text()
    for entry in content["results"]:
        rows = [[0.1, 0.2, accuracy] for accuracy in entry["accuracies"]]
        seconds = [entry["seconds"] / 3 * share for share in (0.1, 0.5, 1)]
        entry["curve"] = {"steps": [100, 500, 1000], "images": [10000, 50000, 100000], "accuracies": rows}
        entry["curve"]["seconds"] = seconds
    write(tmp_path / "results", "curved", content)
    page = leaderboard.build_page(tmp_path / "results", tmp_path / "site", None)
    text = page.index.read_text()
    assert not page.rejected and text.count("Accuracy during training") == 2  # heading and title of one drawing
    assert f"dm, IPC 10, convnet-d3-w128-in: 20.0 % after 50,000 images, {duration(30)}" in text
    (low, middle, high), (control, *_) = (
        [tuple(map(float, place.split(" "))) for place in path.split("L")]
        for path in re.findall(r'class="trace [^"]*" d="M([^"]+)"', text)
    )
    assert low[0] < middle[0] < high[0] and low[1] > middle[1] > high[1]
    assert control == low  # both begin at 10 %
