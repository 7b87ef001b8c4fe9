"""TODO-FACE condense/cli."""

from condense.cli.entry import main
from condense.cli.listing import KINDS
from condense.cli.parameters import EXIT_CODES, app

__all__ = ["EXIT_CODES", "KINDS", "app", "main"]
