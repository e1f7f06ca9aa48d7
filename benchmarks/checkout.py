"""Imported by the other scripts: the pymoe they measure is the one of this checkout, installed or not."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
