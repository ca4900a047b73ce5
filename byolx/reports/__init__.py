"""Comparison of measured results with the paper's tables."""
