"""Scores by hand, and records that come from anywhere."""

import copy
import json
import math
import statistics
from pathlib import Path

import pytest

from condense.errors import CondenseError
from condense.judge import records, scoring


def entry(arm, accuracies, network="n", labels="own", augment=True, **more):
    found = {
        "arm": arm,
        "labels": labels,
        "augment": augment,
        "network": network,
        "steps": 300,
        "lr": 0.01,
        "lr_from": "protocol",
        "accuracies": accuracies,
        **scoring.summary(accuracies),
        "seconds": 1.5,
    }
    return {**found, **more}


def test_summary_by_hand():
    got = scoring.summary([0.5, 0.6, 0.7])
    assert got["mean"] == pytest.approx(0.6)
    assert got["std"] == pytest.approx(0.1)
    half = 4.302653 * 0.1 / math.sqrt(3)  # t for 2 degrees of freedom, 97.5 %
    assert got["ci95"] == pytest.approx([0.6 - half, 0.6 + half])
    assert scoring.summary([0.5]) == {"mean": 0.5, "std": None, "ci95": None}


def test_scores_equal_worked_values():
    """The card's own examples."""
    for hlr, ior, lrs in ((0.40, 0.10, 0.2097), (0.20, 0.05, 0.2382), (0.30, -0.05, 0.2006)):
        results = [
            entry("distilled", [0.5]),
            entry("random", [0.5 - ior]),
            entry("full", [0.5 + hlr], labels="hard"),
        ]
        got = scoring.compute_scores(results)["n"]
        assert got["HLR"]["value"] == pytest.approx(hlr) and got["IOR"]["value"] == pytest.approx(ior)
        assert got["LRS"]["value"] == pytest.approx(lrs, abs=5e-5)
        assert got["LRS"]["ci95"] is None
    assert scoring.normalise_score(-1) == 0 and scoring.normalise_score(1) == 1
    assert scoring.normalise_score(0) == pytest.approx(0.2689, abs=5e-5)


def test_ars_by_hand():
    results = [
        entry("distilled", [0.5]),
        entry("random", [0.3]),
        entry("distilled", [0.4], augment=False),
        entry("random", [0.36], augment=False),
    ]
    beta = 0.5 * 0.2 + 0.5 * 0.04
    expected = (math.exp(beta) - math.exp(-1)) / (math.exp(1) - math.exp(-1))
    assert scoring.compute_scores(results)["n"]["ARS"]["value"] == pytest.approx(expected)


def test_differences_are_paired_by_run():
    """Runs that move together leave a small interval, however far apart they are."""
    results = [entry("distilled", [0.5, 0.6, 0.7]), entry("random", [0.4, 0.5, 0.62])]
    got = scoring.compute_scores(results)["n"]["IOR"]
    differences = [0.1, 0.1, 0.08]
    half = 4.302653 * statistics.stdev(differences) / math.sqrt(3)
    mean = statistics.fmean(differences)
    assert got["value"] == pytest.approx(mean)
    assert got["ci95"] == pytest.approx([mean - half, mean + half])


def test_resampling_is_the_exact_distribution_of_resampled_means():
    """With two runs a resample is (a,a), (a,b), (b,a) or (b,b), so the interval is that of the extremes."""
    got = scoring.bootstrap_score(lambda x: x, [0.2, 0.6])
    assert got["value"] == pytest.approx(0.4)
    assert got["ci95"] == pytest.approx([0.2, 0.6])
    assert scoring.bootstrap_score(lambda x, y: x - y, [0.2, 0.6], [0.1, 0.5])["ci95"] == pytest.approx([0.1, 0.1])


def test_the_hard_labels_of_a_soft_set_are_what_hlr_compares():
    results = [
        entry("distilled", [0.6]),
        entry("distilled", [0.4], labels="hard"),
        entry("full", [0.9], labels="hard"),
    ]
    assert scoring.compute_scores(results, "soft")["n"]["HLR"]["value"] == pytest.approx(0.5)
    assert "HLR" not in scoring.compute_scores([results[0], results[2]], "soft")["n"]


def test_cross_architecture_drop_by_hand():
    results = [
        entry("distilled", [0.5, 0.6], "own"),
        entry("random", [0.1, 0.1], "own"),
        entry("distilled", [0.4, 0.3], "a"),
        entry("distilled", [0.2, 0.3], "b"),
    ]
    got = scoring.cross_architecture(results, "own")
    assert got["others"] == ["a", "b"] and got["drop"]["value"] == pytest.approx((0.2 + 0.3) / 2)
    assert scoring.cross_architecture(results[:2], "own") is None
    assert scoring.cross_architecture(results[2:], "own") is None


def test_time_to_accuracy_shares_out_what_was_made():
    results = [entry("distilled", [0.5, 0.6], seconds=4.0), entry("random", [0.4, 0.4], seconds=3.0)]
    made, real = scoring.time_to_accuracy(results, {"seconds": 90.0, "preparation_seconds": 10.0})
    assert made["made_seconds"] == 100 and made["total_seconds"] == {"1": 102.0, "10": 12.0, "100": 3.0}
    assert real["made_seconds"] == 0 and real["total_seconds"]["1"] == 1.5
    unknown, _ = scoring.time_to_accuracy(results, {})
    assert unknown["made_seconds"] is None and unknown["total_seconds"]["1"] is None


