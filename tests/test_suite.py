"""A whole table: made, skipped where it is there, resumed where it was stopped, and the sets worth shipping."""

import pytest
from conftest import change_protocols, command_line, tiny_archive

import condense
from condense.benchmarks import ready_made, selections
from condense.benchmarks import suite as suites
from condense.errors import CondenseError
from condense.judge import records, scoring

TEXT = """
name: mini
summary: a table for tests
protocol: quick-v1
runs: 2
seeds: [0]
networks: [own, mlp]
tasks: {tiny: {network: convnet-d2-w8-in, ipc: [1, 2], controls: [random, full]}}
methods:
  random: {}
  dm: {tiny-ipc1: {steps: 2, batch_real: 6}, tiny-ipc2: {steps: 3, batch_real: 6}}
"""


@pytest.fixture(autouse=True)
def short_protocols(monkeypatch, tmp_path_factory):
    folder = tmp_path_factory.mktemp("short") / "protocols"
    change_protocols(monkeypatch, folder, names=["quick-v1"], steps=10, full_epochs=1)


@pytest.fixture
def place(tmp_path):
    """A folder with the suite and its data."""
    tiny_archive(tmp_path)
    (tmp_path / "mini.yaml").write_text(TEXT)
    return tmp_path


def run(place, **options):
    suite = suites.get_suite(str(place / "mini.yaml"))
    return suites.run(suite, place / "out", data={"tiny": str(place / "tiny.npz")}, **options)


def test_a_cell_that_cannot_be_is_left_out():
    """A method that needs more images than a cell has would fail there each time."""
    found = suites.cells(suites.get_suite("small-soft"))
    infer = [(cell.data, cell.ipc) for cell in found if cell.method == "infer"]
    assert infer == [("digits", 10), ("cifar10-jpeg", 10)]
    assert sum(cell.method == "sre2l" for cell in found) == 4


def test_a_table_is_made_once(place, monkeypatch):
    outcome = run(place)
    assert len(outcome.made) == 4 and not outcome.kept and not outcome.failed
    assert outcome.page.is_file()
    for path in outcome.made:
        record = records.read_record(path)
        assert path.with_suffix(".png").is_file() and {e["network"] for e in record["results"]} == {
            "convnet-d2-w8-in",
            "mlp",
        }
    dm = records.read_record(place / "out/records/mini-tiny-dm-ipc2-seed0.json")
    precision = dm["environment"]["precision"]
    assert dm["set"]["command"] == (
        "condense distill dm --data tiny=PATH --ipc 2 --network convnet-d2-w8-in "
        f"--precision {precision} steps=3 batch_real=6 protocol=quick-v1"
    )
    before = {path: path.read_bytes() for path in outcome.made}
    again = run(place)
    assert not again.made and len(again.kept) == 4
    assert {path: path.read_bytes() for path in outcome.made} == before


RECIPES = """
name: cells
summary: recipes
runs: 1
seeds: [0]
networks: [own]
controls: [random]
cells:
  dm-tiny.2-steps: {recipe: dm/tiny, steps: 2}
  random: {recipe: random/tiny, controls: []}
"""


def test_cells_of_recipes(tmp_path):
    (tmp_path / "cells.yaml").write_text(RECIPES)
    suite = suites.get_suite(str(tmp_path / "cells.yaml"))
    assert suites.datasets_of(suite) == ["digits"]
    outcome = suites.run(suite, tmp_path / "out")
    assert [path.stem for path in outcome.made] == ["cells-dm-tiny.2-steps-seed0", "cells-random-seed0"]
    dm, random = map(records.read_record, outcome.made)
    assert "steps=2" in dm["set"]["command"] and dm["protocol"]["name"] == "quick-v1"  # the recipe's
    assert [entry["arm"] for entry in dm["results"]] == ["distilled", "random"]
    assert [entry["arm"] for entry in random["results"]] == ["distilled"]
    assert len(suites.run(suite, tmp_path / "out").kept) == 2
    assert [cell.method for cell in suites.cells(suite, methods=["random"])] == ["random"]


@pytest.mark.parametrize(
    "change, message",
    [
        (("dm/tiny", "dm/tyni"), "dm-tiny.2-steps: .*'dm/tyni'"),
        (("steps: 2", "stepz: 2"), "stepz=2: no such setting"),
        (("controls: []", "controls: [rendom]"), "rendom"),
        (("seeds: [0]", "seeds: [0]\nprotocol: quick-v1"), "cells go without tasks"),
    ],
)
def test_wrong_cells_of_recipes(tmp_path, change, message):
    (tmp_path / "cells.yaml").write_text(RECIPES.replace(*change))
    with pytest.raises(CondenseError, match=message):
        suites.get_suite(str(tmp_path / "cells.yaml"))


