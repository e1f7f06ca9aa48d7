"""Where and with what a run was measured."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pymoe import environment, installation
from pymoe._version import __version__

__all__ = ["blas_threads", "cores", "describe", "load", "same_conditions"]

_LIBRARIES = ("numpy", "ml_dtypes", "numba", "llvmlite", "torch", "transformers", "jax", "jaxlib")
_ROOT = Path(__file__).parents[2]


def describe() -> dict[str, Any]:
    """Return device, versions, commit and threads of this process."""
    return {
        "device": {
            "processor": installation.processor(),
            "cores": os.cpu_count(),
            "features": installation.cpu_features(),
            "last_level_cache_bytes": _last_level_cache(),
            "platform": platform.platform(),
        },
        "load_before": round(load(), 2),
        "threads": environment.num_threads(),
        "versions": {"pymoe": __version__, "python": platform.python_version(), "blas": _blas()}
        | {name: version for name in _LIBRARIES if (version := _version(name))},
        "commit": _git("rev-parse", "HEAD"),
        "sources": _sources(),
    }


def load() -> float:
    """Return how many processes ran or waited to run here in the last minute."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def cores() -> int:
    """Return the cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def blas_threads(threads: int) -> Iterator[int]:
    """Hold NumPy's BLAS to `threads` and give the number that it then has; all cores where threadpoolctl is missing."""
    if importlib.util.find_spec("threadpoolctl") is None:
        yield cores()
        return
    from threadpoolctl import threadpool_info, threadpool_limits

    with threadpool_limits(threads, "blas"):
        yield max((pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"), default=1)


def same_conditions(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Return the names of the conditions in which two runs differ; the commit counts by the library's sources alone."""
    names = ("device", "threads", "versions", "sources", "seed", "pace")
    return [name for name in names if one.get(name) != other.get(name)]


def _sources() -> str | None:
    """Return git's name of the library's folder, and a digest of what is not committed there; None outside git."""
    tree = _git("rev-parse", "HEAD:pymoe")
    if tree is None:
        return None
    changes = _git("diff", "HEAD", "--", "pymoe") or ""
    return tree + ("+" + hashlib.sha256(changes.encode()).hexdigest()[:12] if changes else "")


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=_ROOT, capture_output=True, text=True, errors="replace")
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _blas() -> str:
    """Return name and version of the BLAS that NumPy was built with."""
    found = np.show_config(mode="dicts")
    blas = found.get("Build Dependencies", {}).get("blas", {}) if isinstance(found, dict) else {}
    return f"{blas.get('name', 'unknown')} {blas.get('version', '')}".strip()


def _last_level_cache() -> int | None:
    """Return the bytes of the largest cache that Linux reports for the first core (a shared host has others in it)."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text.rstrip("KM")) * {"K": 1 << 10, "M": 1 << 20}.get(text[-1], 1))
    return max(sizes, default=None)
