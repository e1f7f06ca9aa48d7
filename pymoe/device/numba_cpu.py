"""Numba on the CPU: kernels that release the GIL, and a disk cache only where nobody else can write.

Imported inside functions only, since it loads Numba.  Kernels are serial: threads are `pymoe.device.threads`, because
Numba's own threading layers are not all safe between threads or after a fork.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding
import numba
from numba.core import caching

from pymoe import environment
from pymoe._version import __version__
from pymoe.device.private import private_folder

__all__ = ["jit"]


def jit(function: Callable[..., Any] | None = None, *, fastmath: Any = False, inline: str = "never") -> Any:
    """Compile a function for the CPU on its first call, without the GIL; as decorator with or without arguments.

    IEEE arithmetic unless `fastmath` names what may be relaxed.
    """
    if function is None:
        return lambda f: jit(f, fastmath=fastmath, inline=inline)
    compiled = numba.njit(nogil=True, error_model="numpy", fastmath=fastmath, inline=inline)(function)
    folder = _cache_folder()
    if folder is not None:
        locator = type("PymoeLocator", (_Locator,), {"folder": str(folder)})
        impl = type("PymoeCacheImpl", (caching.CompileResultCacheImpl,), {"_locator_classes": [locator]})
        cache = type("PymoeCache", (caching.FunctionCache,), {"_impl_class": impl})
        try:
            compiled._cache = cache(function)
        except RuntimeError:  # no source file to key the cache by
            environment.logger.debug("numba cache off for %s", function.__qualname__)
    return compiled


class _Locator(caching.UserProvidedCacheLocator):
    """A cache locator with a fixed folder; the index is keyed by the source file's time and size."""

    folder = ""

    def __init__(self, py_func: Any, py_file: str) -> None:
        self._py_file = py_file
        self._lineno = py_func.__code__.co_firstlineno
        self._cache_path = os.path.join(self.folder, hashlib.sha256(py_file.encode()).hexdigest()[:16])

    @classmethod
    def from_function(cls, py_func: Any, py_file: str) -> Any:
        if not os.path.exists(py_file):
            return None
        locator = cls(py_func, py_file)
        try:
            locator.ensure_cache_path()
        except OSError:
            return None
        return locator

    def ensure_cache_path(self) -> None:
        os.makedirs(self._cache_path, mode=0o700, exist_ok=True)


@lru_cache(maxsize=1)
def _cache_folder() -> Path | None:
    """Return the folder of these sources and this processor, or None where loading from it would not be safe.

    Numba's cache is a pickle, so whoever can write the folder can run code here.
    """
    # Numba keys an entry by its own file only, but kernels inline functions of others.
    sources = sorted(Path(__file__).parents[1].rglob("*.py"))
    stamps = [(path.name, path.stat().st_mtime_ns, path.stat().st_size) for path in sources]
    features = llvmlite.binding.get_host_cpu_features().flatten()
    machine = f"{llvmlite.binding.get_host_cpu_name()} {features} {numba.__version__} {llvmlite.__version__} {stamps}"
    digest = hashlib.sha256(machine.encode()).hexdigest()[:16]
    try:
        return private_folder(f"numba-{__version__}-{digest}")
    except OSError as error:
        environment.logger.warning("numba cache off: %s", error)
    return None
