"""Units on vectors: tiles of rows and output features, whose sums run in 16 lanes."""

from __future__ import annotations

import numpy as np

from pymoe.device.numba_cpu import jit
from pymoe.ops.grouped_gemm._lanes import FEATURES as TILE_FEATURES
from pymoe.ops.grouped_gemm._lanes import FETCHES, LANES, PAIRS, QUADS, product_of, tall, tile_of_dots
from pymoe.ops.grouped_gemm._numba_codes_ir import convert
from pymoe.ops.grouped_gemm._numba_units import (
    FEATURES,
    decode_rows,
    last_feature,
    last_row,
    lines,
    most_rows,
    scale_at,
)

# Heights of a tile: one row, or several, the last of them repeated, which costs nothing where memory is the limit.
_ROWS1 = (0,)
_FEATURES1, _FEATURES6, _FEATURES8 = (TILE_FEATURES[height] for height in (1, 6, 8))
_PAIRS, _QUADS = PAIRS + 1, QUADS + 1
_PART_STEPS = 64
"""Steps of 64 bytes that a tile takes at a time: its features' weights stay in the first-level cache for all rows."""
_SUMS_AT, _ROWS_AT = FEATURES, FEATURES + 8
"""Where addresses stand: those of all features, of a tile's sums by rows, and of all rows of the result."""
_FEW_TILES = 3
"""Tiles of rows up to which weights are read from where they lie, even if that is not from the start of a line."""


@jit
def multiply_straight(start, stop, task, out):
    """Run units ``start:stop`` on weights as they lie in memory, without scales by value."""
    units, offsets, codes, layout = task.units, task.offsets, task.codes, task.layout
    N = out.shape[1]
    kind = product_of(codes.kind)
    scratch = _scratch(start, stop, kind, task)
    packed_row = -1
    row_bytes = layout.stride // 64 * codes.unit_bytes
    for unit in range(start, stop):
        e, n0, row0 = units[unit]
        place = (e, n0, last_feature(n0, N), row0, last_row(row0, e, offsets))
        where = (codes.address + (e * N + n0) * row_bytes, row_bytes)
        if place[4] - row0 == 1:
            _rows(_ROWS1, kind, codes.kind, where, row0 != packed_row, place, task, scratch, out)
        else:
            _rows(tall(kind), kind, codes.kind, where, row0 != packed_row, place, task, scratch, out)
        packed_row = row0


@jit
def multiply_decoded(start, stop, kind, task, out):
    """Run units ``start:stop`` on weights decoded into a buffer: float32, or the like of the rows."""
    units, offsets, layout = task.units, task.offsets, task.layout
    N = out.shape[1]
    # Features that lie a whole page apart would share one set of the first-level cache.
    width = layout.stride + 64
    buffer = lines(FEATURES * width)
    buffer[:] = 0
    scratch = _scratch(start, stop, kind, task)
    packed_row = -1
    for unit in range(start, stop):
        e, n0, row0 = units[unit]
        place = (e, n0, last_feature(n0, N), row0, last_row(row0, e, offsets))
        decode_rows(kind, buffer.ctypes.data, width, (task.codes, layout, task.scaling), e, n0, place[2], N)
        where = (np.int64(buffer.ctypes.data), width)
        if place[4] - row0 == 1:
            _rows(_ROWS1, kind, kind, where, row0 != packed_row, place, task, scratch, out)
        else:
            _rows(tall(kind), kind, kind, where, row0 != packed_row, place, task, scratch, out)
        packed_row = row0


