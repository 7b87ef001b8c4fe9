"""The README's commands parse and its Python runs."""

import re
import shlex
from pathlib import Path

import pytest
import torch
import typer
from conftest import change_protocols, tiny_arrays

from condense import cli

ROOT = Path(__file__).parent.parent
README, WALK = (
    re.findall(r"```(\w*)\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)
    for name in ("README.md", "docs/using-a-set.md")
)
LINES = [line for kind, text in README + WALK if kind != "python" for line in text.splitlines()]
COMMANDS = [line.split("  ")[0] for line in LINES if line.startswith("condense ")]
COMMANDS += re.findall(r"`(condense (?:verify|show|preview)[^`]*)`", (ROOT / "README.md").read_text())


def test_the_readme_has_commands():
    assert len(COMMANDS) >= 8


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command):
    verb, *words = shlex.split(command)[1:]
    group = typer.main.get_command(cli.app)
    group.commands[verb].make_context(verb, words)


@pytest.fixture
def short_protocols(monkeypatch, tmp_path_factory):
    change_protocols(monkeypatch, tmp_path_factory.mktemp("short") / "protocols", steps=5)


def test_python_runs(tmp_path, monkeypatch, short_protocols):
    monkeypatch.chdir(tmp_path)
    train_images, train_labels, test_images, test_labels = tiny_arrays()
    space = {
        "train_images": torch.from_numpy(train_images),
        "train_labels": torch.from_numpy(train_labels),
        "test_images": torch.from_numpy(test_images),
        "test_labels": torch.from_numpy(test_labels),
        "MyNetwork": lambda: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 16), torch.nn.Linear(16, 3)),
    }
    blocks = [text for kind, text in README if kind == "python"]
    assert len(blocks) == 2
    for text in blocks:
        exec(text.replace("steps=500", "steps=2"), space)
    assert space["scores"].shape == (100, 10)
    assert (tmp_path / "mine.h5").exists()
    assert space["record"]["results"][0]["arm"] == "distilled"


def test_the_page_about_using_sets_runs_as_it_stands(tmp_path, monkeypatch, short_protocols):
    """Its blocks of Python, unchanged and in order: hard labels, labels of views, labelling, training in one line."""
    monkeypatch.chdir(tmp_path)
    space, kinds, accuracies = {}, [], []
    loop, use, views, label, fit = (text for kind, text in WALK if kind == "python")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for block in (loop, use, views, use, label, fit):
            exec(block, space)
            if block is use:
                kinds.append(space["distilled"].labels.kind)
                accuracies.append(float(space["accuracy"]))
                assert len(space["names"]) == len(space["pixels"]) and set(space["names"]) <= set("0123456789")
    assert kinds[0] == "hard" and space["distilled"].labels.per_view
    assert min(accuracies) > 0.7
    assert space["taught"].labels.kind == "per-view" and (tmp_path / "labels.npy").exists()
    assert space["network"](space["distilled"].transform(space["pixels"])).shape == (len(space["pixels"]), 10)
