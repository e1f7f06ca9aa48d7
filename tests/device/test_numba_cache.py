"""The disk cache of compiled kernels: used where it is ours alone, off anywhere else (reliability K1, K2, J3, J6)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = (
    "import numpy as np, pymoe; x = np.eye(4, dtype=np.float32); w = np.ones((2, 4, 4), np.float32);"
    "print(pymoe.fused_experts(x, w, w[:, :, :2].copy(), np.ones((4, 1)), np.zeros((4, 1), int)).sum())"
)


def run(cache, **environment):
    env = {**os.environ, "PYMOE_CACHE_DIR": str(cache), **environment}
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, cwd=ROOT, env=env, timeout=200)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.suffix in (".nbi", ".nbc"))


def test_kernels_are_kept_in_a_private_folder_of_this_version(tmp_path):
    cache = tmp_path / "cache"
    first = run(cache)
    kept = files(cache)
    assert kept and all("numba-" in str(path) for path in kept)
    assert os.stat(cache).st_mode & 0o077 == 0
    times = [path.stat().st_mtime_ns for path in kept]
    assert run(cache) == first
    assert files(cache) == kept and [path.stat().st_mtime_ns for path in kept] == times


@pytest.mark.parametrize("kind", ["K2_world_writable", "K2_symlink", "J3_a_file", "J3_read_only_parent"])
def test_an_unsafe_or_impossible_cache_is_off_and_the_answer_right(tmp_path, kind):
    cache = tmp_path / "cache"
    if kind == "K2_world_writable":
        cache.mkdir()
        cache.chmod(0o777)
    elif kind == "K2_symlink":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        cache.symlink_to(tmp_path / "elsewhere")
    elif kind == "J3_a_file":
        cache.write_text("not a folder")
    else:
        cache = Path("/proc/self/pymoe")
    assert run(cache) > 0
    assert files(tmp_path) == []
