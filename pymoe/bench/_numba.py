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
    for piece in range(start, stop):
        total = np.int64(0)
        for word in words[piece * LINE : (piece + 1) * LINE]:
            total ^= word
        results[piece] = total
