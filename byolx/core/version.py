"""Version number of byolx.

Prepared data sets store it. Checkpoints store it if the git commit is unknown.
"""

VERSION = "0.1.0"