def test_the_published_cells_are_those_of_papers():
    suite = suites.get_suite("published")
    assert len(suites.cells(suite)) >= 20 and suites.datasets_of(suite) == ["cifar10", "cifar100"]


def test_a_changed_setting_makes_only_its_own_cells_again(place):
    run(place)
    (place / "mini.yaml").write_text(TEXT.replace("tiny-ipc2: {steps: 3", "tiny-ipc2: {steps: 4"))
    outcome = run(place)
    assert [path.stem for path in outcome.made] == ["mini-tiny-dm-ipc2-seed0"]
    assert condense.load(place / "out/sets/mini-tiny-dm-ipc2-seed0.h5").manifest["steps_done"] == 4


def test_a_stopped_table_goes_on_with_the_same_sets(place, monkeypatch):
    whole = run(place)
    reference = {path.name: records.read_record(path)["set"]["sha256"] for path in whole.made}
    (place / "out").rename(place / "whole")
    original, judged = suites.judge, []

    def dying(*arguments, **options):
        judged.append(1)
        if len(judged) == 3:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(suites, "judge", dying)
    with pytest.raises(KeyboardInterrupt):
        run(place)
    monkeypatch.setattr(suites, "judge", original)
    outcome = run(place)
    assert len(outcome.kept) == 2 and len(outcome.made) == 2
    found = {path.name: records.read_record(path)["set"]["sha256"] for path in [*outcome.kept, *outcome.made]}
    assert found == reference


SOFT = """
name: selection
summary: labels of a teacher
protocol: quick-soft-v1
runs: 1
seeds: [0, 1]
networks: [own]
tasks: {tiny: {network: convnet-d2-w8-in, ipc: [1, 2], controls: [distilled-hard, rs2], options: {resize: 16}}}
settings: {labels: teacher, teacher_epochs: 1, teacher_batch: 8, score_epochs: 2}
methods:
  random: {}
  el2n: {all: {take: easiest}, tiny-ipc2: {take: middle}}
"""


def test_settings_of_all_methods_and_cells_and_options_of_the_data(place, monkeypatch):
    change_protocols(monkeypatch, place / "protocols", names=["quick-soft-v1"], steps=3)
    (place / "mini.yaml").write_text(SOFT)
    outcome = run(place)
    found = {path.stem: records.read_record(path) for path in outcome.made}
    assert len(found) == 8
    for record in found.values():
        arms = [(entry["arm"], entry["labels"]) for entry in record["results"]]
        assert arms == [("distilled", "own"), ("distilled", "hard"), ("rs2", "hard")]
    easiest, middle = (condense.load(place / f"out/sets/selection-tiny-el2n-ipc{ipc}-seed0.h5") for ipc in (1, 2))
    assert [made.manifest["settings"]["take"] for made in (easiest, middle)] == ["easiest", "middle"]
    assert middle.manifest["settings"]["score_epochs"] == 2 and middle.shape[1:] == (16, 16)
    assert len(run(place).kept) == 8
    rows = [row.split()[:2] for row in suites.table(outcome.made).splitlines()[2:]]
    assert sorted(rows) == [
        [f"selection-tiny-{name}-ipc{ipc}", labels]
        for name in ("el2n", "random")
        for ipc in (1, 2)
        for labels in ("hard", "soft")
    ]
    cells = selections.read_cells(place / "out/records")
    accuracies = [found[f"selection-tiny-el2n-ipc2-seed{seed}"]["results"][0]["accuracies"][0] for seed in (0, 1)]
    assert cells["el2n", ("tiny", 2), "soft"] == pytest.approx([100 * accuracy for accuracy in accuracies])
    assert len(cells) == 2 * 2 * 2 + 2
    hard, soft = (selections.table(cells, labels).splitlines() for labels in ("hard", "soft"))
    assert hard[0] == "| hard labels | tiny, 1 | tiny, 2 |" and len(hard) == 5 and hard[4].startswith("| `rs2` |")
    assert soft[0] == "| soft labels | tiny, 1 | tiny, 2 |" and len(soft) == 4


def test_settings_of_a_cell_are_checked_with_those_of_all_cells(place):
    text = TEXT.replace("random: {}", "graphcut: {all: {kernel: features}, tiny-ipc1: {embedding: random}}")
    (place / "mini.yaml").write_text(text)
    assert any(cell.method == "graphcut" for cell in suites.cells(suites.get_suite(str(place / "mini.yaml"))))


