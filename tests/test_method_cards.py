"""The cards in docs/methods are those that registry, docstrings, recipes, records and published numbers give."""

from pathlib import Path

import pytest

from condense.benchmarks.method_cards import PARTS, card, cards
from condense.registry import METHODS

FOLDER = Path(__file__).parents[1] / "docs" / "methods"


def test_the_committed_cards_are_current():
    """Mend with: python -m condense.benchmarks.method_cards --out docs/methods"""
    made = cards()
    assert {path.name for path in FOLDER.iterdir()} == set(made)
    for name, text in made.items():
        assert (FOLDER / name).read_text(encoding="utf-8") == text, name


@pytest.mark.parametrize("name", METHODS.names())
def test_a_card_says_what_a_user_asks(name):
    text = card(METHODS.get(name))
    for title in PARTS:
        assert f"**{title}.** " in text, title
    for heading in ("# " + name, "## Published", "## Measured here", f"condense show {name}"):
        assert heading in text
