"""Protocols, measured and published numbers, and speed comparisons; imported as ``condense.benchmarks``."""
