"""Numba on the GPU: kernels in Python, launched on CuPy's current stream without waiting for anything.

Imported inside functions only, since it loads Numba; kernels take ``numba.cuda`` from here.

With ``NUMBA_ENABLE_CUDASIM=1`` in the environment Numba runs the same kernels as Python on the host, a thread of the
host for each thread of the device: slow, but every line can be stepped through, and no GPU is needed.  The kernels then
take NumPy arrays.
"""

from __future__ import annotations

import contextlib
import importlib
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import numba
import numpy as np

from pymoe.device.arrays import namespace
from pymoe.device.tape import current_recorder
from pymoe.errors import ArgumentError, BackendUnavailableError, complaint

__all__ = [
    "SIMULATED", "bits_of", "cuda", "device", "everywhere", "floor", "fma", "kernel", "launch", "product", "require",
    "sqrt",
]  # fmt: skip

Array = Any

SIMULATED = bool(numba.config.ENABLE_CUDASIM)
"""Whether kernels run on the host."""


@contextlib.contextmanager
def numpy_with_row_stack() -> Iterator[None]:
    """Lend NumPy the name ``row_stack``: 2.5 dropped it, numba-cuda 0.30 asks for it once, when this file loads it.

    What NumPy 2.5 warns of meanwhile is numba-cuda's as well.
    """
    missing = not hasattr(np, "row_stack")
    if missing:
        setattr(np, "row_stack", np.vstack)  # noqa: B010  the stubs of 2.5 do not know it
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        if missing:
            delattr(np, "row_stack")  # noqa: B043


with numpy_with_row_stack():
    from numba import cuda

    # Numba has an older package of its own under this name, which also stays where numba-cuda is not active.
    _is_there = not SIMULATED and getattr(cuda, "implementation", None) == "NVIDIA"
    if _is_there:
        importlib.import_module("numba.cuda.np.arrayobj")

_lock = threading.Lock()
_config: Any = None if SIMULATED else importlib.import_module("numba.cuda.dispatcher").config


def device(function: Callable[..., Any]) -> Any:
    """Let kernels call `function`."""
    return cuda.jit(device=True)(function)


def kernel(function: Callable[..., Any]) -> Any:
    """Make `function` a kernel; it is compiled when it is first launched with arguments of some types."""
    return cuda.jit(function)


if SIMULATED:
    sqrt, floor = np.sqrt, np.floor

    @device
    def product(a, b):
        """Return ``a * b``, rounded."""
        return a * b

    def fma(a, b, c):
        """Return ``a * b + c``, rounded once: the sum of an exact product in float64 is rounded to odd first."""
        exact = np.float64(a) * np.float64(b)
        total = exact + np.float64(c)
        back = total - exact
        lost = (exact - (total - back)) + (np.float64(c) - back)
        if np.isfinite(lost) and lost and not int(total.view(np.int64)) & 1:
            total = np.nextafter(total, np.inf if lost > 0 else -np.inf)
        return np.float32(total)

else:
    _libdevice = importlib.import_module("numba.cuda.libdevice")
    # ``a * b + c`` becomes one instruction with one rounding, unless the product is one of its own.
    product, fma, sqrt, floor = _libdevice.fmul_rn, _libdevice.fmaf_rn, _libdevice.fsqrt_rn, _libdevice.floorf


def require(call: str, *arrays: Array) -> None:
    """Refuse arrays that the kernels cannot reach: NumPy's outside the simulator, CuPy's in it.

    Raises
    ------
    ArgumentError
        An array is in the other memory.
    BackendUnavailableError
        numba-cuda is not installed.
    """
    for x in arrays:
        if isinstance(x, np.ndarray) != SIMULATED:
            rule = "be numpy, numba or None for arrays in host memory"
            remedy = "Set NUMBA_ENABLE_CUDASIM=1 to simulate a GPU"
            if SIMULATED:
                rule, remedy = "get NumPy arrays while a GPU is simulated", "Unset NUMBA_ENABLE_CUDASIM"
            raise ArgumentError(complaint(call, "backend", rule, "numba_cuda", remedy))
    if not SIMULATED and not _is_there:
        rule, got = "be installed for the backend numba_cuda", "Numba's own numba.cuda"
        raise BackendUnavailableError(complaint(call, "numba-cuda", rule, got, "Install pymoe[numba-cu13]"))


def launch(function: Any, grid: tuple[int, ...], threads: int | tuple[int, int], *args: Any) -> None:
    """Queue a kernel on CuPy's current stream; an empty grid is no launch.  Numba takes no array without elements.

    Numba would wait for the stream of every array it is handed; told not to, it need not, since all of them are used in
    the order of this one stream.
    """
    if 0 in grid:
        return
    recorder = current_recorder()
    if recorder is not None:
        recorder.refuse()
    if SIMULATED:
        _simulate(function[grid, threads], args)
        return
    import cupy

    stream = cuda.external_stream(cupy.cuda.get_current_stream().ptr)
    with _lock:
        # A small grid is not this user's mistake.
        warns, _config.CUDA_LOW_OCCUPANCY_WARNINGS = _config.CUDA_LOW_OCCUPANCY_WARNINGS, 0
        try:
            configured = function[grid, threads, stream]
        finally:
            _config.CUDA_LOW_OCCUPANCY_WARNINGS = warns
    configured(*(cuda.as_cuda_array(x, sync=False) if isinstance(x, cupy.ndarray) else x for x in args))


def _simulate(configured: Any, args: tuple[Any, ...]) -> None:
    """Run a configured kernel on the host.

    The simulator knows one kernel at a time and contiguous arrays only, and writes to all of them.
    """
    taken = [
        x.copy() if isinstance(x, np.ndarray) and not (x.flags.writeable and x.flags.c_contiguous) else x for x in args
    ]
    with _lock, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of NumPy's scalars, where hardware says nothing
        configured(*taken)
    for given, copy in zip(args, taken, strict=True):
        if copy is not given and given.flags.writeable:
            given[...] = copy


def bits_of(x: Array) -> Array:
    """Return a view of `x` as unsigned integers: Numba has neither bfloat16 nor fp8, so kernels decode them."""
    return x.view(np.dtype(f"u{x.dtype.itemsize}"))


def everywhere(like: Array, value: float, shape: tuple[int, ...], dtype: Any) -> Array:
    """Return an array, beside `like`, that has `value` everywhere: one element of memory, kept for all calls."""
    device = None if isinstance(like, np.ndarray) else like.device.id
    return namespace(like).broadcast_to(_constant(device, value, np.dtype(dtype)), shape)


@lru_cache(maxsize=256)
def _constant(device: int | None, value: float, dtype: np.dtype) -> Array:
    """Return `value` in an array of one element, on the current device where that has a number.

    Never freed, since a captured graph may read it; written before any stream can use it.
    """
    if device is None:
        return np.full(1, value, dtype)
    import cupy

    made = cupy.full(1, value, dtype)
    cupy.cuda.get_current_stream().synchronize()  # once in the life of the process; an error during a capture
    return made
