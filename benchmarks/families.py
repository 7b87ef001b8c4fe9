"""The family of a method, its paper and its link, as the tables of methods and the leaderboard show them."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from condense import config
from condense.registry import METHODS

NAMES = {
    "curriculum_synthesis": "decoupled (squeeze, recover, relabel)",
    "krrst": "kernel regression on features",
    "label_lightening": "label compression",
    "mirage": "graphs",
}
"""Module or folder of a family to the family's name, where it is not the module's name with spaces."""
PACKAGE = "condense.methods."
OTHER = "other"
"""Family of a method from outside this package."""


@dataclass(frozen=True)
class Facts:
    """What a table says of a method besides its numbers."""

    family: str
    paper: str = ""
    """Title; empty where the method is unknown."""
    year: int | None = None
    link: str = ""
    """URL of the paper (`https://...`), empty where there is none."""


@functools.cache
def method_facts(name: str) -> Facts:
    """Family, paper, year and link of a method; those of an unknown one are empty and its family is ``OTHER``."""
    if name not in METHODS:
        return Facts(OTHER)
    entry = METHODS.get(name)
    if name not in config.method_paths():  # a plug-in, or an installed package
        return Facts(OTHER, entry.paper, entry.year)
    file = config.method_file(name)
    if not file.module.startswith(PACKAGE):
        return Facts(OTHER, entry.paper, entry.year, file.link)
    family = file.module.removeprefix(PACKAGE).partition(".")[0]
    return Facts(NAMES.get(family, family.replace("_", " ")), entry.paper, entry.year, file.link)