@jit
def _scratch(start, stop, kind, task):
    """Return memory for addresses, a tile's sums, sums of groups, lanes of sums, rows, and weights."""
    layout = task.layout
    most = most_rows(start, stop, task.units, task.offsets) + 8
    whole = layout.groups == 1 and not task.factors.in_groups
    totals = np.empty(1 if whole else most * FEATURES, np.float64)
    # A tile of VNNI holds the sums of its weights besides.
    kept = lines(
        64 * most * (2 * FEATURES if len(kind) == _QUADS else FEATURES) if layout.stride > 64 * _PART_STEPS else 1
    )
    packed = lines(most * layout.stride)
    panel = lines(64 * max(_PART_STEPS, layout.stride // layout.groups // 64) * FEATURES)
    return np.empty(_ROWS_AT + most, np.int64), np.empty(2 * LANES, np.float32), totals, kept, packed, panel


@jit
def _rows(rows, kind, source, where, packs, place, task, scratch, out):
    """Multiply rows row0..row1-1 with output features n0..n1-1, in tiles of ``len(rows)`` rows.

    `where` holds the address of feature n0, and the bytes to the next one, of weights of the kind `source`.
    No call and no view in the inner loop: each would count references to every array it takes.
    """
    e, n0, n1, row0, row1 = place
    gather, layout, scaling, factors = task.gather, task.layout, task.scaling, task.factors
    places, sums, totals, kept, packed, panel = scratch
    height = len(rows)
    step = _FEATURES8 if height == 8 else (_FEATURES6 if height == 6 else _FEATURES1)
    tiles, strips = -(-(row1 - row0) // height), -(-(n1 - n0) // step)
    steps_of_row = layout.stride // 64
    whole = layout.groups == 1 and not factors.in_groups
    extent = _PART_STEPS if whole else steps_of_row // layout.groups
    parts = -(-steps_of_row // extent)
    _place_rows(kind, (height, step, tiles), packs, (row0, row1), task, scratch, out)
    # Weights of the next features come from memory while these meet all rows: the lines are shared out.
    lines_a_step = 4 if tiles == 1 else (2 if tiles < 4 else 1)
    tile_bytes = (height * step + (step if len(kind) == _QUADS else 0)) * 64
    unit_bytes = 64 if len(source) <= _QUADS else task.codes.unit_bytes
    few = tiles <= _FEW_TILES
    as_is = len(source) <= _QUADS and few
    w_step = 64 if as_is else 64 * step
    for part in range(parts):
        k = part * extent
        steps = min(extent, steps_of_row - k)
        resumes, stays = whole and part > 0, whole and part < parts - 1
        first = where[0] + k * unit_bytes
        _place_weights(kind, source, as_is, (first, where[1]), n1 - n0, strips * step, step, steps, places, panel)
        strip, tile = 0, 0
        for _ in range(strips * tiles):
            n, row = n0 + strip * step, row0 + tile * height
            straight = whole and n + step <= n1
            targets = places.ctypes.data + 8 * (_ROWS_AT + tile * height if straight else _SUMS_AT)
            fetched = first + (strip * step + (step if as_is else FEATURES) + tile * lines_a_step) * where[1]
            ahead = (lines_a_step if tile * lines_a_step < FETCHES else 0, fetched, where[1], unit_bytes)
            a = packed.ctypes.data + (tile * steps_of_row + k) * 64 * height
            kept_at = kept.ctypes.data + (strip * tiles + tile) * tile_bytes
            w, to = places.ctypes.data + 8 * strip * step, 4 * n if straight else 0
            tile_of_dots(rows, kind, a, (w, w_step), steps, (targets, to), ahead, (kept_at, resumes, stays))
            if not straight and not stays:
                here = (e, n0, row0, n, min(n + step, n1), row, min(row + height, row1))
                _take_sums(sums, step, whole, part, here, gather, scaling, factors, totals, out)
            # Few rows go with the features, which stay in the first-level cache, else the features with the rows.
            if few:
                strip, tile = (strip, tile + 1) if tile + 1 < tiles else (strip + 1, 0)
            else:
                strip, tile = (strip + 1, tile) if strip + 1 < strips else (0, tile + 1)
    if not whole:
        for row in range(row0, row1):
            for n in range(n0, n1):
                out[row, n] = np.float32(totals[(row - row0) * FEATURES + n - n0])
    if factors.has_features or factors.has_bias or (factors.has_rows and not factors.in_groups):
        _scale_rows(row0, row1 - row0, e, n0, n1, gather, factors, out)


@jit
def _place_rows(kind, shape, packs, span, task, scratch, out):
    """Note where sums go, and pack the rows for tiles, step by step; a row that is repeated gives the same again."""
    height, step, tiles = shape
    row0, row1 = span
    places, sums, _, _, packed, _ = scratch
    width = task.layout.stride
    for i in range(height):
        places[_SUMS_AT + i] = sums.ctypes.data + 4 * step * i
    for i in range(tiles * height):
        r = min(row0 + i, row1 - 1)
        places[_ROWS_AT + i] = out.ctypes.data + 4 * r * out.shape[1]
        if packs:
            to = packed.ctypes.data + i // height * height * width + i % height * 64
            row = task.rows + task.gather[r] * width
            convert(kind, kind, row, width // 64, to, 64 * height, np.float32(0), np.float32(1))


@jit
def _place_weights(kind, source, as_is, where, count, places_count, step, steps, places, panel):
    """Note where the features' weights are; unless they are read as they lie, write them to `panel`, tile by tile."""
    for i in range(places_count):
        places[i] = where[0] + min(i, count - 1) * where[1]
        if not as_is:
            to = panel.ctypes.data + 64 * (i // step * step * steps + i % step)
            convert(kind, source, places[i], steps, to, 64 * step, np.float32(0), np.float32(1))
            places[i] = to


@jit(inline="always")
def _take_sums(sums, step, whole, part, here, gather, scaling, factors, totals, out):
    """Write a tile's sums to `out`, or add those of a group to `totals`: float32 to float64, exact for int8."""
    e, n0, row0, first, last, top, bottom = here
    for n in range(first, last):
        scale = np.float32(1)
        if factors.in_groups:
            scale = scale_at(scaling.scale, scaling.table, e, n // scaling.bn, part)
        for row in range(top, bottom):
            value = sums[(row - top) * step + n - first]
            if whole:
                out[row, n] = value
            else:
                if factors.in_groups:
                    value *= scale * factors.rows[gather[row], part] if factors.has_rows else scale
                at = (row - row0) * FEATURES + n - n0
                totals[at] = np.float64(value) + (totals[at] if part > 0 else 0.0)


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
