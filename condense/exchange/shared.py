"""Names and libraries that import and export share."""

from __future__ import annotations

import importlib
import re
from typing import Any

from condense.errors import missing_package


def folder_name(name: str) -> str:
    """Converts a class name to a folder name: characters that some file system forbids become %XX."""
    return re.sub(r'[/\\:*?"<>|%\x00-\x1f]|^\.|[. ]$', lambda match: f"%{ord(match[0]):02X}", name) or "%"


def library(name: str, purpose: str) -> Any:
    """Imports an optional library.

    Raises:
        CondenseError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as fault:
        raise missing_package(name.partition(".")[0], "hub", purpose) from fault
