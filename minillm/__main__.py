"""`python -m minillm`: what the command `minillm` does."""

import sys

from minillm.cli.process import run

if __name__ == "__main__":
    sys.exit(run())
