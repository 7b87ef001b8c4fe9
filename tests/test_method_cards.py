"""Cards and README follow the registry, docstrings, recipes, records and published numbers."""

from pathlib import Path

import pytest

from condense import config
from condense.benchmarks.method_cards import BEGIN, PARTS, cards, method_card, with_methods_table
from condense.registry import METHODS

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "methods"


def test_the_committed_cards_are_current():
    """Fix with: python -m condense.benchmarks.method_cards --out docs/methods --readme README.md"""
    made = cards()
    assert {path.name for path in FOLDER.iterdir()} == set(made)
    for name, text in made.items():
        assert (FOLDER / name).read_text(encoding="utf-8") == text, name


def test_the_methods_table_of_the_readme_is_current():
    """Fix with: python -m condense.benchmarks.method_cards --out docs/methods --readme README.md"""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert with_methods_table(readme) == readme
    for name in METHODS.names():
        assert f"\n| [`{name}`](docs/methods/{name}.md) | " in readme


def test_a_readme_without_the_lines_is_refused():
    with pytest.raises(ValueError, match="methods: begin"):
        with_methods_table(f"# A readme\n{BEGIN}\n")


@pytest.mark.parametrize("name", METHODS.names())
def test_the_cost_follows_the_order(name):
    assert config.method_file(name).cost in (["low"], ["low", "medium"], ["high"])[METHODS.get(name).order]


@pytest.mark.parametrize("name", METHODS.names())
def test_a_card_says_what_a_user_asks(name):
    text = method_card(METHODS.get(name))
    for title in PARTS:
        assert f"**{title}.** " in text, title
    for heading in ("# " + name, "## Published", "## Measured here", f"condense show {name}"):
        assert heading in text
