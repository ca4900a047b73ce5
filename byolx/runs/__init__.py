"""Runs: config, training, checkpoints, evaluation and results in one workdir."""
