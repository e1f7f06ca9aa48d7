"""A workspace handed out piece by piece: the same requests in the same order get the same arrays, call after call."""

from __future__ import annotations

import math
import weakref
from typing import Any

import numpy as np

from pymoe.device.workspace import ALIGNMENT
from pymoe.errors import ArgumentError, complaint

__all__ = ["Arena", "Arenas", "padded"]

Array = Any


def padded(shape: tuple[int, ...], dtype: Any) -> int:
    """Return the bytes that an array takes of an arena, its alignment included."""
    return -(-math.prod(shape) * np.dtype(dtype).itemsize // ALIGNMENT) * ALIGNMENT


class Arena:
    """Flat memory that `empty` cuts from the front on; making a view costs more than a launch, so views are kept.

    Parameters
    ----------
    memory : array, (bytes,) uint8
        NumPy or CuPy, of alignment 256.
    """

    def __init__(self, memory: Array) -> None:
        self._memory = memory[...]  # a view of our own, so that the caller's array may go while pieces live
        self._pieces: dict[tuple[int, tuple[int, ...], Any], Array] = {}
        self._used = 0

    def rewind(self) -> Arena:
        """Start again from the front; what was handed out before is free to be overwritten."""
        self._used = 0
        return self

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """Return the next array, uninitialised.

        Raises
        ------
        ArgumentError
            The memory is used up: it was planned for another call.
        """
        key = (self._used, shape, dtype)
        piece = self._pieces.get(key)
        if piece is None:
            dtype = np.dtype(dtype)
            nbytes = math.prod(shape) * dtype.itemsize
            if self._used + nbytes > self._memory.shape[0]:
                rule = f"hold {self._used + nbytes} bytes for {shape} {dtype}"
                raise ArgumentError(complaint("Arena.empty", "the workspace", rule, self._memory.shape[0]))
            flat = self._memory[self._used : self._used + nbytes]
            piece = self._pieces[key] = flat.view(dtype).reshape(shape)
        self._used += padded(shape, dtype)
        return piece


class Arenas:
    """The arena of each workspace array that is still alive."""

    def __init__(self) -> None:
        self._arenas: dict[int, tuple[weakref.ref[Any], Arena]] = {}

    def of(self, memory: Array) -> Arena:
        """Return the rewound arena of `memory`, which is known by its identity, not by its address."""
        key = id(memory)
        known = self._arenas.get(key)
        if known is None or known[0]() is not memory:
            # The callback must not outlive what it is for: an array may be given a dead one's identity.
            known = weakref.ref(memory, lambda ref: self._forget(key, ref)), Arena(memory)
            self._arenas[key] = known
        return known[1].rewind()

    def _forget(self, key: int, ref: Any) -> None:
        known = self._arenas.get(key)
        if known is not None and known[0] is ref:
            del self._arenas[key]
