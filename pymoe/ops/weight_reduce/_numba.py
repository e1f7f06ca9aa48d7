"""Weight and reduce on the CPU: tokens on threads, slots in order, every operation that of the definition."""

from __future__ import annotations

from typing import Any

import numpy as np

from pymoe.device.arrays import as_float32
from pymoe.device.numba_cpu import jit
from pymoe.device.threads import run_blocks

Array = Any

_NOTHING = np.empty((0, 0), np.float32)
_BLOCK_TERMS = 1 << 18
"""Least products a thread sums at a time; below that starting it costs more than it saves."""


def weight_reduce(slots: Array, topk_weights: Array | None, topk_ids: Array | None, out: Array) -> None:
    M, topk, K = slots.shape
    total = out if out.flags.c_contiguous and out.dtype == np.float32 else np.empty(out.shape, np.float32)
    weights = _NOTHING if topk_weights is None else topk_weights
    live = np.ones((M, topk), bool) if topk_ids is None else np.ascontiguousarray(topk_ids >= 0)
    grain = max(1, _BLOCK_TERMS // max(1, topk * K))
    run_blocks(_sum_tokens, M, as_float32(slots), live, weights, topk_weights is not None, total, grain=grain)
    if total is not out:
        with np.errstate(all="ignore"):
            out[...] = total


@jit
def _sum_tokens(start, stop, slots, live, weights, weighted, total):
    for t in range(start, stop):
        line = total[t]
        line[:] = np.float32(0)
        for j in range(slots.shape[1]):
            if not live[t, j]:
                continue
            row = slots[t, j]
            if weighted:
                weight = weights[t, j]
                for k in range(len(line)):
                    line[k] += weight * row[k]
            else:
                for k in range(len(line)):
                    line[k] += row[k]
