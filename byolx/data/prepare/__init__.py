"""Large sets written once as a few checksummed files."""
