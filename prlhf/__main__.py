"""`python -m prlhf` is the command `prlhf`."""

import sys

from prlhf.cli import main

if __name__ == "__main__":
    sys.exit(main())
