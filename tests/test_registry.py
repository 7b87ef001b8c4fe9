"""A method is one module and one YAML file: everything else finds it from those."""

import importlib.util
import json
import os
import py_compile
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import condense_command

from condense import config
from condense.errors import CondenseError
from condense.registry import METHODS

ROOT = Path(__file__).parents[1]
MODULE = '''
"""A toy method."""

import math
from dataclasses import dataclass

from condense.config import require_range
from condense.engine import ParamGroup
from condense.registry import method
from condense.sets import SyntheticOptions, SyntheticSet


@dataclass(frozen=True)
class PixelMeans(SyntheticOptions):
    """Hyper-parameters of the toy."""

    steps: int = 10
    """Steps."""
    lr_img: float = 1.0
    """Learning rate of the pixels."""
    augment: str = "none"
    """Unused."""


@method("pixel-means", config=PixelMeans, paper="A toy", year=2024, order=0, protocol="quick-v1")
def pixel_means(task, config, run):
    """Matches the mean pixels of each class.

    When to use: never. Cost: none. Known failure: everything.

    A toy.
    """
    synthetic = SyntheticSet.create(task, run.ipc, config, seed=run.seed, device=run.device)
    for step in run.optimise(synthetic, config.steps, images=ParamGroup(lr=config.lr_img)):
        for c in range(task.num_classes):
            real, _ = run.task.per_class(6, step.key("real"), [c])
            fake, _ = synthetic.decode([c])
            step.accumulate((real.mean(0) - fake.mean(0)).square().sum())
        step.update()
    return synthetic
'''
RECIPE = """
module: toy_pixel_means
cells:
  tiny: {data: digits, ipc: 2, network: convnet-d2-w8-in, steps: 3, protocol: quick-v1}
suites:
  small:
    digits-ipc1: {steps: 7}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the toy, which CONDENSE_METHODS names."""
    made = tmp_path / "mine"
    made.mkdir()
    (made / "toy_pixel_means.py").write_text(MODULE)
    (made / "pixel-means.yaml").write_text(RECIPE)
    monkeypatch.setenv(config.METHOD_FOLDERS, str(made))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return made


def python(*words, cwd):
    """What a new process prints, so that this one does not keep the toy."""
    done = subprocess.run([sys.executable, *words], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_command_line_finds_a_method_in_a_folder(folder, tmp_path):
    code = """
import shlex, sys
from condense.cli import main
for words in sys.argv[1:]:
    try:
        main(shlex.split(words))
    except SystemExit as end:
        assert not end.code, words
"""
    shown = python(
        "-c",
        code,
        "ls methods",
        "ls recipes",
        "show pixel-means",
        "distill --recipe pixel-means/tiny --out toy.h5 --device cpu",
        "evaluate toy.h5 --data digits --runs 1 --controls random --device cpu --json record.json",
        cwd=tmp_path,
    )
    assert "pixel-means  Matches the mean pixels of each class. (2024)" in shown
    assert "pixel-means/tiny" in shown and "lr_img=1.0\n      Learning rate of the pixels." in shown
    assert json.loads((tmp_path / "record.json").read_text())["set"]["method"] == "pixel-means"


def test_card_suite_and_gpu_check_find_it(folder, tmp_path):
    code = """
from pathlib import Path
import torch
from condense.benchmarks.gpu_check.check import Check
from condense.benchmarks.gpu_check.correctness import distil_images, methods_with_steps
from condense.benchmarks.method_cards import cards
from condense.benchmarks.suite import cells, get_suite
print(cards()["pixel-means.md"])
print([(cell.data, cell.ipc, cell.settings) for cell in cells(get_suite("small"), ["pixel-means"])][0])
check = Check(torch.device("cpu"), 5, Path("."), True)
images, change = distil_images(check, "pixel-means", 1, check.device)
print("pixel-means" in methods_with_steps(check), len(images), bool(change.abs().max() > 0))
"""
    shown = python("-c", code, cwd=tmp_path)
    assert "**When to use.** Never." in shown and "--recipe pixel-means/tiny" in shown
    assert shown.splitlines()[-2:] == ["('digits', 1, {'steps': 7})", "True 6 True"]


def test_the_generic_tests_run_on_it(folder):
    words = ("-m", "pytest", "-p", "no:cacheprovider", "tests/test_methods.py", "-k", "pixel-means", "-rs")
    assert "7 passed" in python(*words, cwd=ROOT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("module:", "modul:"), "pixel-means.yaml: modul: no such key; did you mean 'module'"),
        (("module: toy_pixel_means", ""), "pixel-means.yaml: lacks module"),
        (("toy_pixel_means", "toy_pixel_mean"), "method 'pixel-means': there is no module toy_pixel_mean"),
        (("toy_pixel_means", "condense.methods.selection"), "condense.methods.selection does not register it"),
        (("tiny: {data: digits", "tiny: [data, digits"), "pixel-means.yaml: not valid YAML"),
        (("module:", "link: arxiv\nmodule:"), "pixel-means.yaml: link=arxiv: must be a URL"),
        (("module:", "cost: dear\nmodule:"), "pixel-means.yaml: cost=dear: must be one of low, medium, high"),
        (("small:\n    digits-ipc1: {steps: 7}", "small: [7]"), r"suites: small: must be a mapping .* not \[7\]"),
    ],
)
def test_a_wrong_file_is_refused(folder, change, message):
    (folder / "pixel-means.yaml").write_text(RECIPE.replace(*change))
    with pytest.raises(CondenseError, match=message):
        METHODS.get("pixel-means")


