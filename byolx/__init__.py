"""BYOL in Flax NNX: pretrain image encoders without labels, and measure what they know."""

__version__ = "0.1.0"
