"""What the kernels of all instruction sets share: how work is cut, and weights of any format as float32."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pymoe.device.numba_cpu import jit
from pymoe.ops.grouped_gemm._lanes import LANES, widen

Array = Any

FEATURES = 32
"""Output features of a unit: 32 rows of K floats stay in the second-level cache up to K = 8192."""
ROWS = 256
"""Rows of a unit at most: one busy expert still feeds all cores."""


class Layout(NamedTuple):
    """How k is cut: groups of `group`, each padded to `padded` with zeros; rows `stride` apart.

    `padded` is a multiple of what the kernel takes at a time.  `stride` counts what the kernel counts.
    """

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


@jit
def pad_rows(start, stop, rows, shift, layout, flat):
    """Copy the bits of rows ``start:stop``, shifted left, to ``flat``, every group padded by zeros."""
    for r in range(start, stop):
        to = flat[r * layout.stride : (r + 1) * layout.stride]
        for g in range(layout.groups):
            first, place = g * layout.group, g * layout.padded
            width = min(layout.group, layout.K - first)
            for k in range(width):
                to[place + k] = np.int64(rows[r, first + k]) << shift
            for k in range(width, layout.padded):
                to[place + k] = 0


@jit
def decode_rows(start, stop, rows, table, layout, flat):
    """Write the numbers of the codes in rows ``start:stop`` to ``flat``, every group padded by zeros."""
    for r in range(start, stop):
        to = flat[r * layout.stride : (r + 1) * layout.stride]
        for g in range(layout.groups):
            first, place = g * layout.group, g * layout.padded
            width = min(layout.group, layout.K - first)
            for k in range(width):
                to[place + k] = table[rows[r, first + k]]
            for k in range(width, layout.padded):
                to[place + k] = 0


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
def widen_row(to, at, task, e, n, N):
    """Write row n of expert e as float32, group by group, less zero points, scaled where the sums do not do it."""
    codes, layout, scaling = task.codes, task.layout, task.scaling
    for g in range(layout.groups):
        k0, k1 = g * layout.group, min((g + 1) * layout.group, layout.K)
        first, place = (e * N + n) * layout.K + k0, at + g * layout.padded
        whole = (k1 - k0) // LANES
        widen(codes.address, first * codes.flat.itemsize // codes.per_byte, codes.kind, whole, to, place)
        for k in range(whole * LANES, k1 - k0):
            to[place + k] = _one(codes, first + k)
    if scaling.before or scaling.zp_kind:
        row = n // scaling.bn
        for g in range(scaling.scale.shape[2]):
            scale, zero = np.float32(1), np.float32(0)
            if scaling.before:
                scale = scale_at(scaling.scale, scaling.table, e, row, g)
            if scaling.zp_kind == 1:
                zero = np.float32(scaling.zp[e, n, g])
            elif scaling.zp_kind == 2:
                byte = np.int64(scaling.zp[e, n >> 1, g])
                zero = np.float32((byte >> 4) if n & 1 else (byte & 15))
            # The sums are in groups of the scales, or in none.
            first = at + g * (layout.padded if layout.groups > 1 else scaling.bk)
            for k in range(first, first + min(scaling.bk, layout.K - g * scaling.bk)):
                to[k] = (to[k] - zero) * scale


@jit
def narrow_row(integers, to, at, row, task, e, n, N):
    """Write row n of expert e to the bytes ``to[at:]`` as bfloat16, or as int8 where that is what `integers` lie in.

    `row` is float32 memory for a row, zero where groups are padded.
    """
    if integers:
        codes, layout = task.codes, task.layout
        for g in range(layout.groups):
            k0, k1 = g * layout.group, min((g + 1) * layout.group, layout.K)
            first = (e * N + n) * layout.K + k0
            for k in range(k1 - k0):
                to[at + g * layout.padded + k] = codes.flat[first + k]
        return
    widen_row(row, 0, task, e, n, N)
    bits, line = row.view(np.uint32), to[at : at + 2 * row.size].view(np.uint16)
    for k in range(row.size):
        line[k] = bits[k] >> np.uint32(16)


@jit
def _one(codes, at):
    """Return one weight by its table, for the tail of a row."""
    if codes.per_byte == 2:
        byte = np.int64(codes.flat[at >> 1])
        return codes.table[(byte >> 4) if at & 1 else (byte & 15)]
    if codes.table.shape[0] > 1:
        return codes.table[np.int64(codes.flat[at])]
    return np.float32(codes.flat[at])