def test_folders_and_names_that_cannot_be(folder, tmp_path, monkeypatch):
    assert "pixel-means" in METHODS and METHODS.names() == [*config.method_paths()]
    (folder / "dm.yaml").write_text(RECIPE)
    with pytest.raises(CondenseError, match="there is a method 'dm' already"):
        METHODS.names()
    monkeypatch.setenv(config.METHOD_FOLDERS, str(tmp_path / "missing"))
    with pytest.raises(CondenseError, match="missing: no such folder"):
        METHODS.names()


PLUGIN = (
    MODULE
    + """

from torch import nn

from condense.networks import register_network


def small(shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], 8), nn.ReLU(), nn.Linear(8, classes))


register_network("small-mlp", small)
"""
)


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    path = tmp_path / "toy.py"
    path.write_text(PLUGIN)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CONDENSE_CACHE", str(tmp_path / "cache"))
    return path


def test_a_plugin_is_named_once_and_found_again(plugin, tmp_path, monkeypatch):
    words = "distill pixel-means --plugin toy.py --data digits --ipc 1 --network small-mlp --minutes 0.00001 --out a.h5"
    begun = condense_command(*words.split(), "--run-dir", "run", "steps=40", cwd=tmp_path)
    assert begun.returncode == 0 and "condense resume run" in begun.stdout, begun.stderr
    resumed = condense_command("resume", "run", cwd=tmp_path)
    assert resumed.returncode == 0 and "40 of 40 steps" in resumed.stdout, resumed.stderr
    shown = json.loads(condense_command("show", "a.h5", "--json", cwd=tmp_path).stdout)
    assert list(shown["plugins"]) == ["toy.py"] and "--plugin PATH" in shown["command"]
    assert "pixel-means" in condense_command("--plugin", "toy.py", "ls", "methods", cwd=tmp_path).stdout

    monkeypatch.setenv("CONDENSE_CACHE", str(tmp_path / "of-someone-else"))
    refused = condense_command("resume", "run", "--steps", "50", cwd=tmp_path)
    assert refused.returncode == 2 and f"if you trust it: --plugin {plugin}" in refused.stderr
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    plugin.rename(elsewhere / "toy.py")
    assert (
        "is not there; restore it, or give its copy by --plugin"
        in condense_command("resume", "run", cwd=tmp_path).stderr
    )
    same = condense_command("resume", "run", "--steps", "50", "--plugin", "elsewhere/toy.py", cwd=tmp_path)
    assert same.returncode == 0 and "50 of 50 steps" in same.stdout, same.stderr
    plugin.write_text(PLUGIN + "# another version\n")
    assert "has changed since the run began" in condense_command("resume", "run", "--steps", "60", cwd=tmp_path).stderr


def test_the_printed_command_names_the_plugin_of_the_network(plugin, tmp_path):
    words = "distill random --plugin toy.py --data digits --ipc 1 --network small-mlp --out a.h5 --run-dir run"
    made = condense_command(*words.split(), cwd=tmp_path)
    printed = re.search(r"next: condense (evaluate a.h5 .*)", made.stdout)[1]
    assert printed == "evaluate a.h5 --data digits --plugin toy.py"
    assert printed in condense_command("show", "a.h5", cwd=tmp_path).stdout
    short = "--runs 1 --controls none --protocol quick-v1 --json a.json"
    judged = condense_command(*printed.split(), *short.split(), cwd=tmp_path)
    assert judged.returncode == 0, judged.stderr
    record = json.loads((tmp_path / "a.json").read_text())
    assert list(record["plugins"]) == list(record["set"]["plugins"]) == ["toy.py"]
    unknown = condense_command("evaluate", "a.h5", "--data", "digits", cwd=tmp_path).stderr
    assert "unknown network 'small-mlp'" in unknown and "made with a plug-in: name it by --plugin: toy.py" in unknown


