"""Grouped GEMM on the CPU: each unit of work decodes a tile of one expert's weights and multiplies its rows with it."""

from __future__ import annotations

from typing import Any

import numpy as np

from pymoe.codec.weights import WeightOperand, code_table
from pymoe.device.numba_cpu import jit
from pymoe.device.threads import run_blocks
from pymoe.ops.grouped_gemm._lanes import LANES, tile_of_dots

Array = Any

N_TILE = 32
"""Output features of a unit: 32 rows of K floats stay in the second-level cache up to K = 8192."""
ROW_TILE = 256
"""Rows of a unit at most: decoding a weight costs little beside 256 uses, and one busy expert still feeds all cores."""
EXACT_GROUP = 1024
"""Products of two int8 codes whose sum is exact in float32: 1024 * 128 * 128 = 2^24."""

# How the bytes of a weight become a float32.
FLOAT32, FLOAT16, BFLOAT16, BYTE, NIBBLE = range(5)

_dots4x4 = tile_of_dots(4, 4)
_dots1x4 = tile_of_dots(1, 4)


def grouped_gemm(
    a: Array, w: WeightOperand, expert_offsets: Array, gather: Array, a_scale: Array | None, group: int, out: Array
) -> None:
    """Do what `_numpy.grouped_gemm` does; sums run in 16 lanes of fused multiply-adds."""
    K, N = w.K, w.codes.shape[1]
    scaled_in_groups = group < K
    if not scaled_in_groups and w.key is not None and w.key.dtype == "int8":
        group = EXACT_GROUP
    # Groups start at multiples of 16 in the padded copies, so that lanes never straddle two of them.
    padded = -(-group // LANES) * LANES if group < K else -(-K // LANES) * LANES
    groups = -(-K // group)
    rows = _pad(a, K, group, padded, groups)
    kind, codes, table = _codes(w)
    units = _units(expert_offsets, N)
    no_scale = np.ones((1, 1), np.float32)
    zp = np.zeros((1, 1, 1), np.uint8) if w.zp is None else np.ascontiguousarray(w.zp)
    scale, scale_table = _scales(w)
    factors = no_scale if a_scale is None else a_scale.reshape(a.shape[0] if a_scale.size > 1 else 1, -1)
    row_scale = no_scale if w.row_scale is None else w.row_scale
    run_blocks(
        _multiply, len(units), units, expert_offsets, gather, rows, codes, kind, table,
        scale, scale_table, w.group_scale is not None, w.block[0], w.block[1], zp, _zp_kind(w),
        np.ascontiguousarray(factors), a_scale is not None, row_scale, w.row_scale is not None,
        scaled_in_groups, K, group, padded, groups, out,
    )  # fmt: skip


def _pad(a: Array, K: int, group: int, padded: int, groups: int) -> Array:
    """Return the rows with every group padded by zeros to whole vectors, flat."""
    if padded * groups == K and a.flags.c_contiguous:
        return a.reshape(-1)
    rows = np.zeros((a.shape[0], groups, padded), np.float32)
    for g in range(groups):
        part = a[:, g * group : (g + 1) * group]
        rows[:, g, : part.shape[1]] = part
    return rows.reshape(-1)


def _codes(w: WeightOperand) -> tuple[int, Array, Array]:
    """Return how to read the weights, their bits, and the table of code values."""
    nothing = np.zeros(1, np.float32)
    codes = np.ascontiguousarray(w.codes)
    if w.key is not None:
        return (NIBBLE if w.key.is_packed else BYTE), codes.view(np.uint8), code_table(w.key.dtype)
    if codes.dtype == np.float32:
        return FLOAT32, codes.view(np.uint32), nothing
    if codes.dtype == np.float16:
        return FLOAT16, codes.view(np.uint16), _HALVES
    return BFLOAT16, codes.view(np.uint16), nothing


_HALVES = np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32)


def _scales(w: WeightOperand) -> tuple[Array, Array]:
    """Return the group scales, float32 or one byte each, and the table that reads a byte."""
    if w.group_scale is None:
        return np.ones((1, 1, 1), np.float32), np.ones(1, np.float32)
    scale = np.ascontiguousarray(w.group_scale)
    return (scale, w.scale_table) if scale.dtype == np.uint8 else (scale, np.ones(1, np.float32))


def _zp_kind(w: WeightOperand) -> int:
    """Return 0 without zero points, 1 for one a byte, 2 for two a byte."""
    return 0 if w.zp is None else 2 if w.key is not None and w.key.is_packed else 1


def _units(expert_offsets: Array, N: int) -> Array:
    """Return (units, 3): expert, first output feature, first row; experts without rows have none."""
    units = []
    for e in np.flatnonzero(np.diff(expert_offsets)):
        for row in range(int(expert_offsets[e]), int(expert_offsets[e + 1]), ROW_TILE):
            units.extend((e, n, row) for n in range(0, N, N_TILE))
    return np.array(units, np.int64).reshape(-1, 3)


@jit
def _multiply(
    start, stop, units, offsets, gather, a, codes, kind, table, scale, scale_table, has_scale, bn, bk, zp, zp_kind,
    factors, has_factors, row_scale, has_row_scale, scaled_in_groups, K, group, padded, groups, out,
):  # fmt: skip
    """Run units ``start:stop``."""
    N = out.shape[1]
    width = padded * groups
    tile = np.zeros(N_TILE * width, np.float32)
    sums = np.empty(16, np.float32)
    starts = np.empty(4, np.int64)
    totals = np.empty(16, np.float64)
    for unit in range(start, stop):
        e, n0, row0 = units[unit]
        n1 = min(n0 + N_TILE, N)
        row1 = min(row0 + ROW_TILE, offsets[e + 1])
        for n in range(n0, n1):
            at = (n - n0) * width
            for g in range(groups):
                _decode(
                    tile[at + g * padded : at + (g + 1) * padded], codes, kind, table, e, n, g * group,
                    min((g + 1) * group, K), scale, scale_table, has_scale and not scaled_in_groups, bn, bk, zp,
                    zp_kind,
                )  # fmt: skip
        for n in range(n1, n0 + N_TILE):
            tile[(n - n0) * width : (n - n0 + 1) * width] = 0
        for row in range(row0, row1, 4):
            count = min(4, row1 - row)
            for i in range(4):
                starts[i] = gather[min(row + i, row1 - 1)] * width
            for n in range(n0, n1, 4):
                _dots(a, starts, count, tile, (n - n0) * width, width, padded, groups, sums, totals,
                      gather, row, factors, scale, scale_table, e, n, N, bn, scaled_in_groups)  # fmt: skip
                for i in range(count):
                    source = gather[row + i] if factors.shape[0] > 1 else 0
                    for j in range(min(4, N - n)):
                        value = np.float32(totals[i * 4 + j])
                        if has_factors and not scaled_in_groups:
                            value *= factors[source, 0]
                        if has_row_scale:
                            value *= row_scale[e, n + j]
                        out[row + i, n + j] = value


@jit
def _dots(
    a, starts, count, tile, at, width, padded, groups, sums, totals, gather, row, factors, scale, scale_table, e, n, N,
    bn, scaled_in_groups,
):  # fmt: skip
    """Write the 4 by 4 totals over all groups; a group's sum is float32, the sum of groups float64 (exact for int8)."""
    steps = padded // 16
    totals[:] = 0
    for g in range(groups):
        if count > 1:
            _dots4x4(a, starts, g * padded, tile, at + g * padded, width, steps, sums)
        else:
            _dots1x4(a, starts, g * padded, tile, at + g * padded, width, steps, sums)
        for i in range(count):
            for j in range(min(4, N - n)):
                if scaled_in_groups:
                    factor = factors[gather[row + i], g] * _scale_at(scale, scale_table, e, (n + j) // bn, g)
                    totals[i * 4 + j] += np.float64(sums[i * 4 + j] * factor)
                else:
                    totals[i * 4 + j] += np.float64(sums[i * 4 + j])


@jit(inline="always")
def _scale_at(scale, scale_table, e, row, g):
    if scale_table.shape[0] > 1:
        return scale_table[np.int64(scale[e, row, g])]
    return np.float32(scale[e, row, g])


@jit
def _decode(to, codes, kind, table, e, n, k0, k1, scale, scale_table, has_scale, bn, bk, zp, zp_kind):
    """Write weights k0..k1-1 of row n as float32, scaled along k where the sums do not do it."""
    if kind == FLOAT32:
        bits = codes[e, n, k0:k1]
        for k in range(k1 - k0):
            to[k] = _as_float(np.uint32(bits[k]))
    elif kind == BFLOAT16:
        for k in range(k0, k1):
            to[k - k0] = _as_float(np.uint32(codes[e, n, k]) << np.uint32(16))
    elif kind == NIBBLE:
        for k in range(k0, k1):
            byte = np.int64(codes[e, n, k >> 1])
            to[k - k0] = table[(byte >> 4) if k & 1 else (byte & 15)]
    else:
        for k in range(k0, k1):
            to[k - k0] = table[np.int64(codes[e, n, k])]
    if has_scale:
        for k in range(k0, k1):
            g = k // bk
            value = to[k - k0]
            if zp_kind == 1:
                value -= np.float32(zp[e, n, g])
            elif zp_kind == 2:
                byte = np.int64(zp[e, n >> 1, g])
                value -= np.float32((byte >> 4) if n & 1 else (byte & 15))
            to[k - k0] = value * _scale_at(scale, scale_table, e, n // bn, g)


@jit(inline="always")
def _as_float(bits):
    return np.uint32(bits).view(np.float32)
