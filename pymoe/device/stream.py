"""CuPy's current device and stream: asked for in one place, and left as they were."""

from __future__ import annotations

import threading
from typing import Any

__all__ = ["current_stream", "is_capturing"]

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
