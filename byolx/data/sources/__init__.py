"""Data sources: one module per layout on disk."""
