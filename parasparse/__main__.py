"""`python -m parasparse` is the command `parasparse`."""

from __future__ import annotations

import sys

from parasparse.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
