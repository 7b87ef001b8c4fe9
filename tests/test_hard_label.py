"""The table and the figure of the hard-label track."""

import pytest
from leaderboard_records import record, write

from condense.benchmarks import hard_label
from condense.errors import CondenseError


@pytest.fixture
def folder(tmp_path):
    controls = [("rs2", "hard", 0.41), ("random-bytes", "hard", 0.36)]
    write(tmp_path, "hard-track-cifar10-dm-ipc10", record("dm", accuracy=0.4, random=0.26, made=250.0, extra=controls))
    kmeans = record("kmeans", accuracy=0.34, random=None, images=307200)
    for entry in kmeans["results"]:
        rows = [[0.2, accuracy] for accuracy in entry["accuracies"]]
        entry["curve"] = {"steps": [500, 1000], "images": [5000, 10000], "accuracies": rows, "seconds": [1.0, 2.0]}
    write(tmp_path, "hard-track-cifar10-kmeans-ipc10", kmeans)
    return tmp_path


def test_sets_and_controls_are_in_order_of_accuracy(folder):
    bars, _ = hard_label.read_bars(folder)
    assert [bar.name for bar in bars] == [
        "rs2: other real images in each epoch",
        "dm",
        "random images in the bytes of dm",
        "kmeans",
        "random images, as many as a set has",
    ]
    lines = hard_label.table(bars).splitlines()
    assert lines[2].split()[:5] == ["dm", "40.0", "39.0", "40.0", "41.0"] and "1.2 MB" in lines[2]
    assert lines[1].split()[-2:] == ["-", "-"]


def test_the_figure_is_drawn(folder, tmp_path):
    pytest.importorskip("matplotlib")
    bars, first = hard_label.read_bars(folder)
    hard_label.draw(bars, first, tmp_path / "track.png")
    assert (tmp_path / "track.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(CondenseError, match=r"track\.txt: must end in \.png"):
        hard_label.draw(bars, first, tmp_path / "track.txt")


def test_records_that_cannot_be_compared_are_refused(folder, tmp_path):
    write(folder, "hard-track-cifar10-mtt-ipc10", record("mtt", protocol="hard-v1"))
    with pytest.raises(CondenseError, match="different data, protocols, networks or runs"):
        hard_label.read_bars(folder)
    (tmp_path / "none").mkdir()
    with pytest.raises(CondenseError, match=r"no hard-track-\*\.json in it"):
        hard_label.read_bars(tmp_path / "none")
