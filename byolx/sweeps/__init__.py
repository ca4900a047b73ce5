"""Grids, selection, and runs as processes."""
