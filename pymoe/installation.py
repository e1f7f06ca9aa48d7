"""What is installed here: versions, threads, caches and optional libraries, found without loading any of them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import sys

from pymoe import environment
from pymoe._version import __version__
from pymoe.activations import registered_activations

__all__ = ["cpu_features", "installation", "processor", "show_config"]

_REQUIRED = ("numpy", "ml_dtypes", "numba")
_OPTIONAL = {"cupy": ("cupy-cuda13x", "cupy-cuda12x", "cupy"), "cuda.core": ("cuda-core",),
             "numba-cuda": ("numba-cuda",), "mpi4py": ("mpi4py",), "matplotlib": ("matplotlib",)}  # fmt: skip


def installation() -> dict[str, str]:
    """Return name -> version or state, in the order in which it is shown."""
    found = {
        "pymoe": __version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
        "processor": processor(),
        "threads": f"{environment.num_threads()} of {os.cpu_count()} cores (PYMOE_NUM_THREADS)",
        "cache": f"{environment.cache_dir()} (PYMOE_CACHE_DIR)",
        "checked mode": "on" if environment.is_checked() else "off (PYMOE_CHECK=1)",
    }
    for name in _REQUIRED:
        found[name] = _version(name, (name,))
    for name, distributions in _OPTIONAL.items():
        found[name] = _version(name, distributions)
    found["own activations"] = ", ".join(own.name for own in registered_activations()) or "none registered"
    return found


def show_config() -> None:
    """Print what pymoe found on this machine, one line an item; loads no optional library.

    Examples
    --------
    >>> import pymoe
    >>> pymoe.show_config()  # doctest: +SKIP
    """
    found = installation()
    width = max(map(len, found))
    for name, value in found.items():
        print(f"{name:{width}}  {value}")


def processor() -> str:
    """Return the processor's own name where Linux tells it, else what `platform` knows."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """Return the vector features of this processor that matter for speed, as the compiler of the kernels names them."""
    from llvmlite import binding

    wanted = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vnni", "avx512bf16", "avx512fp16", "amx-bf16",
              "amx-int8", "neon", "sve", "sve2", "bf16", "i8mm")  # fmt: skip
    features = binding.get_host_cpu_features()
    return [name for name in wanted if features.get(name)]


def _version(module: str, distributions: tuple[str, ...]) -> str:
    for distribution in distributions:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    parent, _, child = module.partition(".")
    if importlib.util.find_spec(parent) is None or child:  # to look for a child would load its parent
        return "not installed"
    return "installed, version unknown"
