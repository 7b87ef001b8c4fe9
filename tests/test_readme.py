"""The README's commands parse and its Python runs."""

import re
import shlex
from pathlib import Path

import pytest
import torch
import typer
from conftest import change_protocols, tiny_arrays

import condense
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


def test_the_walk_through_teaches_a_network(tmp_path, monkeypatch, short_protocols):
    """Its Python as it stands, with the ready-made set (hard labels) and with one of per-view labels."""
    from condense import networks, rng
    from condense.sets import relabel
    from condense.training import Student, TaskSource, TrainConfig, train

    monkeypatch.chdir(tmp_path)
    task = condense.task("digits")
    with rng.seeded("teacher"):
        teacher = networks.build_network("convnet-d2-w16-in", task.shape, 10)
    recipe = TrainConfig(steps=150, batch=64, lr=0.05, momentum=0.9, weight_decay=0.0)
    train([Student(teacher, TaskSource(task, torch.device("cpu")), 0)], recipe, device=torch.device("cpu"))
    real = condense.distill("random", task, 10, network="convnet-d2-w16-in")
    relabel(real, teacher, epochs=20, temperature=4.0).save("someone.h5")

    ids = torch.arange(len(task.test))
    pixels, truth = task.test_pixels(ids), torch.from_numpy(task.test.labels)

    def small():
        with rng.seeded("mine"):
            return torch.nn.Sequential(
                torch.nn.Flatten(), torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10)
            )

    space = {"MyNetwork": small, "pixels": pixels}
    first, use, second, label, fit = (text for kind, text in WALK if kind == "python")
    kinds = []
    for loop in (first, second):
        exec(loop.replace("range(300)", "range(100)"), space)
        exec(use, space)
        kinds.append(space["distilled"].labels.kind)
        assert (space["guess"] == truth).float().mean() > 0.7
        assert len(space["names"]) == len(truth) and set(space["names"]) <= set("0123456789")
    assert kinds == ["hard", "per-view"]
    exec(label.replace("300", "2"), space | {"teacher": teacher})
    exec(fit, space)
    assert space["network"](space["distilled"].transform(pixels)).shape == (len(truth), 10)
