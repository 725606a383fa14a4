"""``python -m microlora`` is ``microlora``."""

import sys

from microlora.cli import main

if __name__ == "__main__":
    sys.exit(main())
