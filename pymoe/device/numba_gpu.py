"""Numba on the GPU: kernels in Python, launched on CuPy's current stream without waiting for anything.

Imported inside functions only, since it loads Numba.  With ``NUMBA_ENABLE_CUDASIM=1`` in the environment Numba runs the
same kernels as Python on the host, a thread of the host for each thread of the device: slow, but every line can be
stepped through, and no GPU is needed.  The kernels then take NumPy arrays.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numba
import numpy as np

from pymoe.device.arrays import namespace
from pymoe.device.tape import current_recorder
from pymoe.errors import ArgumentError, BackendUnavailableError, complaint

__all__ = ["SIMULATED", "bits_of", "device", "everywhere", "kernel", "launch", "product", "require"]

Array = Any

SIMULATED = bool(numba.config.ENABLE_CUDASIM)
"""Whether kernels run on the host."""


@contextlib.contextmanager
def numpy_with_row_stack() -> Iterator[None]:
    """Lend NumPy the name ``row_stack``: 2.5 dropped it, numba-cuda 0.30 asks for it once, when this file loads it."""
    missing = not hasattr(np, "row_stack")
    if missing:
        np.row_stack = np.vstack  # noqa: NPY201
    try:
        yield
    finally:
        if missing:
            del np.row_stack  # noqa: NPY201


with numpy_with_row_stack():
    from numba import cuda

    if not SIMULATED and importlib.util.find_spec("numba_cuda") is not None:
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

    @device
    def product(a, b):
        """Return ``a * b``, rounded."""
        return a * b

else:
    # ``a * b + c`` becomes one instruction with one rounding; this product stays a product.
    product = importlib.import_module("numba.cuda.libdevice").fmul_rn


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
    if not SIMULATED and importlib.util.find_spec("numba_cuda") is None:
        rule = "be installed for the backend numba_cuda"
        raise BackendUnavailableError(complaint(call, "numba-cuda", rule, "nothing", "Install pymoe[numba-cu13]"))


def launch(function: Any, grid: tuple[int, ...], threads: int | tuple[int, int], *args: Any) -> None:
    """Queue a kernel on CuPy's current stream; an empty grid is no launch.

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
    """Run a configured kernel on the host; the simulator knows one kernel at a time, and writes all arrays back."""
    args = tuple(x.copy() if isinstance(x, np.ndarray) and not x.flags.writeable else x for x in args)
    with _lock, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of NumPy's scalars, where hardware says nothing
        configured(*args)


def bits_of(x: Array) -> Array:
    """Return a view of `x` as unsigned integers: Numba has neither bfloat16 nor fp8, so kernels decode them."""
    return x.view(np.dtype(f"u{x.dtype.itemsize}"))


def everywhere(like: Array, value: float, shape: tuple[int, ...], dtype: Any) -> Array:
    """Return an array, beside `like`, that has `value` everywhere and one element of memory."""
    xp = namespace(like)
    return xp.broadcast_to(xp.full((1,) * len(shape), value, dtype), shape)
