"""The commands that a verb prints to run next are accepted as they stand, and work."""

import re
import shlex

import pytest
from conftest import change_protocols, command_line, tiny_archive

NETWORK = "convnet-d2-w8-bn"
SHORT = {"distill": "--ipc 2 --force --out next.h5 --run-dir next", "evaluate": "--runs 1 --controls none"}
"""Options that replace those of a printed command to make it quick; a repeated option has its last value."""
STEPS = {"mtt": "steps=1 syn_steps=1", "rded": "label_epochs=1", "sre2l": "steps=1 label_epochs=1", "forgetting": ""}


@pytest.fixture
def place(tmp_path, monkeypatch, tmp_path_factory):
    tiny_archive(tmp_path)
    monkeypatch.chdir(tmp_path)
    change_protocols(monkeypatch, tmp_path_factory.mktemp("short") / "protocols", steps=2, full_epochs=1)


def follow(line, capsys, depth=3):
    """Runs a command line, then the evaluations and distillations that it prints, and so on."""
    done = command_line(line, capsys)
    assert done.code == 0, done.err
    followed = []
    for command in re.findall(r"next: condense (.*)", done.out)[:1]:
        verb, *words = shlex.split(command)
        followed.append(verb)
        if depth:
            more = f"{SHORT.get(verb, '')} {STEPS[words[0]] if verb == 'distill' else ''}"
            followed += follow(f"{command} {more}", capsys, depth - 1)
    return followed


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("experts --for mtt --network convnet-d2-w8-in --count 1 --epochs 3 --out experts.h5", ["distill", "evaluate"]),
        (f"teachers --networks {NETWORK} --count 2 --epochs 1 --out teachers.h5", ["distill", "evaluate"]),
        (f"teachers --for sre2l --networks {NETWORK} --epochs 1 --out teachers.h5", ["distill", "evaluate"]),
        (
            f"scores --network {NETWORK} --out scores.h5 score_epochs=3 score_early=1 score_window=2",
            ["distill", "evaluate"],
        ),
        ("distill dm --ipc 1 --network convnet-d2-w8-in steps=1 batch_real=4 --out set.h5 --run-dir run", ["evaluate"]),
    ],
    ids=["experts", "teachers", "teachers of a method", "scores", "distill"],
)
def test_next(line, expected, place, capsys):
    assert follow(f"{line} --data tiny=tiny.npz", capsys) == expected