def test_a_foreign_cost_is_reduced_to_what_is_known():
    assert records.valid_cost({"seconds": "x", "preparation_seconds": 2.0, "mood": 1}) == {"preparation_seconds": 2.0}
    assert records.valid_cost(None) == {} == records.valid_cost({"seconds": float("-1")})


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def record():
    results = [entry("distilled", [0.5, 0.6]), entry("random", [0.4, 0.5])]
    return {
        "schema": records.RECORD_SCHEMA,
        "set": {
            "name": "digits/dm-ipc1",
            "sha256": "0" * 64,
            "method": "dm",
            "dataset": "digits",
            "ipc": 1,
            "seed": 0,
            "label_kind": "hard",
            "network": "n",
            "command": None,
            "bytes": {"images": 1, "labels": 1, "auxiliary": 1, "external": 0, "total": 3, "stored": 3},
            "labelling": {"exactness": "approximate", "step_cost": "none"},
        },
        "data": {"name": "digits", "fingerprint": "f", "same": True},
        "protocol": {"name": "quick-v1", "version": 1, "labels": "hard"},
        "runs": 2,
        "seed": 0,
        "results": results,
        "missing": [],
        "scores": scoring.compute_scores(results),
        "cross_architecture": None,
        "time": scoring.time_to_accuracy(results, {}),
        "cost": {},
        "environment": {
            "condense": "0",
            "torch": "0",
            "python": "3",
            "platform": "x",
            "device": "y",
            "threads": 1,
            "precision": "fp32",
            "tf32": False,
            "peak_memory": {"host": 1},
        },
        "command": "condense evaluate",
    }


def test_a_written_record_is_read_back(record, tmp_path):
    records.write_record(record, tmp_path / "r.json")
    assert records.read_record(tmp_path / "r.json") == record


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda r: r.pop("runs"), "lacks 'runs'"),
        (lambda r: r["set"].pop("bytes"), "lacks 'bytes' in 'set'"),
        (lambda r: r.update(rank=1), "foreign field 'rank'"),
        (lambda r: r["results"][0].update(best=0.9), "foreign field 'best' in 'results.0'"),
        (lambda r: r.update(schema="condense.record/2"), "'schema' is 'condense.record/2'; this version reads"),
        (lambda r: r["results"][0].update(mean=0.9), "'mean' is not that of its accuracies"),
        (lambda r: r["results"][0].update(accuracies=[55.0, 60.0]), "'results.0.accuracies.0': 55.0 is greater"),
        (lambda r: r["results"][0].update(arm="winner"), "'results.0.arm': 'winner' is not one of"),
        (lambda r: r.update(runs=3), "2 accuracies for 3 runs"),
        (lambda r: r.update(results=[]), "'results': "),
        (lambda r: r["results"][0].update(ci95=[0.54, 0.56]), "'ci95' is not that of its accuracies"),
        (lambda r: r["scores"]["n"]["IOR"].update(value=0.9), "'scores' does not follow from the other"),
        (lambda r: r["scores"]["n"].update(LRS={"value": 0.99, "ci95": None}), "'scores' does not follow"),
        (lambda r: r["set"]["bytes"].update(total=1), "'set.bytes.total' is not the sum of its parts"),
        (lambda r: r["set"]["bytes"].update(external=1, total=4, stored=4), "'set.bytes.stored' is not the total"),
        (lambda r: r["set"]["labelling"].update(exactness="good"), "'set.labelling.exactness': 'good' is not one of"),
        (lambda r: r["set"]["labelling"].pop("step_cost"), "lacks 'step_cost' in 'set.labelling'"),
        (lambda r: r["time"][0].update(train_seconds=0.001), "'time' does not follow"),
        (lambda r: r["results"].append(r["results"][0]), "two entries of 'results' are of the same arm"),
        (lambda r: r["results"][0].update(steps=50_000), "'steps' differ between arms of one budget"),
        (lambda r: r.update(runs=10**6), "'runs': 1000000 is greater than"),
        (lambda r: r.update(scores={}), "'scores' does not follow from the other"),
        (lambda r: r.update(seed=10**30), "'seed' is not a usable number"),
        (lambda r: r.update(command="x" * 20_000), "'command' is longer than 10000 characters"),
        (lambda r: r.update(command="\ud800"), "'command' is not valid text"),
    ],
)
def test_faulty_records_are_named(record, tmp_path, change, message):
    faulty = copy.deepcopy(record)
    change(faulty)
    (tmp_path / "r.json").write_text(json.dumps(faulty))
    with pytest.raises(CondenseError, match=message) as fault:
        records.read_record(tmp_path / "r.json")
    assert str(fault.value).startswith(str(tmp_path / "r.json")) and "\n" not in str(fault.value)


def test_records_from_before_these_fields_are_good(record):
    del record["set"]["labelling"], record["set"]["bytes"]["stored"]
    assert records.check_record(record) == []


def test_external_bytes_are_told_apart(record):
    assert "external" not in records.format_record(record)
    record["set"]["bytes"].update(external=44_700_000, total=44_700_003)
    assert records.check_record(record) == []
    assert "bytes: 3 bytes stored, 44.7 MB external, 44.7 MB together" in records.format_record(record).splitlines()


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "[" * 100_000, '{"schema": NaN}', "\udcff"])
def test_what_is_no_record_is_refused(tmp_path, text):
    (tmp_path / "r.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CondenseError):
        records.read_record(tmp_path / "r.json")
    with pytest.raises(CondenseError):
        records.read_record(tmp_path / "none.json")


def test_committed_records_are_good_and_have_pictures():
    found = sorted((Path(__file__).parent.parent / "benchmarks" / "results").glob("*.json"))
    assert found
    for path in found:
        assert records.read_record(path)["data"]["same"] and path.with_suffix(".png").is_file(), path
