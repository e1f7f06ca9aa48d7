"""Rows into the receivers' parts of a shared window, and a look at what others stored, each in one call without Python.

Behind its rows a rank writes the number of the transfer to its word; whoever reads that number finds the rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pymoe.device._numba_words import copy, get, pause, publish
from pymoe.device.numba_cpu import jit

__all__ = ["Kernels", "desk"]

Array = Any
_RANK, _BYTES, _RANKS = range(3)
"""Of a desk: this rank, bytes of a part, then address of the part and address of the word of each rank."""


def desk(rank: int, parts: list[Array], words: list[int]) -> Array:
    """Return what the kernels need of a window: this rank, each rank's part (bytes,) and the address of its word."""
    addresses = [address for part, word in zip(parts, words, strict=True) for address in (part.ctypes.data, word)]
    return np.array([rank, len(parts[0]), *addresses], np.int64)


@jit
def _store(desk, rows, order, send, start, first, number):
    """Store a payload at every rank, then write `number` to this rank's word, unless it is 0; return whether all fits.

    Parameters
    ----------
    desk : int
        Address of what `desk` returned.
    rows : ndarray, (n, b), uint8
    order : ndarray, (sum of send,), int64
        Row of each one sent, by destination; empty where they lie so.
    send : ndarray, (R,), int64
        Rows for each rank.
    start : ndarray, (R,), int64
        First row of this rank's among those of each rank.
    first : int
        Bytes of a part before the payload's.
    number : int
    """
    ranks, last, width = len(send), len(rows) - 1, rows.shape[1]
    source, ordered = rows.ctypes.data, len(order) != 0
    own, size, there = get(desk + 8 * _RANK), get(desk + 8 * _BYTES), desk + 8 * _RANKS
    begin, total, room = 0, 0, (size - first) // max(width, 1)
    for rank in range(ranks):
        begin += send[rank] if rank < own else 0
        total += send[rank]
        # Counts are other ranks' words: what they get wrong must not reach memory of somebody else.
        if send[rank] < 0 or start[rank] < 0 or start[rank] > room or send[rank] > room - start[rank]:
            return False
    if total > (len(order) if ordered else len(rows)):
        return False
    # This rank first, then the next ones: so that not everybody starts with rank 0.
    for step in range(ranks):
        rank = (own + step) % ranks
        if rank == 0:
            begin = 0
        target = get(there + 16 * rank) + first + start[rank] * width
        if ordered:
            for row in order[begin : begin + send[rank]]:
                copy(target, source + min(max(row, 0), last) * width, width)
                target += width
        else:
            copy(target, source + begin * width, send[rank] * width)
        begin += send[rank]
    if number != 0:
        publish(get(there + 16 * own + 8), number)
    return True


@jit
def _all_here(desk, receive, number, looks):
    """Return whether every rank with rows for this one, ``receive`` (R,) int64, has stored them; look a few times."""
    rank = 0
    for _ in range(looks):
        while rank < len(receive) and (receive[rank] == 0 or get(get(desk + 8 * _RANKS + 16 * rank + 8)) >= number):
            rank += 1
        if rank == len(receive):
            return True
        pause()
    return False


class Kernels:
    """The kernels, compiled for rows that may be written and rows that may not: nobody waits for it in a call."""

    store, all_here = staticmethod(_store), staticmethod(_all_here)

    def __init__(self) -> None:
        nobody, nowhere = np.zeros(0, np.int64), np.zeros(_RANKS, np.int64).ctypes
        for writeable in (True, False):
            rows = np.zeros((0, 1), np.uint8)
            rows.flags.writeable = writeable
            _store(nowhere.data, rows, nobody, nobody, nobody, 0, 0)
        _all_here(nowhere.data, nobody, 0, 0)
