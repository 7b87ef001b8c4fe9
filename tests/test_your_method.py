"""docs/your-method.md runs as it stands."""

import json
import re
import shlex
from pathlib import Path

from conftest import change_protocols, condense_command

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs/your-method.md").read_text()


def test_the_page_runs(tmp_path, monkeypatch):
    for name in ("pixel_means.py", "comparison.yaml"):
        (tmp_path / name).write_text(re.search(rf"`{name}`:\n\n```\w+\n(.*?)```", TEXT, re.DOTALL)[1])
    change_protocols(monkeypatch, tmp_path / "protocols", steps=2)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CONDENSE_CACHE", str(tmp_path / "cache"))
    commands = [line.removeprefix("condense ") for line in TEXT.splitlines() if line.startswith("condense ")]
    assert [command.split()[0] for command in commands] == ["distill", "evaluate", "resume", "suite"]
    for command in commands:  # each in a process of its own, which finds the plug-in again
        done = condense_command(*shlex.split(command), cwd=tmp_path)
        assert done.returncode == 0, command + done.stdout + done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("comparison-digits-")]
    assert {row[0].split("-")[2] for row in rows} == {
        *("pixel", "random", "herding", "kmeans", "kcenter", "dm", "dc", "dsa", "dcc", "datadam", "idm")
    }
    assert all(row[4:6] == ["2", "4"] for row in rows)  # sets and students
    records = sorted((tmp_path / "comparison/records").glob("*.json"))
    assert len(records) == 22 and json.loads(records[0].read_text())["runs"] == 2
    assert (tmp_path / "comparison/page/index.html").is_file()
