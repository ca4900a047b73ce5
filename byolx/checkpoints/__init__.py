"""Checkpoints: saves, verifies and restores them, and loads the pretrained encoders in them."""
