"""The command ``python -m mfx``."""

import sys

from mfx.cli import main

if __name__ == "__main__":
    sys.exit(main())
