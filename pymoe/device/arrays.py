"""Arrays at the edge of the library: what is let in, and in which form the stages see it."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from pymoe.device import dlpack
from pymoe.errors import BackendUnavailableError, DTypeError, PymoeError, UnsupportedError, complaint

Array = Any

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
HIDDEN_DTYPES = (np.dtype("float32"), np.dtype("float16"), BFLOAT16)


def _known(*names: str) -> frozenset[np.dtype]:
    """Return the ml_dtypes among `names`; compared as dtypes, since a dtype's name is built anew each time."""
    return frozenset(np.dtype(getattr(ml_dtypes, name)) for name in names if hasattr(ml_dtypes, name))


_HOST_DEVICES = (1, 3)
"""kDLCPU and kDLCUDAHost, pinned memory."""
_EXCHANGED = ("bfloat16", "float8_e4m3fn", "float8_e8m0fnu")
_PLAIN = frozenset((*HIDDEN_DTYPES, *(np.dtype(name) for name in ("int8", "uint8", "int32", "int64"))))
"""What nearly every array is: native, and taken everywhere.  Membership costs far less than the full check."""
_REFUSED_NARROW = _known("float8_e5m2", "float8_e5m2fnuz", "float8_e4m3fnuz", "float8_e4m3b11fnuz", "float8_e3m4")
_REFUSED_PACKED = _known("int4", "uint4", "int2", "uint2", "float4_e2m1fn", "float6_e2m3fn", "float6_e3m2fn")


def is_cuda(x: Any) -> bool:
    """Return whether `x` is a CuPy array; loads nothing."""
    cupy = sys.modules.get("cupy")
    return cupy is not None and isinstance(x, cupy.ndarray)


def namespace(x: Any) -> Any:
    """Return the module, NumPy or CuPy, whose functions make arrays like `x`."""
    return np if isinstance(x, np.ndarray) else sys.modules["cupy"]


def module_of(device: str) -> Any:
    """Return NumPy for "cpu", CuPy for "cuda"."""
    return np if device == "cpu" else importlib.import_module("cupy")


def as_numpy(call: str, argument: str, x: Any) -> np.ndarray:
    """Return `x`, an array in host memory, as a NumPy view; raises as `as_array` does, and for device arrays too."""
    found = as_array(call, argument, x)
    if isinstance(found, np.ndarray):
        return found
    rule = "be in host memory like the rest of this call"
    raise UnsupportedError(complaint(call, argument, rule, _kind(x), "Use cupy.asnumpy, or CuPy arrays throughout"))


def as_array(call: str, argument: str, x: Any) -> Any:
    """Return `x` as a NumPy or CuPy array that shares its memory, or refuse it by name.

    Parameters
    ----------
    x : array
        NumPy, CuPy, or any array that exports DLPack (PyTorch, JAX), bfloat16 and fp8 included.  fp8 comes back as its
        ml_dtypes dtype on the host and as uint8 on a device, since CuPy has no fp8.

    Raises
    ------
    DTypeError
        Not an array (Python lists and scalars included), a masked, object or structured array, a foreign byte order,
        a dtype that pymoe never takes, a traced array, or a tensor that needs gradients.
    UnsupportedError
        A float8 format other than e4m3fn and e8m0fnu.
    BackendUnavailableError
        An array on a CUDA device while CuPy is not installed.
    """
    if type(x) is np.ndarray and x.dtype in _PLAIN:
        return x
    if is_cuda(x):
        return x if x.dtype in _PLAIN else _accepted(call, argument, x)
    if isinstance(x, np.ma.MaskedArray):
        remedy = "Use numpy.ma.filled first"
        raise DTypeError(complaint(call, argument, "be a plain array", "a masked array", remedy))
    if not isinstance(x, np.ndarray):
        x = _foreign(call, argument, x)
    return _accepted(call, argument, x if is_cuda(x) else np.asarray(x))


def as_given(result: Any, given: Any) -> Any:
    """Return `result`, NumPy or CuPy, as an array of the package of `given`; the memory is shared, never copied."""
    if not isinstance(result, np.ndarray) and not is_cuda(result):  # part of an answer that is no array
        return tuple(as_given(part, given) for part in result) if isinstance(result, tuple) else result
    package = type(given).__module__.partition(".")[0]
    if package == "torch":
        return sys.modules["torch"].from_dlpack(dlpack.Lent(result))
    if package in ("jax", "jaxlib"):
        return importlib.import_module("jax.dlpack").from_dlpack(dlpack.Lent(result))
    return result


