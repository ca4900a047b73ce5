"""Version number of byolx, which checkpoints and prepared data sets store."""

VERSION = "0.1.0"
