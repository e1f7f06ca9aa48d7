"""Arrays at the edge of the library: what is let in, and in which form the stages see it."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from pymoe.errors import DTypeError, UnsupportedError, complaint

Array = Any

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
HIDDEN_DTYPES = (np.dtype("float32"), np.dtype("float16"), BFLOAT16)


def _known(*names: str) -> frozenset[np.dtype]:
    """Return the ml_dtypes among `names`; compared as dtypes, since a dtype's name is built anew each time."""
    return frozenset(np.dtype(getattr(ml_dtypes, name)) for name in names if hasattr(ml_dtypes, name))


_REFUSED_NARROW = _known("float8_e5m2", "float8_e5m2fnuz", "float8_e4m3fnuz", "float8_e4m3b11fnuz", "float8_e3m4")
_REFUSED_PACKED = _known("int4", "uint4", "int2", "uint2", "float4_e2m1fn", "float6_e2m3fn", "float6_e3m2fn")


def as_numpy(call: str, argument: str, x: Any) -> np.ndarray:
    """Return `x` as a plain NumPy view, or refuse it by name.

    Raises
    ------
    DTypeError
        Not an array (Python lists and scalars included), a masked array, an object or structured array, a foreign
        byte order, or a dtype that pymoe never takes.
    UnsupportedError
        An array of another library; they enter by DLPack once that backend has landed.
    """
    if isinstance(x, np.ma.MaskedArray):
        remedy = "Use numpy.ma.filled first"
        raise DTypeError(complaint(call, argument, "be a plain array", "a masked array", remedy))
    if isinstance(x, np.ndarray):
        x = np.asarray(x)
    elif hasattr(x, "__dlpack__") or hasattr(x, "__cuda_array_interface__"):
        kind = f"{type(x).__module__}.{type(x).__name__}"
        raise UnsupportedError(complaint(call, argument, "be a NumPy array", kind, "Use numpy.asarray on a host copy"))
    else:
        raise DTypeError(complaint(call, argument, "be a NumPy array", type(x).__name__, "Use numpy.asarray"))
    dtype = x.dtype
    if dtype.hasobject or dtype.fields is not None or dtype.kind in "SUmMc":
        raise DTypeError(complaint(call, argument, "hold real numbers", dtype))
    if not dtype.isnative:
        raise DTypeError(
            complaint(call, argument, "be in native byte order", dtype.str, "Use x.astype(x.dtype.newbyteorder('='))")
        )
    if dtype in _REFUSED_PACKED:
        raise DTypeError(complaint(call, argument, "pack narrow codes in uint8", dtype.name, "See docs/shapes"))
    if dtype in _REFUSED_NARROW:
        raise UnsupportedError(complaint(call, argument, "be e4m3fn where it is fp8", dtype.name))
    return x


def is_float(dtype: np.dtype) -> bool:
    """Return whether `dtype` is float16, bfloat16, float32 or float64 (NumPy does not count it as floating)."""
    return dtype == BFLOAT16 or dtype.kind == "f"


def is_integer(dtype: np.dtype) -> bool:
    """Return whether `dtype` is a signed or unsigned integer; bool is not."""
    return dtype.kind in "iu"


def as_float32(x: np.ndarray) -> np.ndarray:
    """Return `x` as contiguous float32; a view where it already is."""
    with np.errstate(all="ignore"):
        return np.ascontiguousarray(x, dtype=np.float32)