def test_a_cell_of_indices_stopped_before_its_record_is_finished(place):
    (place / "mini.yaml").write_text(TEXT.replace("random: {}", "random: {all: {store: indices}}"))
    for _ in range(2):
        outcome = run(place, methods=["random"])
        assert len(outcome.made) == 2 and not outcome.failed
        for path in outcome.made:
            path.unlink()


def test_a_cell_that_fails_does_not_take_the_others_with_it(place):
    (place / "mini.yaml").write_text(TEXT.replace("[1, 2]", "[1, 2, 13]"))
    outcome = run(place)
    assert len(outcome.made) == 4
    assert set(outcome.failed) == {"mini-tiny-random-ipc13-seed0", "mini-tiny-dm-ipc13-seed0"}
    assert "has only 12 images" in outcome.failed["mini-tiny-dm-ipc13-seed0"]
    assert outcome.page.is_file()


def test_only_some_cells(place):
    assert [path.stem for path in run(place, methods=["random"]).made] == [
        "mini-tiny-random-ipc1-seed0",
        "mini-tiny-random-ipc2-seed0",
    ]
    with pytest.raises(CondenseError, match="--methods randm: not in the suite 'mini'; did you mean 'random'"):
        run(place, methods=["randm"])


@pytest.mark.parametrize(
    "change, message",
    [
        (("tiny-ipc1: {steps: 2", "tiny-ipc3: {steps: 2"), "dm, tiny-ipc3: none of the suite's cells; did you mean"),
        (("random: {}", "randm: {}"), "unknown method 'randm'"),
        (("random: {}", "random: 5"), "random: must be a mapping of keys to values, not 5"),
        (("own, mlp", "own, mpl"), "mpl"),
        (("convnet-d2-w8-in", "convnet-d9-w8-in"), "convnet-d9-w8-in"),
        (("[random, full]", "[rando, full]"), "--controls rando: unknown; did you mean 'random'"),
        (("steps: 2", "stesp: 2"), "stesp=2: no such setting of the method 'dm'; did you mean 'steps'"),
        (("quick-v1", "quick-v9"), "unknown protocol 'quick-v9'"),
        (("  dm:", "  dmm:"), "unknown method 'dmm'"),
        (("runs: 2", "run: 2"), "run=2: no such setting"),
        (("runs: 2", "runs: 2\nsettings: {stepz: 2}"), "settings: stepz: no method of the suite has it"),
        (("random: {}", "graphcut: {tiny-ipc1: {embedding: random}}"), "graphcut, tiny-ipc1: .*give kernel=features"),
        (("random: {}", "random: {all: {stor: images}}"), "random, all: stor=images: no such setting"),
        (("ipc: [1, 2],", "ipc: [1, 2], options: {resiez: 4},"), "resiez=4: no such setting of .*: tiny: options"),
    ],
)
def test_faults_of_a_suite_are_found_before_any_work(place, change, message):
    (place / "mini.yaml").write_text(TEXT.replace(*change))
    with pytest.raises(CondenseError, match=message):
        run(place)
    assert not (place / "out").exists()


