"""Executes runs: config, training, checkpoints, evaluation and results in one workdir (output folder)."""
