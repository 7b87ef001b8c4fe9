"""A check of the toolkit on a CUDA machine: correctness, repeatability, speed and quality."""
