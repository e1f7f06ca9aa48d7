"""The disk cache of compiled kernels: used where it is ours alone, off anywhere else (reliability K1, K2, J3, J6)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# One small kernel: compiling a whole layer takes seconds in every process.
CODE = (
    "import numpy as np; from pymoe.ops import permute;print(permute(np.array([[2, 0], [2, -1]]), 3).row_to_slot.sum())"
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


def test_J1_cold_processes_share_one_cache(tmp_path):
    """Eight processes compile and publish the same kernels at once."""
    env = {**os.environ, "PYMOE_CACHE_DIR": str(tmp_path / "cache")}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", CODE], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, env=env
        )
        for _ in range(8)
    ]
    answers = set()
    for process in started:
        out, err = process.communicate(timeout=280)
        assert process.returncode == 0, err.decode()
        answers.add(out)
    assert len(answers) == 1


def test_J2_a_cache_that_vanishes_between_compiling_and_saving(tmp_path):
    code = (
        "import shutil, os, importlib, numpy as np, pymoe;"
        "importlib.import_module('pymoe.ops.permute._numba');"
        "shutil.rmtree(os.environ['PYMOE_CACHE_DIR']);"
        "print(pymoe.ops.permute(np.array([[2, 0], [2, -1]]), 3).row_to_slot.sum())"
    )
    env = {**os.environ, "PYMOE_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=env, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "3"


def test_J6_another_version_or_other_sources_use_another_folder(tmp_path, monkeypatch):
    from pymoe.device import numba_cpu

    monkeypatch.setenv("PYMOE_CACHE_DIR", str(tmp_path / "cache"))
    folder = numba_cpu._cache_folder.__wrapped__
    first = folder()
    assert folder() == first
    monkeypatch.setattr(numba_cpu, "__version__", "99.0")
    second = folder()
    assert second != first
    sources = tmp_path / "pymoe" / "device"
    sources.mkdir(parents=True)
    (sources / "numba_cpu.py").write_text("changed")
    monkeypatch.setattr(numba_cpu, "__file__", str(sources / "numba_cpu.py"))
    assert folder() not in (first, second)
