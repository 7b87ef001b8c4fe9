"""Exchange: imports third-party distilled sets and exports sets to third-party formats."""

from condense.exchange.exporting import eight_bits, export_set
from condense.exchange.importing import NETWORK, folder_name, import_set

__all__ = ["NETWORK", "eight_bits", "export_set", "folder_name", "import_set"]
