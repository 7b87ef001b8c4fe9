"""Ready-made sets, each with its picture and card: ``condense.load(\"digits/dm-ipc10\")``; ``condense ls sets``."""