def as_it_came(out: Any) -> Any:
    """Return an `out` that has been written; on a device the current stream of its library waits until it has.

    An array that is handed over is ordered by handing it over; this one already belongs to its library.
    """
    foreign = not isinstance(out, np.ndarray) and not is_cuda(out) and hasattr(out, "__dlpack_device__")
    if foreign and out.__dlpack_device__()[0] not in _HOST_DEVICES:
        as_given(as_array("out", "out", out), out)
    return out


def answers_in_kind(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let `function` answer with arrays of its first argument's package; a given `out` is returned as it came."""
    first = next(iter(inspect.signature(function).parameters))

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        answer = function(*args, **kwargs)
        given = args[0] if args else kwargs[first]
        if kwargs.get("out") is not None:
            return as_it_came(kwargs["out"])
        if isinstance(answer, tuple):
            return tuple(as_given(part, given) for part in answer)
        return as_given(answer, given)

    return call


def to_host(x: Any) -> np.ndarray:
    """Return `x`, NumPy or CuPy, in host memory; waits for the current stream and for nothing else."""
    return x.get() if is_cuda(x) else x


def beside(x: Any, host: np.ndarray) -> Any:
    """Return an array of the host's memory where `x`, NumPy or CuPy, is."""
    return namespace(x).asarray(host)


def device_of(x: Any) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which the device of `x` is the current one; on the host it does nothing."""
    return x.device if is_cuda(x) else contextlib.nullcontext()


def _foreign(call: str, argument: str, x: Any) -> Any:
    """Return an array of another library as a NumPy or CuPy view of the same memory."""
    if not hasattr(x, "__dlpack__") or not hasattr(x, "__dlpack_device__"):
        if hasattr(x, "__cuda_array_interface__"):
            return _cupy(call, argument, x).asarray(x)
        remedy = "Use jax.pure_callback inside jax.jit" if "Tracer" in type(x).__name__ else "Use numpy.asarray"
        raise DTypeError(complaint(call, argument, "be a NumPy, CuPy or DLPack array", type(x).__name__, remedy))
    if getattr(x, "requires_grad", False):
        rule = "need no gradient: pymoe computes none"
        raise DTypeError(complaint(call, argument, rule, f"{_kind(x)} with requires_grad", "Use x.detach()"))
    name = dlpack.dtype_name(x)
    if name is not None and name not in _EXCHANGED:
        raise UnsupportedError(complaint(call, argument, "be e4m3fn where it is fp8", name, "View codes as uint8"))
    lender = dlpack.Renamed(x)
    try:
        if x.__dlpack_device__()[0] in _HOST_DEVICES:
            return dlpack.from_unsigned(np.from_dlpack(lender), lender.renamed)
        cupy = _cupy(call, argument, x)
        raw = cupy.from_dlpack(lender)
    except PymoeError:
        raise
    except Exception as error:
        rule = "be a concrete, dense array that exports DLPack"
        got = f"{_kind(x)} ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
        raise DTypeError(complaint(call, argument, rule, got)) from error
    return raw.view(BFLOAT16) if lender.renamed == "bfloat16" else raw


def _cupy(call: str, argument: str, x: Any) -> Any:
    """Return CuPy, or say how to get it."""
    try:
        import cupy
    except ImportError as error:
        rule = "be in host memory where CuPy is not installed"
        raise BackendUnavailableError(
            complaint(call, argument, rule, _kind(x), "Install pymoe[cu13] or pymoe[cu12]")
        ) from error
    return cupy


def _kind(x: Any) -> str:
    return f"{type(x).__module__}.{type(x).__name__}"


def _accepted(call: str, argument: str, x: Any) -> Any:
    """Return `x`, NumPy or CuPy, unless its dtype is one that no stage can read."""
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
    if x.dtype == np.float32 and x.flags.c_contiguous:
        return x
    with np.errstate(all="ignore"):
        return np.ascontiguousarray(x, dtype=np.float32)