SUITE = """
name: toy
summary: one cell of a plug-in, one without
protocol: quick-v1
runs: 1
seeds: [0]
networks: [own]
tasks:
  digits: {network: convnet-d2-w8-in, ipc: [1], controls: []}
methods:
  pixel-means: {digits-ipc1: {steps: 2}}
  random: {}
"""


def test_a_suite_repeats_the_cells_of_an_edited_plugin(plugin, tmp_path):
    (tmp_path / "toy.yaml").write_text(SUITE)
    words = ["suite", "toy.yaml", "--plugin", "toy.py", "--out", "suite"]
    assert "2 records made, 0 were there" in condense_command(*words, cwd=tmp_path).stdout
    assert "0 records made, 2 were there" in condense_command(*words, cwd=tmp_path).stdout
    plugin.write_text(PLUGIN + "# another version\n")
    again = condense_command(*words, cwd=tmp_path)
    assert "1 records made, 1 were there" in again.stdout, again.stderr
    assert "toy-digits-random-ipc1-seed0: is there" in again.stderr


def test_a_run_without_the_plugin_does_not_depend_on_it(plugin, tmp_path, monkeypatch):
    monkeypatch.setenv("CONDENSE_PLUGINS", str(plugin))
    words = "distill dm --data digits --ipc 1 --network convnet-d2-w8-in steps=2 --out a.h5 --run-dir run"
    assert condense_command(*words.split(), cwd=tmp_path).returncode == 0
    assert json.loads((tmp_path / "run/config.json").read_text())["plugins"] == {}
    plugin.write_text(PLUGIN + "# another version\n")
    resumed = condense_command("resume", "run", "--steps", "3", cwd=tmp_path)
    assert resumed.returncode == 0 and "3 of 3 steps" in resumed.stdout, resumed.stderr


