"""Exchange: imports third-party distilled sets and exports sets to third-party formats."""

from condense.exchange.exporting import eight_bits, export_set
from condense.exchange.importing import DEFAULT_IMPORT_NETWORK, import_set
from condense.exchange.shared import folder_name

__all__ = ["DEFAULT_IMPORT_NETWORK", "eight_bits", "export_set", "folder_name", "import_set"]
