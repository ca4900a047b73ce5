"""Data sources: read access to data sets, with one module for each layout on disk."""
