"""Compares measured results with the paper's tables, and formats them as tables and figures."""