def test_only_the_file_that_was_checked_is_executed(plugin, tmp_path):
    """Not a compiled file beside it, which Python's import would take."""
    cache = Path(importlib.util.cache_from_source(str(plugin)))
    cache.parent.mkdir()
    other = tmp_path / "other.py"
    other.write_text("raise SystemExit('another code')")
    stamp = plugin.stat()
    other.write_text(other.read_text().ljust(stamp.st_size))
    os.utime(other, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    py_compile.compile(str(other), cfile=str(cache), dfile=str(plugin))
    assert condense_command("--plugin", "toy.py", "show", "pixel-means", cwd=tmp_path).returncode == 0


def test_plugins_that_cannot_be(plugin, tmp_path):
    missing = condense_command("ls", "--plugin", "no.py", cwd=tmp_path)
    assert "--plugin no.py: must be an existing .py file" in missing.stderr
    plugin.write_text("import nowhere")
    assert "toy.py: ModuleNotFoundError" in condense_command("ls", "--plugin", "toy.py", cwd=tmp_path).stderr


DATA = """
from condense.data import DATASETS
from condense.data.registered import RegisteredDataset, _read_digits

DATASETS.add("toydata", RegisteredDataset("toydata", "Digits by another name.", _read_digits, (1, 8, 8), 10))
"""


def test_printed_commands_name_the_plugin_of_the_data(tmp_path, plugin):
    (tmp_path / "data.py").write_text(DATA)
    words = "distill random --plugin data.py --data mine=toydata --ipc 1 --network convnet-d2-w8-in --out a.h5"
    made = condense_command(*words.split(), cwd=tmp_path)
    assert "next: condense evaluate a.h5 --data mine=toydata --plugin data.py" in made.stdout, made.stderr
    words = "distill random --plugin data.py --data toydata --ipc 1 --network convnet-d2-w8-in --out b.h5"
    assert condense_command(*words.split(), cwd=tmp_path).returncode == 0
    shown = condense_command("show", "b.h5", cwd=tmp_path).stdout
    assert "next: condense evaluate b.h5 --data toydata --plugin data.py" in shown
    unknown = condense_command("evaluate", "b.h5", "--data", "toydata", cwd=tmp_path).stderr
    assert "name it by --plugin: data.py" in unknown


def test_a_plugin_cannot_take_the_name_of_a_method(plugin, tmp_path):
    plugin.write_text(PLUGIN.replace('@method("pixel-means"', '@method("dm"'))
    refused = condense_command("--plugin", "toy.py", "show", "dm", cwd=tmp_path)
    assert refused.returncode == 2 and "method 'dm': there is one with this name already" in refused.stderr


def test_one_file_under_two_paths_counts_once(plugin, tmp_path, monkeypatch):
    words = "distill pixel-means --data digits --ipc 1 --network convnet-d2-w8-in steps=2 --out a.h5 --run-dir run"
    (tmp_path / "sub").mkdir()
    monkeypatch.setenv("CONDENSE_PLUGINS", str(plugin))
    done = condense_command(*words.split(), "--plugin", "sub/../toy.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert list(json.loads((tmp_path / "run/config.json").read_text())["plugins"]) == [str(plugin)]


def test_an_edited_method_of_a_folder_is_another_method(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("CONDENSE_CACHE", str(tmp_path / "cache"))
    words = "distill pixel-means --data digits --ipc 1 --network convnet-d2-w8-in steps=2 --out a.h5 --run-dir run"
    made = condense_command(*words.split(), cwd=tmp_path)
    assert made.returncode == 0 and "--plugin" not in made.stdout, made.stderr
    shown = json.loads(condense_command("show", "a.h5", "--json", cwd=tmp_path).stdout)
    assert list(shown["plugins"]) == ["toy_pixel_means.py"] and "--plugin" not in shown["command"]
    resumed = condense_command("resume", "run", "--steps", "3", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    module = folder / "toy_pixel_means.py"
    module.write_text(module.read_text() + "# another version\n")
    refused = condense_command("resume", "run", "--steps", "4", cwd=tmp_path)
    assert refused.returncode == 2 and "has changed since the run began" in refused.stderr


def test_recipes_may_say_how_many_images(folder):
    text = RECIPE.replace("tiny: {data: digits, ipc: 2", "tiny: {data: digits, images: 10")
    assert text != RECIPE
    (folder / "pixel-means.yaml").write_text(text)
    listed = condense_command("ls", "recipes", "pixel-means", cwd=folder)
    assert listed.returncode == 0 and "digits, 10 images" in listed.stdout, listed.stderr


def install_package(folder, monkeypatch, entry_points, code):
    """Makes a package ``toy`` of version 1.0, with a module ``toy_package``, that Python finds."""
    info = folder / "toy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entry_points)
    (folder / "toy_package.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{folder}")


def test_an_installed_package_offers_a_method(tmp_path, monkeypatch):
    """By an entry point, which is read from the package's metadata without an import."""
    install_package(tmp_path, monkeypatch, "[condense.methods]\npixel-means = toy_package\n", MODULE)
    shown = condense_command("show", "pixel-means", cwd=tmp_path)
    assert shown.returncode == 0 and "Matches the mean pixels of each class." in shown.stdout, shown.stderr
    monkeypatch.setenv("CONDENSE_CACHE", str(tmp_path / "cache"))
    words = "distill pixel-means --data digits --ipc 1 --network convnet-d2-w8-in steps=2 --out a.h5 --run-dir run"
    assert condense_command(*words.split(), cwd=tmp_path).returncode == 0
    assert json.loads(condense_command("show", "a.h5", "--json", cwd=tmp_path).stdout)["plugins"] == {"toy": "1.0"}
    (tmp_path / "toy_package.py").write_text("1 / 0")
    listed = condense_command("ls", "methods", cwd=tmp_path)
    assert listed.returncode == 0 and "toy_package cannot be imported: ZeroDivisionError" in listed.stdout
    refused = condense_command("show", "pixel-means", cwd=tmp_path)
    assert refused.returncode == 2 and "method 'pixel-means': toy_package cannot be imported" in refused.stderr


def test_an_installed_package_offers_a_network(tmp_path, monkeypatch):
    """Its module is imported by every command; a broken one is reported and the command goes on."""
    install_package(tmp_path, monkeypatch, "[condense.plugins]\ntoy = toy_package\nsecond = toy_second\n", PLUGIN)
    (tmp_path / "toy_second.py").write_text(PLUGIN.replace("small-mlp", "second-mlp").replace("pixel-means", "second"))
    names = condense_command("ls", "networks", cwd=tmp_path).stdout.split()
    assert {"small-mlp", "second-mlp"} <= set(names)
    (tmp_path / "toy_package.py").write_text("1 / 0")
    shown = condense_command("ls", "networks", cwd=tmp_path)
    assert shown.returncode == 0 and "the package toy cannot be imported: ZeroDivisionError" in shown.stderr
