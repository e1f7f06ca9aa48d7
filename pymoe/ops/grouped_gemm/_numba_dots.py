"""Units on vectors: tiles of rows and output features, whose sums run in 16 lanes."""

from __future__ import annotations

import numpy as np

from pymoe.device.numba_cpu import jit
from pymoe.ops.grouped_gemm._lanes import FEATURES as TILE_FEATURES
from pymoe.ops.grouped_gemm._lanes import FLOAT32, LANES, PAIRS, QUADS, tile_of_dots
from pymoe.ops.grouped_gemm._numba_units import FEATURES, last_feature, last_row, narrow_row, scale_at, widen_row

# Heights of a tile: one row, or eight, the last of them repeated, which costs nothing where memory is the limit.
_ROWS8, _ROWS1 = (0,) * 8, (0,)
_FEATURES8, _FEATURES1 = TILE_FEATURES[8], TILE_FEATURES[1]
_PAIRS, _QUADS = PAIRS + 1, QUADS + 1
_FLOAT32 = FLOAT32 + 1


@jit
def multiply_straight(start, stop, task, out):
    """Run units ``start:stop`` on weights as they lie in memory."""
    units, offsets, codes, layout = task.units, task.offsets, task.codes, task.layout
    N = out.shape[1]
    scratch = np.empty((3, 8), np.int64), np.empty(LANES, np.float32), np.empty(LANES, np.float64)
    for unit in range(start, stop):
        e, n0, row0 = units[unit]
        place = (e, n0, last_feature(n0, N), row0, last_row(row0, e, offsets))
        where = (e * N * layout.K, layout.K, codes.flat.itemsize)
        if place[4] - row0 == 1:
            _rows(_ROWS1, codes.address, where, codes.kind, place, task, scratch, out)
        else:
            _rows(_ROWS8, codes.address, where, codes.kind, place, task, scratch, out)


@jit
def multiply_decoded(start, stop, kind, task, out):
    """Run units ``start:stop`` on weights decoded into a buffer: float32, or the like of the rows."""
    units, offsets, layout = task.units, task.offsets, task.layout
    N = out.shape[1]
    width = layout.stride
    item = 4 if len(kind) == _FLOAT32 else (2 if len(kind) == _PAIRS else 1)
    tile = np.zeros(FEATURES * width * item, np.uint8)
    row = np.zeros(width, np.float32)
    scratch = np.empty((3, 8), np.int64), np.empty(LANES, np.float32), np.empty(LANES, np.float64)
    for unit in range(start, stop):
        e, n0, row0 = units[unit]
        place = (e, n0, last_feature(n0, N), row0, last_row(row0, e, offsets))
        for n in range(n0, place[2]):
            if len(kind) == _FLOAT32:
                widen_row(tile.view(np.float32), (n - n0) * width, task, e, n, N)
            else:
                narrow_row(len(kind) == _QUADS, tile, (n - n0) * width * item, row, task, e, n, N)
        where = (-n0 * width, width, item)
        if place[4] - row0 == 1:
            _rows(_ROWS1, tile.ctypes.data, where, kind, place, task, scratch, out)
        else:
            _rows(_ROWS8, tile.ctypes.data, where, kind, place, task, scratch, out)


@jit
def _rows(rows, w, where, kind, place, task, scratch, out):
    """Multiply rows row0..row1-1 with output features n0..n1-1, in tiles of ``len(rows)`` rows.

    `where` holds the element of feature 0, the elements between two features, and the bytes of an element.
    No call and no view in these loops: each would count references to every array it takes.
    """
    e, n0, n1, row0, row1 = place
    gather, a, layout, scaling, factors = task.gather, task.rows, task.layout, task.scaling, task.factors
    places, sums, totals = scratch
    sums_at, out_at, out_row = sums.ctypes.data, out.ctypes.data, 4 * out.shape[1]
    row_factors = factors.rows
    step = _FEATURES8 if len(rows) == 8 else _FEATURES1
    lanes = 4 * LANES if len(kind) == _QUADS else (2 * LANES if len(kind) == _PAIRS else LANES)
    item = 1 if len(kind) == _QUADS else (2 if len(kind) == _PAIRS else 4)
    steps = layout.padded // lanes
    for row in range(row0, row1, len(rows)):
        count = min(len(rows), row1 - row)
        # The first rows read the weights from memory, the others find them in the cache.
        ahead = 2 * step * where[1] * where[2] if row == row0 else 0
        for i in range(len(rows)):
            places[0, i] = gather[row + min(i, count - 1)] * layout.stride
        for n in range(n0, n1, step):
            for j in range(step):
                places[1, j] = where[0] + min(n + j, n1 - 1) * where[1]
            width = min(step, n1 - n)
            whole = layout.groups == 1 and not factors.in_groups
            # A row that is repeated writes the same numbers again.
            for i in range(len(rows)):
                places[2, i] = sums_at + 4 * step * i
                if whole and width == step:
                    places[2, i] = out_at + (row + min(i, count - 1)) * out_row
            if whole:
                to = 4 * n if width == step else 0
                tile_of_dots(rows, kind, a, w, ahead, places, steps, to)
                if width < step:
                    for i in range(count):
                        for j in range(width):
                            out[row + i, n + j] = sums[i * step + j]
            else:
                for i in range(LANES):
                    totals[i] = 0.0
                for g in range(layout.groups):
                    k = g * layout.padded
                    tile_of_dots(rows, kind, a + item * k, w + where[2] * k, 0, places, steps, 0)
                    for i in range(count):
                        for j in range(width):
                            value = sums[i * step + j]
                            if factors.in_groups:
                                scale = scale_at(scaling.scale, scaling.table, e, (n + j) // scaling.bn, g)
                                if factors.has_rows:
                                    scale *= row_factors[gather[row + i], g]
                                value *= scale
                            # Sums of groups are float32, the sum of groups float64: exact for int8.
                            totals[i * step + j] += np.float64(value)
                for i in range(count):
                    for j in range(width):
                        out[row + i, n + j] = np.float32(totals[i * step + j])
        if factors.has_features or factors.has_bias or (factors.has_rows and not factors.in_groups):
            _scale_rows(row, count, e, n0, n1, gather, factors, out)


@jit
def _scale_rows(row, count, e, n0, n1, gather, factors, out):
    """Multiply by the row's factor, then by the feature's, then add the bias."""
    rows, features, bias = factors.rows, factors.features, factors.bias
    for r in range(row, row + count):
        factor = np.float32(1)
        if factors.has_rows and not factors.in_groups:
            factor = rows[gather[r] if rows.shape[0] > 1 else 0, 0]
        for n in range(n0, n1):
            value = out[r, n] * factor
            if factors.has_features:
                value *= features[e, n]
            if factors.has_bias:
                value += bias[e, n]
            out[r, n] = value
