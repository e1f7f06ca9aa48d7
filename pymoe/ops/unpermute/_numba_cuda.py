"""Unpermute on the GPU in Numba: a thread an element, slots in order, as the definition."""

from __future__ import annotations

from typing import Any

import numpy as np

from pymoe.codec._numba_cuda import decode, encode, format_of
from pymoe.device.arrays import HIDDEN_DTYPES, namespace
from pymoe.device.numba_gpu import bits_of, cuda, everywhere, kernel, launch, product, require

__all__ = ["unpermute"]

Array = Any

THREADS = 128
_GRID_Y = 65535


# docs: unpermute
@kernel
def unpermute_kernel(out, out_form, rows, rows_form, slot_to_row, topk_weights):
    """Sum the weighed rows of token ``blockIdx.x``: slots ascending, products and sums rounded one by one."""
    token = cuda.blockIdx.x
    for k in range(cuda.blockIdx.y * THREADS + cuda.threadIdx.x, out.shape[1], cuda.gridDim.y * THREADS):
        total = np.float32(0)
        for j in range(slot_to_row.shape[1]):
            row = slot_to_row[token, j]
            if row >= 0:
                total = np.float32(total + product(topk_weights[token, j], decode(rows[row, k], rows_form)))
        out[token, k] = encode(total, out_form)


# end: unpermute


def unpermute(rows: Array, slot_to_row: Array, topk_weights: Array | None, out: Array) -> None:
    """Write ``out[t] = sum_j topk_weights[t, j] * rows[slot_to_row[t, j]]``; None weighs every row 1."""
    require("unpermute", rows, out)
    if not rows.size or not slot_to_row.size:
        out[...] = 0
        return
    if topk_weights is None:
        topk_weights = everywhere(rows, 1, slot_to_row.shape, np.float32)
    rows = rows if rows.dtype in HIDDEN_DTYPES else rows.astype(np.float32)
    sums = out if out.dtype in HIDDEN_DTYPES else namespace(out).empty(out.shape, np.float32)
    grid = (out.shape[0], min(-(-out.shape[1] // THREADS), _GRID_Y))
    launch(
        unpermute_kernel, grid, THREADS, bits_of(sums), format_of(sums.dtype), bits_of(rows), format_of(rows.dtype),
        slot_to_row, topk_weights.astype(np.float32, copy=False),
    )  # fmt: skip
    if sums is not out:
        out[...] = sums
