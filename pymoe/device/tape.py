"""A call's launches, recorded once and queued again for other arrays of the same kind.

What a launch costs in Python is mostly finding out again what follows from shapes: checks, plans, views, packing.  A
tape holds the outcome, the kernels' parameters as bytes, and the places in them where the addresses of the caller's own
arrays stand.  Playing it writes those addresses and queues the kernels through the driver, in order, on one stream.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Launch", "Recorder", "Tape", "current_recorder"]

Array = Any

_thread = threading.local()


def current_recorder() -> Recorder | None:
    """Return the recorder of this thread, None outside a recording."""
    return getattr(_thread, "recorder", None)


class Launch(NamedTuple):
    """One launch as the driver takes it, and its parameters: what each is, 8-byte words, and where each begins."""

    fixed: tuple[int, ...]
    words: np.ndarray
    addresses: np.ndarray


class Recorder:
    """Notes the launches of this thread while it is active, and keeps alive all memory that they were given.

    Parameters
    ----------
    arrays : sequence of CuPy arrays
        The caller's; the tape's `play` takes the addresses of others in their place.
    """

    def __init__(self, arrays: Sequence[Array]) -> None:
        self._ranges = [(x.data.ptr, x.data.ptr + x.nbytes) for x in arrays]
        self._roles = {start: role for role, (start, _) in enumerate(self._ranges)}
        # Two arguments at one address could not be told apart when they differ.
        self._playable = len(self._roles) == len(self._ranges) and all(stop > start for start, stop in self._ranges)
        self._kept: list[Any] = []
        self._launches: list[Launch] = []
        self._patches: list[tuple[np.ndarray, int, int]] = []

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Record what this thread launches until the block ends."""
        import cupy

        allocate = cupy.cuda.get_allocator()

        def keep(nbytes: int) -> Any:
            pointer = allocate(nbytes)
            self._kept.append(pointer)
            return pointer

        _thread.recorder = self
        try:
            with cupy.cuda.using_allocator(keep):
                yield
        finally:
            _thread.recorder = None

    def holds(self, address: int) -> bool:
        """Return whether an address lies in one of the caller's arrays: what is made of it holds for this call only."""
        return any(start <= address < stop for start, stop in self._ranges)

    def refuse(self) -> None:
        """Say that something was queued that a tape cannot repeat."""
        self._playable = False

    def note(
        self, function: Any, grid: Any, block: Any, shared_bytes: int, args: Sequence[Any], leading_pointers: int
    ) -> None:
        """Note one launch; a structure among `args` begins with `leading_pointers` addresses."""
        words: list[int] = []
        starts: list[int] = []
        pointers: list[int] = []
        for arg in args:
            starts.append(len(words))
            if hasattr(arg, "data") and hasattr(arg.data, "ptr"):
                pointers.append(len(words))
                words.append(arg.data.ptr)
                continue
            content = arg.to_bytes(8, "little", signed=True) if isinstance(arg, int) else arg.tobytes()
            if isinstance(arg, np.void):
                pointers.extend(range(len(words), len(words) + leading_pointers))
            padded = content + bytes(-len(content) % 8)
            words.extend(np.frombuffer(padded, np.uint64).tolist())
        cells = np.array(words, np.uint64)
        self._find_roles(cells, pointers)
        addresses = cells.ctypes.data + 8 * np.array(starts, np.uint64)
        self._launches.append(Launch((function.ptr, *grid, *block, shared_bytes), cells, addresses))

    def _find_roles(self, cells: np.ndarray, pointers: list[int]) -> None:
        for at in pointers:
            address = int(cells[at])
            role = self._roles.get(address)
            if role is not None:
                self._patches.append((cells, at, role))
            elif any(start < address < stop for start, stop in self._ranges):
                self._playable = False  # part of a caller's array: where it lies in another one is not known

    def tape(self) -> Tape | None:
        """Return what was recorded, None where it cannot be played."""
        return Tape(self._launches, self._patches, self._kept) if self._playable and self._launches else None


class Tape:
    """Launches to queue again.  Not thread-safe: one player at a time."""

    def __init__(self, launches: list[Launch], patches: list[tuple[np.ndarray, int, int]], kept: list[Any]) -> None:
        from cupy.cuda import driver

        self._launch = driver.launchKernel
        self._queue = [(launch.fixed, launch.addresses.ctypes.data) for launch in launches]
        self._patches = patches
        self._held = (launches, kept)

    def __len__(self) -> int:
        return len(self._queue)

    def play(self, pointers: Sequence[int], device: int, stream: int) -> None:
        """Queue the launches on a stream of the current device, for arrays at these addresses.

        The addresses come in the order in which the recorder was given the arrays.
        """
        _enter_context(device)
        for cells, at, role in self._patches:
            cells[at] = pointers[role]
        launch = self._launch
        for fixed, addresses in self._queue:
            launch(*fixed, stream, addresses, 0)


def _enter_context(device: int) -> None:
    """Make the device's context this thread's: the driver, unlike the runtime, does not do so at the first launch."""
    if device not in _thread.__dict__.setdefault("contexts", set()):
        from cupy.cuda import runtime

        runtime.setDevice(device)
        _thread.contexts.add(device)
