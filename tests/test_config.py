"""Settings: types, did you mean, and all faults at once; every packaged recipe and protocol parses."""

import dataclasses
import re
from dataclasses import dataclass

import pytest

from condense import config
from condense.errors import CondenseError
from condense.registry import METHODS


@dataclass(frozen=True)
class Example:
    """For the tests."""

    steps: int = 10
    """Number of
    steps."""
    lr_img: float = 1.0
    """Learning rate."""
    init: str = "real"
    """Start."""
    fyi: bool = False
    """Flip."""


@dataclass(frozen=True)
class Lists:
    """Of required settings."""

    name: str
    numbers: "list[int]"
    rates: "list[float]"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": None}, "^x lacks name$"),
        ({"numbers": None, "rates": None}, "^x lacks numbers, rates$"),
        ({"numbers": {"a": 1}}, "numbers={'a': 1}: must be a list of whole numbers"),
        ({"numbers": [[]]}, r"numbers=\[\[\]\]: must be a list of whole numbers"),
        ({"numbers": [10**30]}, "must be a list of whole numbers"),
        ({"rates": [float("nan")]}, "must be a list of finite numbers"),
        ({"rates": [1.0, {}]}, "must be a list of finite numbers"),
    ],
)
def test_required_settings_and_lists(change, message):
    right = {"name": "a", "numbers": [1, 2], "rates": [0.5]}
    assert config.build_config(Lists, right, "x") == Lists("a", [1, 2], [0.5])
    wrong = {key: value for key, value in {**right, **change}.items() if value is not None}
    with pytest.raises(CondenseError, match=message):
        config.build_config(Lists, wrong, "x")


def test_strings_become_types():
    built = config.build_config(Example, {"steps": "20", "lr_img": "1e-3", "fyi": "true", "init": "noise"}, "x")
    assert built == Example(20, 0.001, "noise", True)


@pytest.mark.parametrize("text", ["2024_01_05", "010", "[old] photos", "a #b", "@x", "null"])
def test_text_is_taken_as_typed(text):
    assert config.build_config(Example, {"init": text}, "x").init == text


def test_defaults_stay():
    assert config.build_config(Example, {}, "x") == Example()


def test_all_faults_are_reported_at_once():
    with pytest.raises(CondenseError) as fault:
        config.build_config(Example, {"step": "5", "lr_img": "fast", "fyi": "7.5"}, "the method 'x'")
    text = str(fault.value)
    assert "step=5: no such setting of the method 'x'; did you mean 'steps'?" in text
    assert "lr_img=fast: must be a finite number" in text
    assert "fyi=7.5: must be true or false" in text
    assert "\n" not in text


def test_a_word_without_equals():
    with pytest.raises(CondenseError, match="'steps' is not a setting"):
        config.parse_overrides(["steps"])


def test_field_docs_come_from_the_source():
    assert config.field_docs(Example) == {
        "steps": "Number of steps.",
        "lr_img": "Learning rate.",
        "init": "Start.",
        "fyi": "Flip.",
    }


@dataclass(frozen=True)
class Derived(Example):
    """For the tests: new defaults, one docstring extended and one replaced."""

    steps: int = 20
    lr_img: float = 0.5
    """{inherited} 0.1 for
    large images."""
    fyi: bool = True
    """Whether to flip."""


def test_a_field_inherits_the_docstring_of_the_nearest_base_class():
    class Again(Derived):
        init: str = "noise"

    again = dataclasses.dataclass(frozen=True)(Again)
    assert config.field_docs(again) == {
        "steps": "Number of steps.",
        "lr_img": "Learning rate. 0.1 for large images.",
        "init": "Start.",
        "fyi": "Whether to flip.",
    }
    assert {name: default for name, _, default, _ in config.describe(again)}["lr_img"] == "0.5"


@pytest.mark.parametrize("name", config.recipe_names())
def test_every_recipe_parses(name):
    recipe = config.load_recipe(name)
    entry = METHODS.get(recipe["method"])
    if entry.task != "images":
        pytest.skip("no recipe of images")
    from condense import networks
    from condense.data import DataOptions, datasets
    from condense.judge import get_protocol

    settings = {key: value for key, value in recipe.items() if key not in config.RUN_KEYS}
    of_data = {field.name for field in dataclasses.fields(DataOptions)} & set(settings)
    config.build_config(DataOptions, {key: settings.pop(key) for key in of_data}, name)
    config.build_config(entry.config, settings, name)
    assert recipe["data"] in {*datasets(), "imagenet-1k", "imagenet-21k"}  # the latter two with --data NAME=PATH
    assert recipe["ipc"] >= 1
    networks.check_network(recipe.get("network", entry.network))
    get_protocol(recipe.get("protocol", entry.protocol))


def test_unknown_recipe():
    with pytest.raises(CondenseError, match="did you mean 'dm/cifar10-ipc10'"):
        config.load_recipe("dm/cifar10-ip10")


def test_recipe_files(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("method: dm\ndata: digits\nipc: 2\nsteps: 5\n")
    assert config.load_recipe(str(path))["steps"] == 5
    path.write_text("method: dm\n")
    with pytest.raises(CondenseError, match="lacks data, ipc"):
        config.load_recipe(str(path))
    path.write_text("method: [dm\n")
    with pytest.raises(CondenseError, match="not valid YAML"):
        config.load_recipe(str(path))


def test_every_setting_of_every_method_is_documented():
    for name in METHODS.names():
        entry = METHODS.get(name)
        for key, _, _, meaning in config.describe(entry.config):
            assert meaning, f"{name}: {key} has no docstring"
            assert not re.match(r"^See \w+", meaning) and "{inherited}" not in meaning, f"{name}: {key}: {meaning}"
        assert entry.summary and entry.paper
