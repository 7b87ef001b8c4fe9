"""The published methods, one module per family; imported as ``condense.methods`` and resolved by the registry."""

if __name__ == "methods":
    raise ImportError(
        "this folder is installed as `condense.methods`; importing it as `methods` would load every method twice. "
        "Write `from condense.methods import distribution_matching`."
    )
