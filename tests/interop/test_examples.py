"""The examples that need another library run, and hold what they claim."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.interop

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("script", "package"), [("pytorch_arrays.py", "torch"), ("jax_arrays.py", "jax")])
def test_example(script, package):
    pytest.importorskip(package, reason=f"{package} is not installed", exc_type=ImportError)
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / script], cwd=ROOT, capture_output=True, text=True, timeout=240,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": "/nonexistent"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "bfloat16" in done.stdout and "float8_e4m3fn weights" in done.stdout
