"""Hyperparameter sweeps train many configs, choose the best on validation images, and test it."""
