"""Test problems on the GPU: NumPy arrays, configs and keyword arguments to CuPy and back."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np


def to_device(x: Any) -> Any:
    """Return `x` with every NumPy array in it on the current device; fp8 and e8m0 become uint8, which CuPy has."""
    import cupy

    if isinstance(x, np.ndarray):
        narrow = x.dtype.itemsize == 1 and x.dtype.name.startswith("float8")
        return cupy.asarray(np.ascontiguousarray(x.view(np.uint8) if narrow else x))
    if isinstance(x, dict):
        return {name: to_device(value) for name, value in x.items()}
    if isinstance(x, tuple) and not hasattr(x, "_fields"):
        return tuple(to_device(value) for value in x)
    if dataclasses.is_dataclass(x) and not isinstance(x, type) and type(x).__name__.startswith("FusedMoEQuant"):
        changed = {f.name: to_device(getattr(x, f.name)) for f in dataclasses.fields(x) if f.init}
        return dataclasses.replace(x, **changed)
    return x


def to_host(x: Any) -> np.ndarray:
    """Return a CuPy array as NumPy's."""
    return x.get()
