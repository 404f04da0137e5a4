"""`python -m offload`: the door through which the command line is entered."""

import sys

from offload.bench.cli import main

if __name__ == "__main__":
    sys.exit(main())
