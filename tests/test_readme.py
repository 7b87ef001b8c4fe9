"""The README's commands parse and its Python runs."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest
import torch
import typer
from conftest import tiny_arrays

import condense
from condense import cli, evaluation

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)
LINES = [line for kind, text in BLOCKS if kind != "python" for line in text.splitlines()]
COMMANDS = [line.split("  ")[0] for line in LINES if line.startswith("condense ")]
COMMANDS += re.findall(r"`(condense (?:verify|show|preview)[^`]*)`", README)


def test_the_readme_has_commands():
    assert len(COMMANDS) >= 8


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command):
    verb, *words = shlex.split(command)[1:]
    group = typer.main.get_command(cli.app)
    group.commands[verb].make_context(verb, words)


@pytest.fixture
def short_protocols(monkeypatch):
    short = {name: dataclasses.replace(p, steps=5) for name, p in evaluation.protocols().items()}
    monkeypatch.setattr(evaluation, "protocols", lambda: short)


def test_python_runs(tmp_path, monkeypatch, short_protocols):
    monkeypatch.chdir(tmp_path)
    condense.distill("dm", "digits", 10, network="convnet-d2-w8-in", steps=2, out="demo/digits-dm-ipc10.h5")
    train_images, train_labels, test_images, test_labels = tiny_arrays()
    space = {
        "train_images": torch.from_numpy(train_images),
        "train_labels": torch.from_numpy(train_labels),
        "test_images": torch.from_numpy(test_images),
        "test_labels": torch.from_numpy(test_labels),
        "MyNetwork": lambda: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 16), torch.nn.Linear(16, 3)),
    }
    blocks = [text for kind, text in BLOCKS if kind == "python"]
    assert len(blocks) == 2
    for text in blocks:
        exec(text.replace("steps=500", "steps=2"), space)
    assert space["scores"].shape == (100, 10)
    assert (tmp_path / "mine.h5").exists()
    assert space["record"]["results"][0]["arm"] == "distilled"
