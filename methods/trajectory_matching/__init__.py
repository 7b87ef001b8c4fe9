"""Trajectory matching: training on the synthetic images moves a network as far as epochs on the real ones moved it."""
