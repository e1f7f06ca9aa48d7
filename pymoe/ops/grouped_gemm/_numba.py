"""Grouped GEMM on the CPU: units of one expert, some output features and some rows, on our own threads.

Weights are multiplied straight from memory, widened in registers, where that is cheap; otherwise a unit widens its
features into a buffer first.  Both give the same bits.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from pymoe.codec.weights import WeightOperand, code_table
from pymoe.device.numba_cpu import jit
from pymoe.device.threads import run_blocks
from pymoe.ops.grouped_gemm import _lanes
from pymoe.ops.grouped_gemm._lanes import FEATURES, LANES, tile_of_dots, widen

Array = Any

N_TILE = 32
"""Output features of a unit: 32 rows of K floats stay in the second-level cache up to K = 8192."""
ROW_TILE = 256
"""Rows of a unit at most: one busy expert still feeds all cores."""
FEW_ROWS = 8
"""Rows of an expert up to which widening e4m3, 8 operations a vector, again for every tile beats storing it widened."""
BLOCK_WEIGHTS = 1 << 20
"""Weights that a thread takes at a time at least: reading them takes some 100 us, handing over work some 20."""
EXACT_GROUP = 1024
"""Products of two int8 codes whose sum is exact in float32: 1024 * 128 * 128 = 2^24."""


_KINDS = {
    "fp8": _lanes.E4M3,
    "int8": _lanes.INT8,
    "uint8b128": _lanes.UINT8B128,
    "uint8": _lanes.UINT8,
    "fp4": _lanes.E2M1,
    "uint4b8": _lanes.UINT4B8,
    "uint4": _lanes.UINT4,
}
_FLOAT32 = (0,) * (_lanes.FLOAT32 + 1)

# Heights of a tile: one row, or eight, the last of them repeated, which costs nothing where memory is the limit.
_ROWS8, _ROWS1 = (0,) * 8, (0,)
_FEATURES8, _FEATURES1 = FEATURES[8], FEATURES[1]


class Layout(NamedTuple):
    """How k is cut: groups of `group`, each padded to `padded`, a multiple of 16, with zeros; rows `stride` apart."""

    K: int
    group: int
    padded: int
    groups: int
    stride: int


class Codes(NamedTuple):
    """Weights as they lie in memory, flat, their address and kind, and the table of code values for tails."""

    flat: Array
    address: int
    kind: tuple[int, ...]
    per_byte: int
    table: Array


class Scaling(NamedTuple):
    """Scales along k: (E, ceil(N/bn), ceil(K/bk)) float32 or bytes of `table`, and zero points (`zp_kind` 0: none)."""

    scale: Array
    table: Array
    before: bool
    bn: int
    bk: int
    zp: Array
    zp_kind: int


class Factors(NamedTuple):
    """Factors of whole sums, one a row and one a feature, and of partial sums where `in_groups`."""

    rows: Array
    has_rows: bool
    features: Array
    has_features: bool
    in_groups: bool


def grouped_gemm(
    a: Array, w: WeightOperand, expert_offsets: Array, gather: Array, a_scale: Array | None, group: int, out: Array
) -> None:
    """Do what `_numpy.grouped_gemm` does; sums run in 16 lanes of fused multiply-adds."""
    K, N = w.K, w.codes.shape[1]
    in_groups = group < K
    if not in_groups and w.key is not None and w.key.dtype == "int8":
        group = min(EXACT_GROUP, K)
    # Groups start at multiples of 16 in the padded copies, so that lanes never straddle two of them.
    padded = -(-group // LANES) * LANES
    width = padded * -(-K // group)
    # Rows a whole page apart would share one set of the first-level cache.
    layout = Layout(K, group, padded, width // padded, width + (LANES if width % 1024 == 0 else 0))
    before = w.group_scale is not None and not in_groups
    one = np.ones((1, 1), np.float32)
    rows = one if a_scale is None else a_scale.reshape(a.shape[0] if a_scale.size > 1 else 1, -1)
    features = one if w.row_scale is None else w.row_scale
    factors = Factors(_own(rows), a_scale is not None, _own(features), w.row_scale is not None, in_groups)
    codes, padded_rows, units = _codes(w), _pad(a, layout), _units(expert_offsets, N)
    straight = padded * layout.groups == K and not before
    if len(codes.kind) == _lanes.E4M3 + 1:
        straight = straight and np.diff(expert_offsets).max() <= FEW_ROWS
    kernel = _multiply_straight if straight else _multiply_widened
    run_blocks(
        kernel, len(units), units, expert_offsets, gather, padded_rows.ctypes.data, codes, layout, _scaling(w, before),
        factors, out, grain=max(1, BLOCK_WEIGHTS // (N_TILE * K)),
    )  # fmt: skip


def _own(array: Array) -> Array:
    """Return a contiguous, writeable array: Numba compiles again for one that is read-only."""
    array = np.ascontiguousarray(array)
    return array if array.flags.writeable else array.copy()


def _pad(a: Array, layout: Layout) -> Array:
    """Return the rows, flat from a cache line's start on, every group padded by zeros to whole vectors."""
    size = a.shape[0] * layout.stride
    buffer = (np.empty if layout.padded * layout.groups == layout.K else np.zeros)(size + LANES, np.float32)
    first = -(buffer.ctypes.data // 4) % LANES
    flat = buffer[first : first + size]
    rows = flat.reshape(a.shape[0], layout.stride)
    if layout.groups == 1:
        rows[:, : layout.K] = a
        return flat
    for g in range(layout.groups):
        part = a[:, g * layout.group : (g + 1) * layout.group]
        rows[:, g * layout.padded : g * layout.padded + part.shape[1]] = part
    return flat


def _codes(w: WeightOperand) -> Codes:
    flat = np.ascontiguousarray(w.codes).reshape(-1)
    if w.key is not None:
        kind, per_byte, table = _KINDS[w.key.dtype], 2 if w.key.is_packed else 1, code_table(w.key.dtype)
        flat = flat.view(np.uint8)
    elif flat.dtype == np.float32:
        kind, per_byte, table = _lanes.FLOAT32, 1, _NOTHING
    else:
        kind = _lanes.FLOAT16 if flat.dtype == np.float16 else _lanes.BFLOAT16
        per_byte, table = 1, _all_values(flat.dtype)
        flat = flat.view(np.uint16)
    # Read-only for all, so that Numba compiles once for borrowed weights of either sort.
    flat = flat.view()
    flat.flags.writeable = False
    return Codes(flat, flat.ctypes.data, (0,) * (kind + 1), per_byte, table)


_NOTHING = np.zeros(1, np.float32)
_NOTHING.flags.writeable = False


@lru_cache(maxsize=2)
def _all_values(dtype: np.dtype) -> Array:
    """Return the float32 value of every 16-bit pattern of `dtype`, read-only."""
    with np.errstate(all="ignore"):
        table = np.arange(65536, dtype=np.uint16).view(dtype).astype(np.float32)
    table.flags.writeable = False
    return table


def _scaling(w: WeightOperand, before: bool) -> Scaling:
    scale, table, zp = np.ones((1, 1, 1), np.float32), _NOTHING, np.zeros((1, 1, 1), np.uint8)
    if w.group_scale is not None:
        scale = _own(w.group_scale)
        table = w.scale_table if scale.dtype == np.uint8 else table
    zp_kind = 0
    if w.zp is not None and w.key is not None:
        zp, zp_kind = _own(w.zp), 2 if w.key.is_packed else 1
    return Scaling(scale, table, before, w.block[0], w.block[1], zp, zp_kind)


def _units(expert_offsets: Array, N: int) -> Array:
    """Return (units, 3): expert, first output feature, first row; experts without rows have none."""
    counts = -(-np.diff(expert_offsets) // ROW_TILE)
    experts = np.repeat(np.arange(len(counts)), counts)
    tile_of_expert = np.arange(len(experts)) - np.repeat(np.cumsum(counts) - counts, counts)
    rows = expert_offsets[experts] + tile_of_expert * ROW_TILE
    features = np.arange(0, N, N_TILE)
    units = np.empty((len(experts), len(features), 3), np.int64)
    units[:, :, 0], units[:, :, 1], units[:, :, 2] = experts[:, None], features, rows[:, None]
    return units.reshape(-1, 3)


@jit
def _multiply_straight(start, stop, units, offsets, gather, a, codes, layout, scaling, factors, out):
    """Run units ``start:stop`` on weights as they lie in memory."""
    N = out.shape[1]
    scratch = np.empty(8, np.int64), np.empty(8, np.int64), np.empty(LANES, np.float32), np.empty(LANES, np.float64)
    for unit in range(start, stop):
        e, n0, row0 = units[unit]
        place = (e, n0, min(n0 + N_TILE, N), row0, min(row0 + ROW_TILE, offsets[e + 1]))
        where = (e * N * layout.K, layout.K, codes.flat.itemsize)
        if place[4] - row0 == 1:
            _rows(_ROWS1, a, codes.address, where, codes.kind, place, gather, layout, scaling, factors, scratch, out)
        else:
            _rows(_ROWS8, a, codes.address, where, codes.kind, place, gather, layout, scaling, factors, scratch, out)


@jit
def _multiply_widened(start, stop, units, offsets, gather, a, codes, layout, scaling, factors, out):
    """Run units ``start:stop`` on weights widened into a buffer."""
    N = out.shape[1]
    width = layout.stride
    tile = np.zeros(N_TILE * width, np.float32)
    scratch = np.empty(8, np.int64), np.empty(8, np.int64), np.empty(LANES, np.float32), np.empty(LANES, np.float64)
    for unit in range(start, stop):
        e, n0, row0 = units[unit]
        place = (e, n0, min(n0 + N_TILE, N), row0, min(row0 + ROW_TILE, offsets[e + 1]))
        for n in range(n0, place[2]):
            _widen_row(tile, (n - n0) * width, codes, layout, scaling, e, n, N)
        where = (-n0 * width, width, 4)
        if place[4] - row0 == 1:
            _rows(_ROWS1, a, tile.ctypes.data, where, _FLOAT32, place, gather, layout, scaling, factors, scratch, out)
        else:
            _rows(_ROWS8, a, tile.ctypes.data, where, _FLOAT32, place, gather, layout, scaling, factors, scratch, out)


@jit
def _rows(rows, a, w, where, kind, place, gather, layout, scaling, factors, scratch, out):
    """Multiply rows row0..row1-1 with output features n0..n1-1, in tiles of ``len(rows)`` rows.

    `where` holds the element of feature 0, the elements between two features, and the bytes of an element.
    No call and no view in these loops: each would count references to every array it takes.
    """
    e, n0, n1, row0, row1 = place
    starts, columns, sums, totals = scratch
    row_factors, feature_factors = factors.rows, factors.features
    step, steps = _FEATURES8 if len(rows) == 8 else _FEATURES1, layout.padded // LANES
    for row in range(row0, row1, len(rows)):
        count = min(len(rows), row1 - row)
        for i in range(len(rows)):
            starts[i] = gather[row + min(i, count - 1)] * layout.stride
        for n in range(n0, n1, step):
            for j in range(step):
                columns[j] = where[0] + min(n + j, n1 - 1) * where[1]
            for i in range(LANES):
                totals[i] = 0.0
            for g in range(layout.groups):
                k = g * layout.padded
                tile_of_dots(rows, a + 4 * k, starts, w + where[2] * k, columns, kind, steps, sums)
                for i in range(count):
                    for j in range(min(step, n1 - n)):
                        value = sums[i * step + j]
                        if factors.in_groups:
                            scale = _scale_at(scaling.scale, scaling.table, e, (n + j) // scaling.bn, g)
                            value *= row_factors[gather[row + i], g] * scale
                        # Sums of groups are float32, the sum of groups float64: exact for int8.
                        totals[i * step + j] += np.float64(value)
            for i in range(count):
                for j in range(min(step, n1 - n)):
                    value = np.float32(totals[i * step + j])
                    if factors.has_rows and not factors.in_groups:
                        value *= row_factors[gather[row + i] if row_factors.shape[0] > 1 else 0, 0]
                    if factors.has_features:
                        value *= feature_factors[e, n + j]
                    out[row + i, n + j] = value


@jit(inline="always")
def _scale_at(scale, table, e, row, g):
    return table[np.int64(scale[e, row, g])] if table.shape[0] > 1 else np.float32(scale[e, row, g])


@jit
def _widen_row(to, at, codes, layout, scaling, e, n, N):
    """Write row n of expert e as float32, group by group, scaled along k where the sums do not do it."""
    for g in range(layout.groups):
        k0, k1 = g * layout.group, min((g + 1) * layout.group, layout.K)
        first, place = (e * N + n) * layout.K + k0, at + g * layout.padded
        whole = (k1 - k0) // LANES
        widen(codes.address, first * codes.flat.itemsize // codes.per_byte, codes.kind, whole, to, place)
        for k in range(whole * LANES, k1 - k0):
            to[place + k] = _one(codes, first + k)
    if scaling.before:
        row = n // scaling.bn
        for g in range(scaling.scale.shape[2]):
            scale, zero = _scale_at(scaling.scale, scaling.table, e, row, g), np.float32(0)
            if scaling.zp_kind == 1:
                zero = np.float32(scaling.zp[e, n, g])
            elif scaling.zp_kind == 2:
                byte = np.int64(scaling.zp[e, n >> 1, g])
                zero = np.float32((byte >> 4) if n & 1 else (byte & 15))
            # Scales before the sums never come with groups of sums, so k is its own place.
            for k in range(at + g * scaling.bk, at + min((g + 1) * scaling.bk, layout.K)):
                to[k] = (to[k] - zero) * scale


@jit
def _one(codes, at):
    """Return one weight by its table, for the tail of a row."""
    if codes.per_byte == 2:
        byte = np.int64(codes.flat[at >> 1])
        return codes.table[(byte >> 4) if at & 1 else (byte & 15)]
    if codes.table.shape[0] > 1:
        return codes.table[np.int64(codes.flat[at])]
    return np.float32(codes.flat[at])
