"""The command line: ``python -m pymoe`` and the script ``pymoe``."""

from pymoe.cli.main import main

__all__ = ["main"]
