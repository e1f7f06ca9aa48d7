"""A call's kernels on the CPU, recorded once and run again for other arrays of the same kind.

What stands around kernels in Python costs more than a decoding step's arithmetic.  A tape holds the kernels' arguments
as the machine code takes them, with the places where the addresses of the caller's own arrays stand; playing it writes
those addresses and runs all kernels without coming back to Python in between.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from pymoe.device import threads

__all__ = ["CpuRecorder", "CpuTape"]

Array = Any

_FINER = 4
"""Blocks of a tape are that much smaller than those that threads are woken for."""


class _Call(NamedTuple):
    kernel: Any
    length: np.ndarray
    grain: int
    args: tuple[Any, ...]


class CpuRecorder:
    """Notes the kernels that this thread runs while it is active, with their arguments.

    Parameters
    ----------
    arrays : sequence of ndarray
        The caller's; the tape's `play` takes others in their place.
    """

    def __init__(self, arrays: Sequence[Array]) -> None:
        self._arrays = list(arrays)
        self._calls: list[_Call] = []
        self._is_playable = True

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Record what this thread runs until the block ends."""
        threads.record(self)
        try:
            yield
        finally:
            threads.record(None)

    def refuse(self) -> None:
        """Say that something was computed that a tape would not repeat."""
        self._is_playable = False

    def note(self, kernel: Any, count: int | np.ndarray, grain: int, args: tuple[Any, ...]) -> None:
        """Note one kernel over a range of `count`, which is read anew each time where it is an array."""
        where = count if isinstance(count, np.ndarray) else np.array([count], np.int64)
        self._calls.append(_Call(kernel, where, grain, args))

    def tape(self) -> CpuTape | None:
        """Return what was recorded, None where it cannot be played."""
        if not self._is_playable or not self._calls:
            return None
        from pymoe.device._numba_native import Unpackable, packed

        ranges = [(x.ctypes.data, x.ctypes.data + x.nbytes) for x in self._arrays]
        try:
            calls = [(packed(call.kernel, call.args), call) for call in self._calls]
        except Unpackable:
            return None
        patches: list[tuple[np.ndarray, int, int, int]] = []
        for native, _ in calls:
            for at in native.addresses:
                address = int(native.words[at])
                roles = [role for role, (start, stop) in enumerate(ranges) if start <= address < stop]
                if len(roles) > 1:
                    return None  # two arrays that share memory could not be told apart where they do not
                patches.extend((native.words, at, role, address - ranges[role][0]) for role in roles)
        if {patch[2] for patch in patches} != set(range(len(ranges))):
            return None  # a copy of one of the arrays was computed with
        return CpuTape(calls, patches)


class CpuTape:
    """Kernels to run again.  One player at a time; the others are told so."""

    def __init__(self, calls: list[Any], patches: list[tuple[np.ndarray, int, int, int]]) -> None:
        from pymoe.device._numba_crew import Job, Program

        self._held = calls
        self._patches = patches
        self._lock = threading.Lock()
        self._program = Program(
            [
                Job(native.entry, native.words.ctypes.data, call.length.ctypes.data, max(1, call.grain // _FINER))
                for native, call in calls
            ]
        )

    def play(self, addresses: Sequence[int], written: Array) -> Array | None:
        """Run the kernels for arrays at these addresses; return a copy of `written`, one of the tape's own arrays.

        The addresses come in the order in which the recorder was given the arrays.  None where it could not be done:
        somebody else plays, or there was no memory.
        """
        if not self._lock.acquire(blocking=False):
            return None
        try:
            for words, at, role, offset in self._patches:
                words[at] = addresses[role] + offset
            return None if self._program.run() else written.copy()
        finally:
            self._lock.release()
