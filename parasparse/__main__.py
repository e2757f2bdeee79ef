"""`python -m parasparse` is the command `parasparse`."""

import sys

from parasparse.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
