"""Version number of byolx. Prepared data sets store it; checkpoints do if the git commit is unknown."""

VERSION = "0.1.0"
