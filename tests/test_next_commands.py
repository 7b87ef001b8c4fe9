"""The commands that a verb prints to run next are accepted as they stand, and work."""

import re
import shlex

import pytest
from conftest import change_protocols, command_line, tiny_archive

NETWORK = "convnet-d2-w8-bn"
SHORT = {
    "distill": "--ipc 2 --force --out next.h5 --run-dir next",
    "evaluate": "--runs 1 --controls none",
    "preview": "--force",
}
"""Options that replace those of a printed command to make it quick; a repeated option has its last value."""
STEPS = {
    "mtt": "steps=1 syn_steps=1",
    "rded": "label_epochs=1",
    "sre2l": "steps=1 label_epochs=1",
    "forgetting": "",
    "krrst": "steps=1 batch_real=4 pool=1 pool_steps=1",
}


@pytest.fixture
def place(tmp_path, monkeypatch, tmp_path_factory):
    tiny_archive(tmp_path)
    monkeypatch.chdir(tmp_path)
    change_protocols(monkeypatch, tmp_path_factory.mktemp("short") / "protocols", steps=2, full_epochs=1)


def follow(line, capsys, depth=3):
    """Runs a command line, then those that it prints, and so on."""
    done = command_line(line, capsys)
    assert done.code == 0, done.err
    followed = []
    for command in re.findall(r"^ *(?:next: |run: )?condense (.*)", done.out, re.M):
        verb, *words = shlex.split(command)
        followed.append(verb)
        if depth:
            more = f"{SHORT.get(verb, '')} {STEPS[words[0]] if verb == 'distill' else ''}"
            followed += follow(f"{command} {more}", capsys, depth - 1)
    return followed


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "experts --for mtt --network convnet-d2-w8-in --count 1 --epochs 3 --out experts.h5",
            ["distill", "evaluate", "preview"],
        ),
        (f"teachers --networks {NETWORK} --count 2 --epochs 1 --out teachers.h5", ["distill", "evaluate", "preview"]),
        (f"teachers --for sre2l --networks {NETWORK} --epochs 1 --out teachers.h5", ["distill", "evaluate", "preview"]),
        (
            f"scores --network {NETWORK} --out scores.h5 score_epochs=3 score_early=1 score_window=2",
            ["distill", "evaluate", "preview"],
        ),
        (
            f"teachers --objective barlow --networks {NETWORK} --epochs 1 --out t.h5 projector=16 teacher_batch=4",
            ["distill", "evaluate", "preview"],
        ),
        (
            "distill dm --ipc 1 --network convnet-d2-w8-in steps=1 batch_real=4 --out set.h5 --run-dir run",
            ["evaluate", "preview"],
        ),
    ],
    ids=["experts", "teachers", "teachers of a method", "scores", "self-supervised teachers", "distill"],
)
def test_next(line, expected, place, capsys):
    assert follow(f"{line} --data tiny=tiny.npz", capsys) == expected


def test_next_of_files_and_plans(place, capsys, monkeypatch):
    monkeypatch.setenv("CONDENSE_PLAN_SECONDS", "0.1")
    made = "distill dm --data tiny=tiny.npz --ipc 1 --network convnet-d2-w8-in steps=1 batch_real=4 --out set.h5"
    assert follow(f"{made} --run-dir run", capsys) == ["evaluate", "preview"]
    assert follow("lighten set.h5 --labels hard --data tiny=tiny.npz --out light.h5", capsys) == ["evaluate"]
    shown = command_line("show set.h5", capsys)
    assert "next: condense evaluate set.h5 --data tiny=PATH" in shown.out
    advised = (
        "advise --data tiny=tiny.npz --ipc 1 --network convnet-d2-w8-in --labels hard --precision fp32 --minutes 900"
    )
    command = command_line(advised, capsys).out.splitlines()[-1]
    assert command.endswith("--network convnet-d2-w8-in --precision fp32")
    assert command_line(f"{command.removeprefix('run: condense ')} --minutes 0.0001 --out a.h5", capsys).code == 0
