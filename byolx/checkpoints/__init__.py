"""Checkpoints: saved, verified, restored, and the encoder in them."""
