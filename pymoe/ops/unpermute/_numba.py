"""Unpermute on the CPU: tokens on threads, slots in order, every operation that of the definition."""

from __future__ import annotations

from typing import Any

import numpy as np

from pymoe.device.arrays import BFLOAT16, as_float32
from pymoe.device.numba_cpu import jit
from pymoe.device.threads import refuse_recording, run_blocks

Array = Any

_NO_WEIGHTS = np.empty((0, 0), np.float32)
_BLOCK_TERMS = 1 << 18
"""Least products a thread sums at a time; below that starting it costs more than it saves."""


def unpermute(rows: Array, slot_to_row: Array, topk_weights: Array | None, out: Array) -> None:
    M, topk = slot_to_row.shape
    weights = _NO_WEIGHTS if topk_weights is None else topk_weights
    arguments = as_float32(rows), np.ascontiguousarray(slot_to_row), weights, topk_weights is not None
    grain = max(1, _BLOCK_TERMS // max(1, topk * out.shape[1]))
    if out.flags.c_contiguous and out.dtype in (BFLOAT16, np.float16):
        run_blocks(_sum_narrow, M, *arguments, out.dtype == BFLOAT16, out.view(np.uint16), grain=grain)
    elif out.flags.c_contiguous and out.dtype == np.float32:
        run_blocks(_sum_wide, M, *arguments, out, grain=grain)
    else:
        refuse_recording()
        total = np.empty(out.shape, np.float32)
        run_blocks(_sum_wide, M, *arguments, total, grain=grain)
        with np.errstate(all="ignore"):
            out[...] = total


@jit
def _sum_token(rows, places, weights, weighted, total):
    total[:] = np.float32(0)
    for j in range(len(places)):
        if places[j] < 0:
            continue
        row = rows[places[j]]
        if weighted:
            weight = weights[j]
            for k in range(len(total)):
                total[k] += weight * row[k]
        else:
            for k in range(len(total)):
                total[k] += row[k]


@jit
def _sum_wide(start, stop, rows, slot_to_row, weights, weighted, out):
    for t in range(start, stop):
        _sum_token(rows, slot_to_row[t], weights[t] if weighted else weights[:0, 0], weighted, out[t])


@jit
def _sum_narrow(start, stop, rows, slot_to_row, weights, weighted, is_bfloat16, out):
    total = np.empty(out.shape[1], np.float32)
    bits = total.view(np.uint32)
    for t in range(start, stop):
        _sum_token(rows, slot_to_row[t], weights[t] if weighted else weights[:0, 0], weighted, total)
        line = out[t]
        if is_bfloat16:
            for k in range(len(line)):
                line[k] = _bfloat16(bits[k])
        else:
            for k in range(len(line)):
                line[k] = _float16(bits[k])


@jit
def _bfloat16(b):
    """Return the bfloat16 nearest to the float32 with bits `b`, ties to even; NaN stays a quiet NaN."""
    rounded = (b + 0x7FFF + ((b >> 16) & 1)) >> 16
    return np.uint16(rounded if b & 0x7FFFFFFF <= 0x7F800000 else ((b >> 16) & 0x8000) | 0x7FC0)


@jit
def _float16(b):
    """Return the float16 nearest to the float32 with bits `b`, ties to even; NaN stays a quiet NaN."""
    sign, b = (b >> 16) & 0x8000, b & 0x7FFFFFFF
    if b >= 0x47800000:  # 65536 and above, infinity, NaN
        return np.uint16(sign | (0x7E00 if b > 0x7F800000 else 0x7C00))
    if b >= 0x38800000:  # normal: rebias the exponent by 15 - 127, round the 13 fraction bits that go
        return np.uint16(sign | ((b - 0x38000000 + 0x0FFF + ((b >> 13) & 1)) >> 13))
    if b < 0x33000000:  # below half of the least subnormal
        return np.uint16(sign)
    # Subnormal: a count of 2**-24, from the fraction with its hidden bit.
    shift = 126 - (b >> 23)
    fraction = (b & 0x7FFFFF) | 0x800000
    return np.uint16(sign | ((fraction + (1 << (shift - 1)) - 1 + ((fraction >> shift) & 1)) >> shift))
