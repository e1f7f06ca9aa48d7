"""Users' activations on the CPU: their functions in loops, which the compiler turns into vectors if it can."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numba import njit

from pymoe.device.numba_cpu import jit
from pymoe.formula import ClosedFunction, Program
from pymoe.formula._numba import function_of

__all__ = ["round_row", "rows"]


@lru_cache(maxsize=64)
def rows(program: Program | ClosedFunction, gated: bool) -> Any:
    """Return the kernel of a user's function: ``kernel(start, stop, x, y, bits)``, as of the built-in activations.

    Not kept on disk: its text is in no file, by which Numba's cache goes.
    """
    formula = function_of(program)

    @njit(nogil=True, error_model="numpy")
    def gated_rows(start, stop, x, y, bits):
        I, narrow = x.shape[1] // 2, bits.size > 0  # noqa: E741  the project's symbol
        row = np.empty(I, np.float32)
        for r in range(start, stop):
            gate, up, line = x[r, :I], x[r, I:], row if narrow else y[r]
            for i in range(I):
                line[i] = formula(gate[i], up[i])
            if narrow:
                round_row(line, bits[r])

    @njit(nogil=True, error_model="numpy")
    def plain_rows(start, stop, x, y, bits):
        narrow = bits.size > 0
        buffer = np.empty(x.shape[1], np.float32)
        for r in range(start, stop):
            row, line = x[r], buffer if narrow else y[r]
            for i in range(len(line)):
                line[i] = formula(row[i])
            if narrow:
                round_row(line, bits[r])

    kernel = gated_rows if gated else plain_rows
    kernel.compile("void(intp, intp, float32[:, ::1], float32[:, ::1], uint16[:, ::1])")
    return kernel


@jit
def round_row(line, bits):
    """Round a float32 row to bfloat16, ties to even; NaN stays a quiet NaN."""
    wide: Any = line.view(np.uint32)
    for i in range(wide.size):
        b = np.uint32(wide[i])
        rounded = (b + np.uint32(0x7FFF) + ((b >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        quiet = (b >> np.uint32(16)) | np.uint32(0x40)
        bits[i] = quiet if b & np.uint32(0x7FFFFFFF) > np.uint32(0x7F800000) else rounded
