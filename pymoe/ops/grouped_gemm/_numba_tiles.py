"""Units on AMX: rows packed once for all their features, weights from memory or from a panel that holds them decoded.

Per 32 bfloat16 of k the unit adds the products of even k to one sum and those of odd k to another, both from 0 by fused
multiply-add, adds the two, and then adds that to the sum so far; numbers below 2^-126 count as 0 on the way.  Sums of
int8 are exact.  The tile that a row falls into changes none of this.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pymoe.device.numba_cpu import jit
from pymoe.ops.grouped_gemm._numba_tiles_ir import (
    INT8_QUADS,
    SIDE,
    TILE_BYTES,
    add_scaled,
    configure,
    release,
    tile_products,
    transpose,
)
from pymoe.ops.grouped_gemm._numba_units import (
    FEATURES,
    ROWS,
    decode_rows,
    last_feature,
    last_row,
    lines,
    most_rows,
    scale_at,
)

Array = Any

_QUADS = len(INT8_QUADS)
_TILE = TILE_BYTES // 4
_SUMS = 4 * _TILE
_STRIP = 4
TILE_FEATURES = _STRIP * FEATURES
"""Output features of a unit: rows of a whole strip are written together."""
_PART_BYTES = 1024
"""Bytes of k of 32 features that stay in the first-level cache: two thirds of 48 KiB."""


def _palette() -> Array:
    """Return the configuration of eight tiles of 16 rows and 64 bytes: palette 1, bytes a row, rows."""
    palette = np.zeros(64, np.uint8)
    palette[0] = 1
    palette[16:32].view(np.uint16)[:] = 64
    palette[48:56] = SIDE
    return palette


PALETTE = _palette()


@jit
def multiply_tiles(start, stop, kind, straight, task, out):
    """Run units ``start:stop``; the layout's stride counts bytes.

    `straight` says that a row of weights in memory is a padded row already.
    """
    units, offsets, gather, x, codes, layout, scaling, factors = task
    N, width = out.shape[1], layout.stride
    most = most_rows(start, stop, units, offsets)
    # Decoded features that lie a whole page apart would share one set of the first-level cache.
    panel_width = width + 64
    packed, panel = lines(-(-most // SIDE) * SIDE * width), lines(FEATURES * panel_width)
    panel[:] = 0
    blocks = -(-most // (2 * SIDE))
    sums, partial = lines(4 * blocks * _STRIP * _SUMS).view(np.float32), lines(4 * _SUMS).view(np.float32)
    group_factors = np.ones(2 * SIDE, np.float32), np.ones(FEATURES, np.float32)
    spare = np.empty(N + SIDE * SIDE, np.float32)
    zeros = np.zeros(width, np.uint8)
    sources, targets = np.empty(SIDE, np.int64), np.empty(SIDE, np.int64)
    configure(PALETTE.ctypes.data)
    packed_row = -1
    for unit in range(start, stop):
        e, strip, row0 = units[unit]
        end, row1 = min(strip + TILE_FEATURES, N), last_row(row0, e, offsets)
        if row0 != packed_row:
            _pack(packed.ctypes.data, x, width, gather, row0, row1, zeros.ctypes.data, sources, targets)
            packed_row = row0
        for n0 in range(strip, end, FEATURES):
            n1 = last_feature(n0, N)
            w, w_row, ahead = np.int64(panel.ctypes.data), panel_width, 0
            if straight and n1 - n0 == FEATURES:
                w, w_row = codes.address + (e * N + n0) * width, width
                ahead = w + FEATURES * width
            else:
                decode_rows(kind, w, w_row, (codes, layout, scaling), e, n0, n1, N)
            part = sums[(n0 - strip) // FEATURES * blocks * _SUMS :]
            place = (e, n0, n1, row0, row1)
            _sum(kind, (w, w_row), ahead, packed.ctypes.data, place, task, part, partial, group_factors)
        # A row's features of a whole strip are written together: its lines lie in one page.
        for first in range(row0, row1, 2 * SIDE):
            count = min(row1 - first, 2 * SIDE)
            for n0 in range(strip, end, FEATURES):
                n1 = last_feature(n0, N)
                at = ((n0 - strip) // FEATURES * blocks + (first - row0) // (2 * SIDE)) * _SUMS
                _scale(kind, sums[at : at + _SUMS], factors, gather, e, n0, n1, first, count)
            for m0 in range(0, count, SIDE):
                for n0 in range(strip, end, FEATURES):
                    at = ((n0 - strip) // FEATURES * blocks + (first - row0) // (2 * SIDE)) * _SUMS
                    where = sums.ctypes.data + 4 * at
                    _store(where, spare, sources, targets, n0, last_feature(n0, N), first, m0, count, out)
    release()


@jit(inline="always")
def _pack(packed, x, width, gather, row0, row1, zeros, sources, targets):
    """Write the rows in blocks of 16, dword by dword; rows that a block lacks are zeros."""
    for i in range(SIDE):
        targets[i] = packed + 64 * i
    for block in range(row0, row1, SIDE):
        for i in range(SIDE):
            sources[i] = x + gather[block + i] * width if block + i < row1 else zeros
        for step in range(width // 64):
            transpose(sources, 64 * step, targets, (block - row0) * width + TILE_BYTES * step)


@jit(inline="always")
def _sum(kind, w, ahead, packed, place, task, sums, partial, group_factors):
    """Leave the sums of all rows of the unit, 32 rows by 32 features after each other.

    A group of scales, or as much of k as leaves the weights in the first-level cache, goes through all rows before the
    next one.
    """
    e, n0, n1, row0, row1 = place
    layout, factors, (of_rows, of_features) = task.layout, task.factors, group_factors
    width = layout.stride
    group = layout.padded * (1 if len(kind) == _QUADS else 2)
    part = group if factors.in_groups else _PART_BYTES
    for k in range(0, width, part):
        steps = min(part, width - k) // 64
        if factors.in_groups:
            _feature_scales(of_features, task.scaling, e, n0, n1, k // group)
        for first in range(row0, row1, 2 * SIDE):
            x = packed + (first - row0) * width + SIDE * k
            x_block = SIDE * width if row1 - first > SIDE else 0
            fetched = ahead + FEATURES * k if ahead != 0 and first == row0 else 0
            to = sums.ctypes.data + 4 * ((first - row0) // (2 * SIDE) * _SUMS)
            if factors.in_groups:
                tile_products(kind, (w[0] + k, w[1]), (x, x_block), steps, fetched, False, partial.ctypes.data)
                count = min(row1 - first, 2 * SIDE)
                if factors.has_rows:
                    for m in range(count):
                        of_rows[m] = factors.rows[task.gather[first + m], k // group]
                where = (
                    to,
                    np.int64(partial.ctypes.data),
                    np.int64(of_rows.ctypes.data),
                    np.int64(of_features.ctypes.data),
                )
                add_scaled(kind, where, n1 - n0, 2 if count > SIDE else 1, k > 0)
            else:
                tile_products(kind, (w[0] + k, w[1]), (x, x_block), steps, fetched, k > 0, to)


@jit
def _feature_scales(scales, scaling, e, n0, n1, g):
    """Write the scales of a group of k."""
    row, inside = n0 // scaling.bn, n0 % scaling.bn
    for i in range(n1 - n0):
        scales[i] = scale_at(scaling.scale, scaling.table, e, row, g)
        inside += 1
        if inside == scaling.bn:
            row, inside = row + 1, 0


@jit(inline="always")
def _scale(kind, sums, factors, gather, e, n0, n1, first, count):
    """Multiply by the row's factor, then by the feature's, then add the bias."""
    if len(kind) == _QUADS and not factors.in_groups:
        integers = sums.view(np.int32)
        for i in range(sums.size):
            sums[i] = np.float32(integers[i])
    rows = factors.has_rows and not factors.in_groups
    if rows or factors.has_features or factors.has_bias:
        _scale_sums(rows, sums, factors, gather, e, n0, n1, first, count)


@jit
def _scale_sums(rows, sums, factors, gather, e, n0, n1, first, count):
    row_factors = np.ones(2 * SIDE, np.float32)
    if rows:
        for m in range(count):
            row_factors[m] = factors.rows[gather[first + m] if factors.rows.shape[0] > 1 else 0, 0]
    for n in range(n0, n1):
        feature = factors.features[e, n] if factors.has_features else np.float32(1)
        # Adding -0 leaves every number what it is.
        bias = factors.bias[e, n] if factors.has_bias else np.float32(-0.0)
        for j in range(2):
            at = (2 * ((n - n0) // SIDE) + j) * _TILE + (n - n0) % SIDE * SIDE
            for m in range(SIDE):
                sums[at + m] = sums[at + m] * row_factors[j * SIDE + m] * feature + bias


@jit(inline="always")
def _store(sums, spare, sources, targets, n0, n1, first, m0, count, out):
    """Write the tiles of rows ``first + m0`` and 15 more, of `count`, to `out`."""
    row_bytes = out.shape[1] * 4
    for n in range(n0, n1, SIDE):
        tile = sums + 4 * _TILE * (2 * ((n - n0) // SIDE) + m0 // SIDE)
        for i in range(SIDE):
            sources[i] = tile + 64 * i
        if n + SIDE <= n1:
            for i in range(SIDE):
                row = out.ctypes.data + (first + m0 + i) * row_bytes
                targets[i] = row if m0 + i < count else spare.ctypes.data
            transpose(sources, 0, targets, 4 * n)
        else:
            for i in range(SIDE):
                targets[i] = spare.ctypes.data + 64 * i
            transpose(sources, 0, targets, 0)
            for m in range(min(SIDE, count - m0)):
                for i in range(n1 - n):
                    out[first + m0 + m, n + i] = spare[SIDE * m + i]


assert ROWS % (2 * SIDE) == 0 and FEATURES == 2 * SIDE
