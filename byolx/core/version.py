"""The version of byolx, as checkpoints and prepared sets record it."""

VERSION = "0.1.0"
