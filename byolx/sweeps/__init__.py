"""Hyperparameter sweeps: grids, runs as processes, selection on validation images, final tests."""