def test_the_command_line(place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    missing = command_line("suite mini.yaml --out out", capsys)
    assert missing.code == 2 and "no data called tiny; give --data tiny=PATH" in missing.err
    done = command_line("suite mini.yaml --out out --data tiny=tiny.npz --methods random", capsys)
    assert done.code == 0 and "2 records made" in done.out and "index.html" in done.out
    assert "[2/2] mini-tiny-random-ipc2-seed0" in done.err
    wrong = command_line("suite smal", capsys)
    assert wrong.code == 2 and "unknown suite 'smal'; did you mean 'small'" in wrong.err
    bare = command_line("suite mini.yaml --data tiny", capsys)
    assert bare.code == 2 and "--data tiny: write NAME=PATH" in bare.err


def test_the_best_sets_are_written_with_their_cards(place):
    run(place)
    suite = suites.get_suite(str(place / "mini.yaml"))
    to = place / "ready"
    written = ready_made.write(suite, place / "out", to, {"tiny": str(place / "tiny.npz")})
    assert len(written) == 2
    for path in written:
        made = condense.load(path)
        claim = made.manifest["claim"]
        rivals = (place / "out/records").glob(f"*ipc{made.manifest['ipc']}-*.json")
        entries = [entry for rival in rivals for entry in scoring.main_entries(records.read_record(rival))]
        best = max(entry["mean"] for entry in entries if entry["network"] == "convnet-d2-w8-in")
        assert claim["mean"] == pytest.approx(best, abs=ready_made.TOLERANCE)
        assert claim["protocol"] == "quick-v1" and path.with_suffix(".png").is_file()
        assert f'condense.load("{made.name}")' in path.with_suffix(".md").read_text()


def test_halving_is_undone_where_it_changes_accuracy():
    def record(*accuracies):
        entry = {"arm": "distilled", "labels": "own", "augment": True, "network": "n", "accuracies": list(accuracies)}
        return {"results": [entry]}

    whole = record(0.5, 0.6, 0.7)
    assert ready_made.unchanged(whole, record(0.504, 0.596, 0.7))
    assert not ready_made.unchanged(whole, record(0.45, 0.55, 0.651))  # always lower
    assert not ready_made.unchanged(whole, record(0.55, 0.54, 0.68))  # noisy, but a point lower on average
    assert ready_made.unchanged(record(0.5), record(0.5)) and not ready_made.unchanged(record(0.5), record(0.49))


def test_a_set_without_its_record_is_not_shipped(place):
    run(place, methods=["dm"])
    path = place / "out/sets/mini-tiny-dm-ipc1-seed0.h5"
    made = condense.load(path)
    made.stored += 1
    made.save(path, force=True)
    suite = suites.get_suite(str(place / "mini.yaml"))
    with pytest.raises(CondenseError, match="its record is of another set"):
        ready_made.write(suite, place / "out", place / "ready", {"tiny": str(place / "tiny.npz")})


RANK = """
import sys, torch
from pathlib import Path
torch.set_num_threads(1)
from condense.benchmarks import suite
suite.run(suite.get_suite(sys.argv[1]), Path(sys.argv[2]), data={"tiny": sys.argv[3]}, device="cpu", precision="fp32")
"""


def test_ranks_fill_a_table_together(place):
    """Two cells of two methods, each distilled and judged: several rounds of talking in one process."""
    import os
    import subprocess
    import sys

    (place / "rank.py").write_text(RANK)
    words = [place / "rank.py", place / "mini.yaml", place / "ranks", place / "tiny.npz"]
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*start, *map(str, words)], check=True, env=dict(os.environ), capture_output=True, timeout=300)
    one = run(place, device="cpu", precision="fp32")
    for path in one.made:
        alone, shared = records.read_record(path), records.read_record(place / "ranks/records" / path.name)
        for a, b in zip(alone["results"], shared["results"]):
            assert a["accuracies"] == pytest.approx(b["accuracies"], abs=0.06)  # sums over ranks round otherwise
    assert (place / "ranks/page/index.html").is_file()


LATE_RANK = """
import sys, time, torch
from pathlib import Path
torch.set_num_threads(1)
from condense import api
from condense.ranks import Ranks
folder, real = Path(sys.argv[1]), api.task(sys.argv[2])
ranks = Ranks(torch.device("cpu"))
ranks.barrier()  # making the group would wait for the late process
time.sleep(5 * ranks.rank)  # the first process has long made the set by itself
made = api.distill_or_resume("random", real, 1, out=folder / "set.h5", run_dir=folder / "run", device="cpu")
assert len(made) == 3 and ranks.all_true(torch.ones(()))
"""


def test_a_late_rank_takes_part_in_a_run_that_needs_no_communication(place):
    """It once found the finished set, loaded it, and went on to another collective than the one that waited."""
    import os
    import subprocess
    import sys

    (place / "late.py").write_text(LATE_RANK)
    words = [place / "late.py", place / "late", place / "tiny.npz"]
    (place / "late").mkdir()
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*start, *map(str, words)], env=dict(os.environ), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_set_for_each_seed(place, monkeypatch, capsys):
    """The table has one row for the sets of a cell, and says how far their students and their means lie apart."""
    monkeypatch.chdir(place)
    words = "suite mini.yaml --data tiny=tiny.npz --methods random --out out"
    result = command_line(f"{words} --seeds 3,5", capsys)
    assert result.code == 0
    paths = sorted((place / "out/records").glob("mini-tiny-random-ipc1-seed*.json"))
    assert [path.stem[-5:] for path in paths] == ["seed3", "seed5"]
    sets = [scoring.main_entries(records.read_record(path)) for path in paths]
    first, second = (next(entry for entry in entries if entry["network"] == "mlp") for entries in sets)
    pooled = scoring.summary(first["accuracies"] + second["accuracies"])
    std = scoring.summary([first["mean"], second["mean"]])["std"]
    row = next(line for line in result.out.splitlines() if "random-ipc1 " in line and " mlp " in line)
    expected = f"2 4 {100 * pooled['mean']:.1f} ± {100 * pooled['std']:.1f} {100 * std:.1f}"
    assert row.split()[-6:] == expected.split()
    assert "--seeds 3,x: must be" in command_line(f"{words} --seeds 3,x", capsys).err
