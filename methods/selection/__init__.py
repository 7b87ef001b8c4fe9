"""Selections: real images of the data, unchanged, chosen at random, by features or by scores."""
