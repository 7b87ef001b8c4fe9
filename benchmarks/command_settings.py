"""Which settings tell the sets of one method apart: read from the commands that made them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

IGNORED = {"--data", "--ipc", "--out", "--precision", "--recipe", "--run-dir", "--device", "--json", "protocol"}
"""Words of a command that tell no sets apart: the cell, places of files, and what has a column of its own."""
SETTING = re.compile(r"[A-Za-z_]\w*=.*", re.DOTALL)
LIMIT = 160
"""Characters of the longest text."""


def command_settings(command: str | None) -> dict[str, str]:
    """The options and ``key=value`` settings of a command by name: ``{"minutes": "8", "steps": "400"}``.

    Several commands joined by ``&&`` are read as one. A flag without a value has the value ``yes``.
    """
    try:
        words = shlex.split(command or "")
    except ValueError:  # a quote that does not end: any text may stand in a record
        words = (command or "").split()
    settings: dict[str, str] = {}
    flag = ""
    for word in words:
        if flag and (flag in IGNORED or not SETTING.fullmatch(word)) and not word.startswith("--") and word != "&&":
            settings[flag], flag = word, ""  # `--data NAME=PATH`: the value of an option may look like a setting
        elif word.startswith("--"):
            flag, joined, value = word.partition("=")
            settings[flag] = value if joined else "yes"
            flag = "" if joined else flag
        else:
            flag = ""
            name, is_setting, value = word.partition("=")
            if is_setting and SETTING.fullmatch(word):
                settings[name] = value
    return {name.removeprefix("--"): value for name, value in settings.items() if name not in IGNORED}


def differing_settings(commands: Sequence[str | None]) -> list[str]:
    """For each of several commands its settings that not all have alike, as text; empty where there are none.

    ``default settings`` stands for a command that lacks all of them.
    """
    found = [command_settings(command) for command in commands]
    names = list(dict.fromkeys(name for settings in found for name in settings))
    varying = [name for name in names if len({settings.get(name) for settings in found}) > 1]
    texts = []
    for command, settings in zip(commands, found):
        parts = [f"{name}={settings[name]}" for name in varying if name in settings]
        text = ", ".join(parts) or ("default settings" if varying and command else "")
        texts.append(text if len(text) <= LIMIT else text[: LIMIT - 2] + " …")
    return texts
