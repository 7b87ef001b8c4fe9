"""The command line. Each verb is one function; torch is imported inside the verbs, so that help is fast."""

from condense.cli.entry import main
from condense.cli.listing import LISTINGS
from condense.cli.parameters import EXIT_CODES, app

__all__ = ["EXIT_CODES", "LISTINGS", "app", "main"]
