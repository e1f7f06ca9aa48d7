"""What the kernels of all instruction sets share: how work is cut, and weights of any format as float32."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pymoe.device.numba_cpu import jit
from pymoe.ops.grouped_gemm._lanes import FLOAT32, LANES, QUADS
from pymoe.ops.grouped_gemm._numba_codes_ir import convert, copy

Array = Any

FEATURES = 32
"""Output features of a unit: 32 rows of K floats stay in the second-level cache up to K = 8192."""
ROWS = 256
"""Rows of a unit at most: one busy expert still feeds all cores."""
_FLOAT32, _QUADS = FLOAT32 + 1, QUADS + 1


class Layout(NamedTuple):
    """How k is cut: groups of `group`, each padded to `padded` with zeros; rows `stride` apart.

    `padded` is a multiple of what the kernel takes at a time.  `stride` counts bytes, the others elements.
    """

    K: int
    group: int
    padded: int
    groups: int
    stride: int


class Codes(NamedTuple):
    """Weights as they lie in memory: their address, their kind, and the bytes of a unit of 16 of them."""

    address: int
    kind: tuple[int, ...]
    unit_bytes: int


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
    """Factors of whole sums, one a row and one a feature, and of partial sums where `in_groups`; then a bias."""

    rows: Array
    has_rows: bool
    features: Array
    has_features: bool
    in_groups: bool
    bias: Array
    has_bias: bool


class Task(NamedTuple):
    """What every unit of a call is given; `rows` is the address of the padded rows."""

    units: Array
    offsets: Array
    gather: Array
    rows: int
    codes: Codes
    layout: Layout
    scaling: Scaling
    factors: Factors


def most_units(rows: int, E: int, N: int, width: int) -> int:
    """Return how many units `list_units` writes at most for that many rows, however they spread over experts."""
    return (min(E, rows) + rows // ROWS) * -(-N // width)


@jit
def list_units(start, stop, expert_offsets, N, width, units, count):
    """Write (expert, first output feature of `width`, first row) of all units, and how many there are.

    Experts without rows have none; units of the same rows follow each other.
    """
    n = 0
    for e in range(len(expert_offsets) - 1):
        for row in range(expert_offsets[e], expert_offsets[e + 1], ROWS):
            for feature in range(0, N, width):
                units[n, 0] = e
                units[n, 1] = feature
                units[n, 2] = row
                n += 1
    count[0] = n


@jit(inline="always")
def last_feature(n0, N):
    return min(n0 + FEATURES, N)


@jit(inline="always")
def last_row(row0, e, offsets):
    return min(row0 + ROWS, offsets[e + 1])


@jit
def most_rows(start, stop, units, offsets):
    """Return the rows of the largest of units ``start:stop``."""
    most = 0
    for unit in range(start, stop):
        most = max(most, last_row(units[unit, 2], units[unit, 0], offsets) - units[unit, 2])
    return most


@jit(inline="always")
def scale_at(scale, table, e, row, g):
    return table[np.int64(scale[e, row, g])] if table.shape[0] > 1 else np.float32(scale[e, row, g])


@jit
def lines(size):
    """Return `size` bytes of memory from the start of a cache line on: what lies in two lines costs two loads."""
    memory = np.empty(size + 64, np.uint8)
    first = -np.int64(memory.ctypes.data) % 64
    return memory[first : first + size]


@jit
def decode_rows(form, to, width, source, e, n0, n1, N):
    """Write features ``n0:n1`` of expert e to the address `to`, `width` bytes apart: less zero points, and scaled where
    the sums are not.

    `source` holds codes, layout and scaling.  Where a group is padded, zeros have to stand already.
    """
    codes, layout, scaling = source
    item = 4 if len(form) == _FLOAT32 else (1 if len(form) == _QUADS else 2)
    step = LANES if len(form) == _QUADS else 64
    adjusts = scaling.before or scaling.zp_kind != 0
    pieces, extent = (scaling.scale.shape[2], scaling.bk) if adjusts else (layout.groups, layout.group)
    # The sums are in groups of the scales, or in none.
    apart = (layout.padded if layout.groups > 1 else extent) * item
    row_bytes, piece_bytes = layout.K * codes.unit_bytes // LANES, extent * codes.unit_bytes // LANES
    units, last = extent // LANES, layout.K - (pieces - 1) * extent
    for n in range(n0, n1):
        here, target = codes.address + (e * N + n) * row_bytes, to + (n - n0) * width
        row = n // scaling.bn
        for g in range(pieces):
            zero, scale = np.float32(0), np.float32(1)
            if scaling.before:
                scale = scale_at(scaling.scale, scaling.table, e, row, g)
            if scaling.zp_kind == 1:
                zero = np.float32(scaling.zp[e, n, g])
            elif scaling.zp_kind == 2:
                byte = np.int64(scaling.zp[e, n >> 1, g])
                zero = np.float32((byte >> 4) if n & 1 else (byte & 15))
            whole = units if g < pieces - 1 else last // LANES
            convert(form, codes.kind, here, whole, target, step, zero, scale)
            rest = (extent if g < pieces - 1 else last) - whole * LANES
            if rest > 0:
                done = whole * codes.unit_bytes
                _decode_tail(form, codes, here + done, rest, target + whole * LANES * item, (item, step), (zero, scale))
            here += piece_bytes
            target += apart


@jit
def decode_tokens(start, stop, form, rows, source, flat):
    """Write rows ``start:stop`` to `flat` as `decode_rows` does features; both are bytes, those of padding zero."""
    codes, layout, scaling = source
    here = Codes(rows.ctypes.data, codes.kind, codes.unit_bytes), layout, scaling
    decode_rows(form, flat.ctypes.data + start * layout.stride, layout.stride, here, 0, start, stop, 0)


@jit
def _decode_tail(form, codes, source, count, target, sizes, adjustment):
    """Write less than a unit, by way of memory that has room for a whole one."""
    tail = np.zeros(2 * 64, np.uint8)
    here = np.int64(tail.ctypes.data)
    copy(source, here, (count * codes.unit_bytes + LANES - 1) // LANES)
    convert(form, codes.kind, here, 1, here + 64, sizes[1], adjustment[0], adjustment[1])
    copy(here + 64, target, count * sizes[0])
