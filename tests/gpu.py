"""What tests on a GPU share: whether there is one, and memory full of what an earlier owner left."""

from __future__ import annotations

import importlib.util
import os
from functools import lru_cache

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # JAX would take three quarters of the device's memory

FILLS = (0xFF, 0x7F, 0x00)
"""Bytes to leave in memory: NaN as a float of any width and -1 as an integer; NaN or a large number, and the largest
positive index; zero."""


@lru_cache(maxsize=1)
def why_no_gpu() -> str:
    """Return why tests marked `gpu` cannot run here; empty if they can."""
    if importlib.util.find_spec("cupy") is None:
        return "CuPy is not installed"
    import cupy

    return "" if cupy.is_available() else "CuPy finds no CUDA device"


def why_not_two_gpus() -> str:
    """Return why tests marked `gpu2` cannot run here; empty if they can."""
    if why_no_gpu():
        return why_no_gpu()
    import cupy

    count = cupy.cuda.runtime.getDeviceCount()
    return "" if count > 1 else "CuPy finds one CUDA device only"


@lru_cache(maxsize=8)
def compile_gemms(activation) -> None:
    """Compile every GEMM with a user's activation, many at a time: tests that ask one by one wait a second for each."""
    from pymoe import ActivationConfig
    from pymoe.device.arch import current_arch
    from pymoe.device.jit import compile_all
    from pymoe.device.own_activation import with_activation
    from pymoe.ops.grouped_gemm._cuda_instances import all_instances

    arch, config = current_arch(), ActivationConfig(activation)
    compile_all([with_activation(i.kernel, config) for i in all_instances(arch)], arch, os.cpu_count())


def dirty_pool(fill: int, nbytes: int = 1 << 28) -> None:
    """Fill the next `nbytes` bytes that CuPy's pool hands out on the current stream with the byte `fill`.

    The pool first gives its free blocks back, since best fit would take a small clean one; what is live stays.
    """
    import cupy

    cupy.get_default_memory_pool().free_all_blocks()
    block = cupy.cuda.alloc(nbytes)
    block.memset_async(fill, nbytes, cupy.cuda.get_current_stream())
    del block  # back to the pool, which splits it for whoever comes next on this stream


def filled(shape, dtype, fill: int = 0xFF):
    """Return a CuPy array whose every byte is `fill`: an output that shows where nothing was written."""
    import cupy

    array = cupy.empty(shape, dtype)
    array.data.memset_async(fill, array.nbytes, cupy.cuda.get_current_stream())
    return array
