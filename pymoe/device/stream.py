"""CuPy's current device and stream: asked for in one place, and left as they were."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from pymoe.errors import ArgumentError, complaint

__all__ = ["current_stream", "is_capturing", "one_device", "using_device"]

Array = Any

_PER_THREAD_STREAM = 2
"""cudaStreamPerThread: one handle that is another stream in each thread."""


def is_capturing() -> bool:
    """Return whether CuPy's current stream records a graph; a recording that an error has spoilt counts as one."""
    import cupy

    try:
        return bool(cupy.cuda.get_current_stream().is_capturing())
    except cupy.cuda.runtime.CUDARuntimeError:
        # The default stream, while another stream's capture forbids its use; CUDA refuses the launch itself.
        return False
    except RuntimeError:  # CuPy's word for cudaStreamCaptureStatusInvalidated
        return True


def current_stream() -> tuple[tuple[int, ...], Any]:
    """Return what identifies the current stream, and the CuPy stream to keep as long as that is in use.

    The first is its device, its handle and, where the handle alone is not enough, the thread.  A handle may be given to
    a new stream once its own is destroyed.
    """
    import cupy

    current = cupy.cuda.get_current_stream()
    device, handle = cupy.cuda.runtime.getDevice(), current.ptr
    key = (device, handle, threading.get_ident()) if handle == _PER_THREAD_STREAM else (device, handle)
    return key, current


def one_device(call: str, arrays: Mapping[str, Array]) -> int:
    """Return the device on which all of the CuPy arrays are.

    Parameters
    ----------
    call : str
        Named in the error.
    arrays : mapping of str to CuPy array
        By the caller's names for them; at least one.

    Raises
    ------
    ArgumentError
        Two of them are on different devices; names both.
    """
    (first, expected), *others = ((name, x.device.id) for name, x in arrays.items())
    for name, device in others:
        if device != expected:
            rule = f"be on the device of {first}, {expected}"
            remedy = "Copy one of them: with cupy.cuda.Device(n): cupy.array(x)"
            raise ArgumentError(complaint(call, name, rule, f"device {device}", remedy))
    return expected


@contextlib.contextmanager
def using_device(device: int) -> Iterator[None]:
    """Make `device` CuPy's current one, with its own current stream, and restore what was current before."""
    from cupy.cuda import Device, runtime

    if runtime.getDevice() == device:
        yield
        return
    with Device(device):
        yield
