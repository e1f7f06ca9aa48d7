"""A kernel that does nothing but read."""

from __future__ import annotations

from typing import Any

import numpy as np

from pymoe.device.numba_cpu import jit
from pymoe.device.threads import run_blocks

Array = Any

LINE = 4096
"""Words of a piece whose result is stored: the compiler must not drop the reads."""


def read_all(words: Array, results: Array) -> None:
    """Read every word of `words` (int64, a multiple of `LINE`) on all threads; `results` holds one word a piece."""
    run_blocks(_read, len(words) // LINE, words, results)


@jit
def _read(start, stop, words, results):
    # Four streams a piece: one alone leaves the loads waiting for each other (28 of 114 GB/s from the first cache).
    quarter = LINE // 4
    for piece in range(start, stop):
        line = words[piece * LINE : (piece + 1) * LINE]
        a = b = c = d = np.int64(0)
        for i in range(quarter):
            a ^= line[i]
            b ^= line[quarter + i]
            c ^= line[2 * quarter + i]
            d ^= line[3 * quarter + i]
        results[piece] = a ^ b ^ c ^ d
