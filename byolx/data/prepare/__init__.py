"""Conversion of large image sets to prepared sets: a few files with checksums."""
