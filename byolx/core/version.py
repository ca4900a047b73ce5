"""Version number of byolx. Data sets store it, and checkpoints do if the git commit is unknown."""

VERSION = "0.1.0"
