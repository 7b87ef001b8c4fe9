"""Decoupled methods (squeeze, recover, relabel): images recovered or selected with trained teachers, one file per
paper."""
