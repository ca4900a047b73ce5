"""`python -m byolx` is the `byolx` command."""

import sys

from byolx.cli import main

if __name__ == "__main__":
  sys.exit(main())
