"""``python -m mfx``."""

import sys

from mfx.command_line import main

if __name__ == "__main__":
    sys.exit(main())
