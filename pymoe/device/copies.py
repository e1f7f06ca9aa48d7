"""Copies between a device and the host beside the user's stream: rows that leave, and rows that come in.

Two streams of their own, one each way, since PCIe carries both ways at once.  Nothing here waits for the whole device:
the user's stream and these two wait for each other by events, and the host waits for single copies.

    user's stream   ── rows ready ─┐                                   ┌─ rows that came in are here ──
    out                            └► gather, copy ► mark: to send     │
    into                                               came in: copy ──┘
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

__all__ = ["Copies", "Mark", "pinned"]

Array = Any
_WORDS = (np.complex128, np.uint64, np.uint32, np.uint16, np.uint8)
"""CuPy gathers element by element: the wider, the faster.  The first is its only type of 16 bytes."""
_PORTABLE = 1
"""cudaHostRegisterPortable: pinned for every device of this process."""


class Mark(Protocol):
    """A place in the order of the copies that leave."""

    @property
    def done(self) -> bool:
        """Whether everything before it is done."""

    def synchronize(self) -> None:
        """Wait for that."""


def pinned(nbytes: int) -> np.ndarray:
    """Return (nbytes,) uint8 of page-locked memory, which is freed with the last array that refers to it."""
    import cupy

    # Not from CuPy's pool, which would keep it for ever: buffers of rows are large.
    memory = cupy.cuda.PinnedMemoryPointer(cupy.cuda.PinnedMemory(nbytes), 0)
    return np.frombuffer(memory, np.uint8, nbytes)


class Copies:
    """Copies of rows of bytes (n, width) uint8 between the current device and the host.

    All arrays are C-contiguous.  Each must be kept until its copy is done.
    """

    def __init__(self) -> None:
        import cupy

        self._cuda = cupy.cuda
        self._out = cupy.cuda.Stream(non_blocking=True)
        self._into = cupy.cuda.Stream(non_blocking=True)

    pinned = staticmethod(pinned)

    def empty(self, n: int, width: int) -> Array:
        """Return (n, width) bytes of the device, for rows to come in once `follow` has been called."""
        import cupy

        return cupy.empty((n, width), np.uint8)

    def follow(self) -> None:
        """Let all later copies wait for what the current stream has queued."""
        event = self._mark(self._cuda.get_current_stream())
        self._out.wait_event(event)
        self._into.wait_event(event)

    def lead(self) -> None:
        """Let the current stream wait for all copies so far."""
        current = self._cuda.get_current_stream()
        current.wait_event(self._mark(self._out))
        current.wait_event(self._mark(self._into))

    def gather(self, rows: Array, order: np.ndarray) -> Array:
        """Return ``rows[order]``, an array for copies that leave; `order` is the host's."""
        import cupy

        # CuPy's pool keeps memory by stream, so an array of this one that is given up is used again in order.
        with self._out:
            out = cupy.empty((len(order), rows.shape[1]), np.uint8)
            if out.size:
                fits = (item for item in _WORDS if _divides(np.dtype(item).itemsize, rows, out))
                word = np.dtype(next(fits))
                cupy.take(rows.view(word), cupy.asarray(order), axis=0, out=out.view(word))
        return out

    def within(self, rows: Array, out: Array) -> None:
        """Copy rows from the device to the device, in the order of those that leave."""
        if out.size:
            out.data.copy_from_device_async(rows.data, out.nbytes, self._out)

    def to_host(self, rows: Array, out: np.ndarray) -> None:
        """Copy rows to the host."""
        self._copy(out.ctypes.data, rows.data.ptr, out.nbytes, self._cuda.runtime.memcpyDeviceToHost, self._out)

    def to_device(self, rows: np.ndarray, out: Array) -> None:
        """Copy rows to the device."""
        self._copy(out.data.ptr, rows.ctypes.data, out.nbytes, self._cuda.runtime.memcpyHostToDevice, self._into)

    def _copy(self, target: int, source: int, nbytes: int, kind: int, stream: Any) -> None:
        if nbytes:
            self._cuda.runtime.memcpyAsync(target, source, nbytes, kind, stream.ptr)

    def left(self) -> Mark:
        """Mark the copies so far that leave."""
        return self._mark(self._out)

    def came(self) -> Mark:
        """Mark the copies so far that come in."""
        return self._mark(self._into)

    def _mark(self, stream: Any) -> Any:
        event = self._cuda.Event(disable_timing=True)
        event.record(stream)
        return event

    def register(self, memory: np.ndarray) -> None:
        """Pin memory that is there already."""
        self._cuda.runtime.hostRegister(memory.ctypes.data, memory.nbytes, _PORTABLE)

    def unregister(self, memory: np.ndarray) -> None:
        """Take back `register`, once every copy is done."""
        self._out.synchronize()
        self._into.synchronize()
        self._cuda.runtime.hostUnregister(memory.ctypes.data)


def _divides(size: int, *arrays: Array) -> bool:
    return all(x.shape[1] % size == 0 and x.data.ptr % size == 0 for x in arrays)
