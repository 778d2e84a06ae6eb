"""Coordinates of tokens from the statistics of a text: forces, a simulation, its spectrum. Frozen before training."""
