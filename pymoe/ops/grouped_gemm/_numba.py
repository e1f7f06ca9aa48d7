"""Grouped GEMM on the CPU: units of one expert, some output features and some rows, on our own threads.

Where products are exact in bfloat16 or int8 and the CPU has instructions for those, they do it; else float32 lanes.
Each way weights are multiplied straight from memory where that is cheap; otherwise a unit decodes its features into a
buffer first.  Both give the same bits.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from pymoe.codec.weights import WeightOperand, code_table
from pymoe.device.arrays import BFLOAT16
from pymoe.device.instructions import best_dot
from pymoe.device.threads import refuse_recording, run_blocks
from pymoe.ops.grouped_gemm import _lanes
from pymoe.ops.grouped_gemm._lanes import LANES
from pymoe.ops.grouped_gemm._numba_dots import multiply_decoded, multiply_straight
from pymoe.ops.grouped_gemm._numba_tiles import TILE_FEATURES, multiply_tiles
from pymoe.ops.grouped_gemm._numba_tiles_ir import BFLOAT16_PAIRS, INT8_QUADS
from pymoe.ops.grouped_gemm._numba_units import (
    FEATURES,
    Codes,
    Factors,
    Layout,
    Scaling,
    Task,
    decode_rows,
    list_units,
    most_units,
    pad_rows,
)
from pymoe.ops.grouped_gemm._operands import Array, Rows, group_of, product_of

FEW_ROWS = 8
"""Rows of an expert up to which widening e4m3, 8 operations a vector, again for every tile beats storing it widened."""
BLOCK_WEIGHTS = 1 << 20
"""Weights that a thread takes at a time at least: reading them takes some 100 us, handing over work some 20."""
COPIED_BYTES = 1 << 21
"""Of rows that a thread pads at a time at least."""
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
_FLOAT32, _PAIRS, _QUADS = ((0,) * (kind + 1) for kind in (_lanes.FLOAT32, _lanes.PAIRS, _lanes.QUADS))


class _Plan(NamedTuple):
    """How one call multiplies: in what numbers, by which instructions ("tiles", "vectors" or None), scaled where."""

    product: str
    instructions: str | None
    layout: Layout
    in_groups: bool


def grouped_gemm(rows: Rows, w: WeightOperand, expert_offsets: Array, gather: Array, out: Array) -> None:
    """Do what `_numpy.grouped_gemm` does, in the order of sums that belongs to the CPU's instructions."""
    product = product_of(rows, w)
    instructions = None if product == "float32" else best_dot(product)
    plan = _float_plan(rows, w) if instructions is None else _narrow_plan(product, instructions, rows, w)
    layout = plan.layout
    padded = _padded(rows, plan.product, layout)
    codes, before = _codes(w), w.group_scale is not None and not plan.in_groups
    straight = not before and _is_straight(plan, w, expert_offsets)
    kernel: Any
    how: tuple[Any, ...]
    if plan.instructions == "tiles":
        kernel, how = multiply_tiles, (BFLOAT16_PAIRS if plan.product == "bfloat16" else INT8_QUADS, straight)
        layout = layout._replace(stride=layout.stride * padded.itemsize)
    else:
        kind = {"float32": _FLOAT32, "bfloat16": _PAIRS, "int8": _QUADS}[plan.product]
        kernel, how = (multiply_straight, ()) if straight else (multiply_decoded, (kind,))
        if straight and plan.product != "float32":
            codes = codes._replace(kind=kind)
    features = TILE_FEATURES if plan.instructions == "tiles" else FEATURES
    E, N = w.codes.shape[:2]
    units, count = np.empty((most_units(len(out), E, N, features), 3), np.int64), np.empty(1, np.int64)
    run_blocks(list_units, 1, expert_offsets, N, features, units, count)
    task = Task(
        units, expert_offsets, gather, padded.ctypes.data, codes, layout, _scaling(w, before),
        _factors(rows, w, plan.in_groups),
    )  # fmt: skip
    run_blocks(kernel, count, *how, task, out, grain=max(1, BLOCK_WEIGHTS // (features * w.K)))


def _is_straight(plan: _Plan, w: WeightOperand, expert_offsets: Array) -> bool:
    """Whether weights without scales by value are multiplied as they lie in memory."""
    if plan.layout.padded * plan.layout.groups != w.K or w.zp is not None:
        return False
    if plan.product != "float32":
        return w.key is None or plan.product == "int8"
    if w.key is None or w.key.dtype == "int8":
        return True
    return not w.key.is_packed and (w.key.dtype != "fp8" or bool(np.diff(expert_offsets).max() <= FEW_ROWS))


def _narrow_plan(product: str, instructions: str, rows: Rows, w: WeightOperand) -> _Plan:
    """Products of bfloat16 or int8: float32 scales along k multiply partial sums, powers of two the weights."""
    in_groups = w.group_scale is not None and w.group_scale.dtype == np.float32
    in_groups = in_groups or (rows.sum_factors is not None and rows.sum_factors.ndim == 2)
    step = 64 if product == "int8" else 32
    return _Plan(product, instructions, _layout(w.K, w.block[1] if in_groups else w.K, step), in_groups)


def _float_plan(rows: Rows, w: WeightOperand) -> _Plan:
    """Products of float32, which take everything."""
    group = group_of(rows, w)
    in_groups = group < w.K
    if not in_groups and w.key is not None and w.key.dtype == "int8":
        group = min(EXACT_GROUP, w.K)
    layout = _layout(w.K, group, LANES)
    # Rows a whole page apart would share one set of the first-level cache.
    layout = layout._replace(stride=layout.stride + (LANES if layout.stride % 1024 == 0 else 0))
    return _Plan("float32", None, layout, in_groups)


def _layout(K: int, group: int, step: int) -> Layout:
    """Return groups that start at multiples of `step`, so that no step straddles two of them."""
    padded = -(-group // step) * step
    groups = -(-K // group)
    return Layout(K, group, padded, groups, padded * groups)


def _factors(rows: Rows, w: WeightOperand, in_groups: bool) -> Factors:
    factors, one = rows.sum_factors, np.ones((1, 1), np.float32)
    of_rows = one if factors is None else factors.reshape(len(rows.values) if factors.size > 1 else 1, -1)
    of_features = one if w.row_scale is None else w.row_scale
    bias = one if w.bias is None else w.bias
    return Factors(
        _own(of_rows), factors is not None, _own(of_features), w.row_scale is not None, in_groups, _own(bias),
        w.bias is not None,
    )  # fmt: skip


def _own(array: Array) -> Array:
    """Return a contiguous, writeable array: Numba compiles again for one that is read-only."""
    array = np.ascontiguousarray(array)
    return array if array.flags.writeable else array.copy()


def _padded(rows: Rows, product: str, layout: Layout) -> Array:
    """Return the rows in the numbers of the product, flat, every group padded by zeros; themselves where they are that.

    A copy starts at a cache line, so that no vector of it lies in two.
    """
    if product != "int8" and rows.key is not None and not rows.key.is_packed and not rows.by_value:
        table = code_table(rows.key.dtype).view(np.uint32)
        flat = _lines_for(rows.values, layout, 4 if product == "float32" else 2)
        table = table if product == "float32" else (table >> np.uint32(16)).astype(np.uint16)
        return _copied(decode_rows, rows.values.view(np.uint8), table, layout, flat)
    values, shift = _bits(rows, product)
    if not shift and layout.stride == layout.K and values.flags.c_contiguous:
        return values.reshape(-1)
    return _copied(pad_rows, values, shift, layout, _lines_for(values, layout, 4 if shift else values.itemsize))


def _lines_for(values: Array, layout: Layout, item: int) -> Array:
    """Return memory for as many rows, in words of `item` bytes, from the start of a cache line on."""
    size, line = values.shape[0] * layout.stride, 64 // item
    buffer = np.empty(size + line, f"u{item}")
    first = -(buffer.ctypes.data // item) % line
    return buffer[first : first + size]


def _copied(kernel: Any, values: Array, how: Any, layout: Layout, flat: Array) -> Array:
    values = np.ascontiguousarray(values).view()
    # Read-only for all, so that Numba compiles once for tokens of either sort.
    values.flags.writeable = False
    grain = max(1, COPIED_BYTES // max(1, values[:1].nbytes))
    run_blocks(kernel, len(values), values, how, layout, flat, grain=grain)
    return flat


def _bits(rows: Rows, product: str) -> tuple[Array, int]:
    """Return the bits of the rows in the numbers of the product, and by how much they are still to be shifted left."""
    if product == "int8":
        return rows.values.view(np.uint8), 0
    if rows.key is None and rows.values.dtype == BFLOAT16:
        return rows.values.view(np.uint16), 16 if product == "float32" else 0
    if product == "float32":
        values = rows.as_float32()
        bits = values.view(np.uint32)
    else:
        values = rows.as_bfloat16()
        assert values is not None
        bits = values
    if values.ctypes.data != rows.values.ctypes.data:
        refuse_recording()
    return bits, 0


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
