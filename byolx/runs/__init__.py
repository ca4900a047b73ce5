"""One workdir, from config to results."""
