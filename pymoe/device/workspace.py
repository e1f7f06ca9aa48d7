"""Scratch memory of a layer on the GPU: planned from shapes, one allocation for each stream, kept from call to call.

A graph replays kernels on the addresses that it was captured with, so memory that a capture has seen is never given
back or moved while the workspace lives, and a capture never allocates.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from pymoe.device import stream
from pymoe.errors import ArgumentError, UnsupportedError, complaint

__all__ = ["Workspace", "WorkspacePlan", "Workspaces", "plan_workspace"]

Array = Any
Shape = tuple[int, ...]

ALIGNMENT = 256
"""Bytes: what cudaMalloc promises, two of the 128-byte lines that a tensor map or a 16-byte load may begin at."""

_MAX_STREAMS = 16
_MAX_VIEWS = 64


class Piece(NamedTuple):
    """One array of a workspace: where it begins, in bytes, and what it is."""

    offset: int
    shape: Shape
    dtype: np.dtype


@dataclass(frozen=True, eq=False)
class WorkspacePlan:
    """Where each array of a call lies; equal requests share one plan, so that plans compare by identity."""

    pieces: dict[str, Piece]
    nbytes: int


@lru_cache(maxsize=1024)
def plan_workspace(*requests: tuple[str, Shape, str | np.dtype]) -> WorkspacePlan:
    """Lay arrays out one after another, each at a multiple of 256 bytes.

    Parameters
    ----------
    *requests : tuple
        (name, shape, dtype) of each array.

    Examples
    --------
    >>> plan = plan_workspace(("h", (3, 5), "float32"), ("counts", (4,), "int32"))
    >>> plan.pieces["counts"].offset, plan.nbytes
    (256, 272)
    """
    pieces: dict[str, Piece] = {}
    end = 0
    for name, shape, dtype in requests:
        if name in pieces:
            raise ArgumentError(complaint("plan_workspace", "requests", "name each array once", repr(name)))
        piece = Piece(-(-end // ALIGNMENT) * ALIGNMENT, tuple(shape), np.dtype(dtype))
        pieces[name] = piece
        end = piece.offset + math.prod(shape) * piece.dtype.itemsize
    return WorkspacePlan(pieces, end)


class Workspace:
    """The scratch memory of one layer on one stream, or of one graph.

    Parameters
    ----------
    empty : callable
        ``empty(shape, dtype)`` returns an uninitialised array; default `cupy.empty`, on the stream that is current when
        the workspace grows, which must be the one that uses it.
    capturing : callable
        Says whether that stream records a graph.
    """

    def __init__(
        self, empty: Callable[[Shape, Any], Array] | None = None, capturing: Callable[[], bool] = stream.is_capturing
    ) -> None:
        self._empty = _cupy_empty if empty is None else empty
        self._capturing = capturing
        self._captured = False
        self._buffer: Array = None
        self._counters: Array = None
        self._views: dict[WorkspacePlan, dict[str, Array]] = {}
        self._kept: list[Array] = []

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        held = [self._buffer, self._counters, *self._kept]
        return sum(array.nbytes for array in held if array is not None)

    @property
    def memory(self) -> object:
        """What its arrays lie in; another object once it has grown or was released."""
        return self._buffer

    @property
    def is_captured(self) -> bool:
        """Whether a graph has seen its memory."""
        return self._captured

    def arrays(self, plan: WorkspacePlan) -> dict[str, Array]:
        """Return the arrays of `plan` by name, uninitialised; they share memory with those of every other plan.

        Raises
        ------
        ArgumentError
            The memory is too small and the stream records a graph.
        """
        self._captured = self._captured or self._capturing()
        views = self._views.get(plan)
        if views is None:
            self._reserve(plan.nbytes)
            if len(self._views) >= _MAX_VIEWS:
                self._views.clear()
            views = self._views[plan] = {name: self._carve(piece) for name, piece in plan.pieces.items()}
        return views

    def counters(self, count: int) -> Array:
        """Return `count` int32 counters: zero when they were allocated, and never reset after that.

        A kernel must take what it finds as the start of its epoch, so that a launch that was aborted, or replayed,
        leaves nothing behind that the next one could trip over.
        """
        self._captured = self._captured or self._capturing()
        if self._counters is None or self._counters.shape[0] < count:
            self._refuse_in_capture(4 * count, self._counters)
            self._keep(self._counters)
            self._counters = _zeroed(self._empty((max(count, ALIGNMENT // 4),), np.dtype("int32")))
        return self._counters[:count]

    def release(self) -> None:
        """Give the memory back; graphs captured with it must not be replayed any more."""
        self._views.clear()
        self._kept.clear()
        self._buffer = self._counters = None
        self._captured = False

    def _reserve(self, nbytes: int) -> None:
        held = 0 if self._buffer is None else self._buffer.nbytes - ALIGNMENT
        if self._buffer is not None and nbytes <= held:
            return
        self._refuse_in_capture(nbytes, self._buffer)
        self._keep(self._buffer)
        self._views.clear()
        self._buffer = None  # before the larger one is asked for: both need not fit
        # An allocator may align less than cudaMalloc, so there is room to begin later.
        self._buffer = self._empty((nbytes + ALIGNMENT,), np.dtype("uint8"))

    def _carve(self, piece: Piece) -> Array:
        start = -_address(self._buffer) % ALIGNMENT + piece.offset
        flat = self._buffer[start : start + math.prod(piece.shape) * piece.dtype.itemsize]
        return flat.view(piece.dtype).reshape(piece.shape)

    def _keep(self, array: Array) -> None:
        if array is not None and self._captured:
            self._kept.append(array)

    def _refuse_in_capture(self, nbytes: int, array: Array) -> None:
        if self._capturing():
            found = f"{nbytes} bytes wanted, {0 if array is None else array.nbytes} there"
            remedy = "Call layer.warm_up(M) on this stream, or layer.capture(M)"
            raise ArgumentError(complaint("capture", "the workspace", "be large enough before", found, remedy))


class Workspaces:
    """The workspaces of one layer: one for each stream that calls it, each used by one caller at a time.

    At most 16 streams are remembered; the one that has waited longest gives its memory back, unless a graph needs it.

    Parameters
    ----------
    empty, capturing : callable, optional
        As for `Workspace`.
    current : callable
        Returns what identifies the current stream, and the stream itself, as `pymoe.device.stream.current_stream`.
    """

    def __init__(
        self,
        empty: Callable[[Shape, Any], Array] | None = None,
        capturing: Callable[[], bool] = stream.is_capturing,
        current: Callable[[], tuple[Any, Any]] = stream.current_stream,
    ) -> None:
        self._empty, self._capturing, self._current_stream = empty, capturing, current
        self._lock = threading.Lock()
        self._entries: OrderedDict[Any, _Entry] = OrderedDict()

    @contextlib.contextmanager
    def current(self) -> Iterator[Workspace]:
        """Give the current stream's workspace to the caller until the block ends, when its launches are all queued.

        Raises
        ------
        UnsupportedError
            This thread is inside such a block already: a layer called from its own callbacks.
        """
        entry = self._find()
        if entry.owner == threading.get_ident():
            rule = "not be called from within its own call"
            raise UnsupportedError(complaint("MoELayer", "the layer", rule, "such a call"))
        with entry.lock:
            entry.owner = threading.get_ident()
            try:
                yield entry.workspace
            finally:
                entry.owner = None

    @property
    def nbytes(self) -> int:
        """Bytes held now by all of them."""
        with self._lock:
            return sum(entry.workspace.nbytes for entry in self._entries.values())

    def release(self) -> None:
        """Give all memory back, once the callers that use it now are done."""
        with self._lock:
            entries, self._entries = list(self._entries.values()), OrderedDict()
        for entry in entries:
            with entry.lock:
                entry.workspace.release()

    def detach(self) -> object | None:
        """Forget the current stream's workspace and return it, for a graph to keep as long as it may be replayed."""
        key, _ = self._current_stream()
        with self._lock:
            return self._entries.pop(key, None)

    def _find(self) -> _Entry:
        key, current = self._current_stream()
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                entry = self._entries[key] = _Entry(Workspace(self._empty, self._capturing), current)
                self._forget_old()
            self._entries.move_to_end(key)
            return entry

    def _forget_old(self) -> None:
        """Drop entries beyond the limit; a dropped one frees its memory when its last user lets go of it."""
        for key in list(self._entries)[:-_MAX_STREAMS]:
            if not self._entries[key].workspace.is_captured:
                del self._entries[key]


class _Entry:
    """A workspace, the lock of whoever queues work on it, and its stream, whose handle must not be given to another."""

    def __init__(self, workspace: Workspace, current: Any) -> None:
        self.workspace = workspace
        self.stream = current
        self.lock = threading.Lock()
        self.owner: int | None = None


def _cupy_empty(shape: Shape, dtype: Any) -> Array:
    import cupy

    return cupy.empty(shape, dtype)


def _address(array: Array) -> int:
    return array.data.ptr if hasattr(array.data, "ptr") else array.ctypes.data


def _zeroed(array: Array) -> Array:
    if hasattr(array.data, "memset_async"):
        array.data.memset_async(0, array.nbytes)
    else:
        array[...] = 0
    return array
