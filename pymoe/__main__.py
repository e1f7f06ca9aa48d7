"""``python -m pymoe``."""

from __future__ import annotations

import sys

from pymoe.cli import main

if __name__ == "__main__":
    sys.exit(main())
