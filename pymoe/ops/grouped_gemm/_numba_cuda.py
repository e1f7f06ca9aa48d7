"""Grouped GEMM on the GPU in Numba: a block of threads a tile of the answer, a thread an element.

Both operands go through shared memory as float32, decoded once for each tile that needs them.  k ascends:
fused multiply-adds from 0 within a group of columns, groups in float64.  A row's bits depend on no other row or tile.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import float32

from pymoe import checks
from pymoe.codec._numba_cuda import E8M0, FLOAT32, decode, format_of
from pymoe.codec.weights import WeightOperand
from pymoe.contracts import DeviceRowMap
from pymoe.device.arrays import HIDDEN_DTYPES, namespace
from pymoe.device.numba_gpu import bits_of, cuda, everywhere, fma, kernel, launch, product, require
from pymoe.errors import DTypeError, ShapeError, UnsupportedError, complaint
from pymoe.ops.grouped_gemm._numba_cuda_pairs import supports
from pymoe.quantization import QuantKey

__all__ = ["TILE", "grouped_gemm", "multiply_sorted"]

Array = Any

TILE = 16
"""Rows and columns of a tile, and columns of the operands that are in shared memory at a time."""
_PADDED = TILE + 1
"""One more, so that the numbers of a column lie in different banks of shared memory."""
_EXACT_COLUMNS = 1024
"""Sums of this many products of int8 codes stay below 2^24: exact in float32, in any order."""
_GRID_Y = 65535


# docs: gemm
@kernel
def grouped_gemm_kernel(
    out, a, a_form, a_scale, a_scale_form, slots, slots_of_a_token,
    w, w_form, w_scale, w_scale_form, w_scale_rows, bias, tiles, tile_count, group, scales_in_groups,
):  # fmt: skip
    """Multiply the rows of tile ``blockIdx.x`` with columns ``blockIdx.y * TILE`` and on of its expert's weights."""
    tile = cuda.blockIdx.x
    if tile >= tile_count[0]:
        return
    expert, first, rows = tiles[tile, 0], tiles[tile, 1], tiles[tile, 2]
    i, j = cuda.threadIdx.y, cuda.threadIdx.x
    row, K, N = first + i, w.shape[2], w.shape[1]
    source = row
    if slots_of_a_token and i < rows:
        source = slots[row] // slots_of_a_token
    a_tile = cuda.shared.array((TILE, TILE), float32)
    w_tile = cuda.shared.array((TILE, _PADDED), float32)

    for left in range(cuda.blockIdx.y * TILE, N, cuda.gridDim.y * TILE):
        total = np.float64(0)
        for start in range(0, K, group):
            stop = min(start + group, K)
            partial = np.float32(0)
            for k in range(start, stop, TILE):
                inside = k + j < stop
                a_tile[i, j] = decode(a[source, k + j], a_form) if inside and i < rows else np.float32(0)
                w_tile[i, j] = decode(w[expert, left + i, k + j], w_form) if inside and left + i < N else np.float32(0)
                cuda.syncthreads()
                for inner in range(TILE):
                    partial = fma(a_tile[i, inner], w_tile[j, inner], partial)
                cuda.syncthreads()
            if scales_in_groups and i < rows and left + j < N:
                g = start // group
                row_scale = decode(a_scale[source, g], a_scale_form)
                block_scale = decode(w_scale[expert, (left + j) // w_scale_rows, g], w_scale_form)
                partial = product(partial, product(row_scale, block_scale))
            total += np.float64(partial)
        if i < rows and left + j < N:
            y = np.float32(total)
            if not scales_in_groups:
                y = product(y, decode(a_scale[source, 0], a_scale_form))
                y = product(y, decode(w_scale[expert, left + j, 0], w_scale_form))
            out[row, left + j] = np.float32(y + bias[expert, left + j])


# end: gemm


def grouped_gemm(
    a: Array,
    w: WeightOperand,
    row_map: DeviceRowMap,
    *,
    slots_of_a_token: int = 0,
    a_scale: Array | None = None,
    a_key: QuantKey | None = None,
    out: Array,
) -> None:
    """Multiply the rows of `row_map`, which has tiles of `TILE` rows, with their experts' weights.

    Parameters
    ----------
    a : array, (rows, K)
    slots_of_a_token : int
        Row r reads row ``row_to_slot[r] // slots_of_a_token`` of `a`; 0: row r itself.
    a_scale : array, (1,), (rows, 1) or (rows, groups), optional
    out : array, (P or more, N), float32
        Rows without a slot are not written.
    """
    E, N = w.codes.shape[:2]
    if not w.codes.size:
        return
    in_groups = w.group_scale is not None
    group, w_scale, scale_rows = w.K, w.row_scale, 1
    if w.group_scale is not None:
        group, w_scale, scale_rows = w.block[1], w.group_scale, w.block[0]
    elif w.key is not None and w.key.dtype == "int8":
        group = _EXACT_COLUMNS
    w_scale = everywhere(a, 1, (E, N, 1), np.float32) if w_scale is None else w_scale
    w_scale = w_scale[:, :, None] if w_scale.ndim == 2 else w_scale
    a_scale = everywhere(a, 1, (1,), np.float32) if a_scale is None else a_scale
    if a_scale.ndim == 1:
        a_scale = namespace(a).broadcast_to(a_scale[:, None], (a.shape[0], 1))
    bias = everywhere(a, 0, (E, N), np.float32) if w.bias is None else w.bias
    launch(
        grouped_gemm_kernel, (row_map.tiles.shape[0], min(-(-N // TILE), _GRID_Y)), (TILE, TILE),
        out, bits_of(a), format_of(a.dtype, a_key), bits_of(a_scale), _scale_form(a_scale), row_map.row_to_slot,
        slots_of_a_token, bits_of(w.codes), format_of(w.codes.dtype, w.key), bits_of(w_scale), _scale_form(w_scale),
        scale_rows, bias, row_map.tiles, row_map.tile_count, group, in_groups,
    )  # fmt: skip


def _scale_form(scale: Array) -> int:
    return E8M0 if scale.dtype.itemsize == 1 else FLOAT32


def multiply_sorted(
    a: Array,
    w: WeightOperand,
    expert_offsets: Any,
    gather: Array | None,
    a_scale: Array | None,
    a_key: QuantKey | None,
    out: Array | None,
) -> Array:
    """Do what `pymoe.ops.grouped_gemm` says; offsets on the host make the list of tiles there."""
    call = "grouped_gemm"
    require(call, a, w.codes)
    if not supports(w.key, a_key):
        pair = " x ".join("floats" if key is None else key.name for key in (w.key, a_key))
        raise UnsupportedError(complaint(call, "backend", "be another for this pair", f"numba_cuda for {pair}"))
    checks.shape(call, "a", a, (None, w.K))
    if a_key is None and a.dtype not in HIDDEN_DTYPES:
        raise DTypeError(complaint(call, "a", "be float32, float16 or bfloat16 without a_key", a.dtype))
    xp, N = namespace(a), w.codes.shape[1]
    offsets = np.asarray(expert_offsets.get() if hasattr(expert_offsets, "get") else expert_offsets, np.int64)
    P = int(offsets[-1])
    if gather is None:
        checks.shape(call, "a", a, (P, w.K))
    else:
        checks.shape(call, "gather", gather, (P,))
    if out is None:
        out = xp.empty((P, N), np.float32)
    elif out.shape != (P, N) or out.dtype != np.float32:
        raise ShapeError(complaint(call, "out", f"be float32 of shape {(P, N)}", f"{out.dtype} {out.shape}"))
    tiles = [
        (e, start, min(TILE, int(offsets[e + 1]) - start), 0)
        for e in range(len(offsets) - 1)
        for start in range(int(offsets[e]), int(offsets[e + 1]), TILE)
    ]
    if tiles:
        slots = xp.arange(P, dtype=np.int32) if gather is None else xp.asarray(gather, np.int32)
        list_ = xp.asarray(np.array(tiles, np.int32))
        count = xp.asarray(np.array([len(tiles)], np.int32))
        row_map = DeviceRowMap(None, slots, None, list_, count, TILE)
        grouped_gemm(a, w, row_map, slots_of_a_token=1, a_scale=a_scale, a_key=a_key, out=out)
    return out
