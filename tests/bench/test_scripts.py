"""The scripts in ``benchmarks/`` run from a checkout alone: nothing installed, no PYTHONPATH, any current folder."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
SCRIPTS = sorted(path for path in FOLDER.glob("*.py") if path.name != "checkout.py")


def imported(path: Path) -> list[str]:
    """Return the top-level modules that a script imports first, in order."""
    names: list[str] = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            names += [alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(str(node.module).split(".")[0])
    return names


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_what_imports_pymoe_finds_the_checkout_first(path):
    names = imported(path)
    if "pymoe" in names:
        assert "checkout" in names[: names.index("pymoe")]


def test_a_script_runs_from_anywhere(tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [sys.executable, str(FOLDER / "bench_ep.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
