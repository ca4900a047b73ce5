"""Converts folders or archives of images to prepared sets: a few large files with checksums."""
