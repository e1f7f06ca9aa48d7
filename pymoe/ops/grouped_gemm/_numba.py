"""Grouped GEMM on the CPU: units of one expert, some output features and some rows, on our own threads.

Where products are exact in bfloat16 or int8 and the CPU has instructions for those, they do it; else float32 lanes.
Each way weights are multiplied straight from memory where that is cheap; otherwise a unit decodes its features into a
buffer first.  Both give the same bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pymoe.codec.weights import WeightOperand
from pymoe.device.instructions import best_dot
from pymoe.device.threads import refuse_recording, run_blocks
from pymoe.ops.grouped_gemm import _numba_codes_ir as formats
from pymoe.ops.grouped_gemm._lanes import FLOAT32, LANES, PAIRS, QUADS
from pymoe.ops.grouped_gemm._numba_dots import multiply_decoded, multiply_straight
from pymoe.ops.grouped_gemm._numba_tiles import TILE_FEATURES, multiply_tiles
from pymoe.ops.grouped_gemm._numba_units import (
    FEATURES,
    Codes,
    Factors,
    Layout,
    Scaling,
    Task,
    decode_tokens,
    list_units,
    most_units,
)
from pymoe.ops.grouped_gemm._operands import Array, Rows, group_of, product_of
from pymoe.quantization import QuantKey

BLOCK_WEIGHTS = 1 << 20
"""Weights that a thread takes at a time at least: reading them takes some 100 us, handing over work some 20."""
COPIED_BYTES = 1 << 21
"""Of rows that a thread pads at a time at least."""
EXACT_GROUP = 1024
"""Products of two int8 codes whose sum is exact in float32: 1024 * 128 * 128 = 2^24."""

_KINDS = {
    "fp8": formats.E4M3,
    "int8": formats.INT8,
    "uint8b128": formats.UINT8B128,
    "uint8": formats.UINT8,
    "fp4": formats.E2M1,
    "uint4b8": formats.UINT4B8,
    "uint4": formats.UINT4,
}
_FLOAT32, _PAIRS, _QUADS = ((0,) * (kind + 1) for kind in (FLOAT32, PAIRS, QUADS))


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
    kind = {"float32": _FLOAT32, "bfloat16": _PAIRS, "int8": _QUADS}[plan.product]
    item = {"float32": 4, "bfloat16": 2, "int8": 1}[plan.product]
    layout = plan.layout._replace(stride=plan.layout.stride * item)
    padded = _padded(rows, plan, layout, kind)
    weights = np.ascontiguousarray(w.codes)
    if weights is not w.codes:
        refuse_recording()
    codes, before = _codes(w.key, weights.dtype, weights.ctypes.data), w.group_scale is not None and not plan.in_groups
    straight = not before and _is_straight(plan, w)
    kernel: Any
    how: tuple[Any, ...]
    if plan.instructions == "tiles":
        kernel, how = multiply_tiles, (kind, straight)
    else:
        kernel, how = (multiply_straight, ()) if straight else (multiply_decoded, (kind,))
        if straight and plan.product != "float32":
            codes = codes._replace(kind=kind, unit_bytes=64)
    features = TILE_FEATURES if plan.instructions == "tiles" else FEATURES
    E, N = w.codes.shape[:2]
    units, count = np.empty((most_units(len(out), E, N, features), 3), np.int64), np.empty(1, np.int64)
    run_blocks(list_units, 1, expert_offsets, N, features, units, count)
    task = Task(
        units, expert_offsets, gather, padded.ctypes.data, codes, layout, _scaling(w, before),
        _factors(rows, w, plan.in_groups),
    )  # fmt: skip
    run_blocks(kernel, count, *how, task, out, grain=max(1, BLOCK_WEIGHTS // (features * w.K)))


def _is_straight(plan: _Plan, w: WeightOperand) -> bool:
    """Whether weights without scales by value are multiplied as they lie in memory."""
    if plan.layout.padded * plan.layout.groups != w.K or w.zp is not None:
        return False
    if plan.product != "float32":
        return w.key is None or plan.product == "int8"
    return w.key is None or not w.key.is_packed


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
    return _Plan("float32", None, _layout(w.K, group, LANES), in_groups)


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


def _padded(rows: Rows, plan: _Plan, layout: Layout, kind: tuple[int, ...]) -> Array:
    """Return the bytes of the rows in what is multiplied, padded by zeros; the rows' own where they are that."""
    dtype = rows.values.dtype
    source = _codes(rows.key, dtype, rows.values.ctypes.data)
    is_it = source.kind == kind or (rows.key is None and dtype.itemsize == 2 and kind == _PAIRS) or kind == _QUADS
    full = layout.padded * layout.groups == layout.K
    values = np.ascontiguousarray(rows.values).view(np.uint8).reshape(-1)
    if is_it and full and rows.values.flags.c_contiguous:
        return values
    # Read-only for all, so that Numba compiles once for tokens of either sort.
    values.flags.writeable = False
    flat = (np.empty if full else np.zeros)(len(rows.values) * layout.stride, np.uint8)
    scale = np.ones((1, 1, 1), np.float32)
    extent = layout.group
    if rows.by_value and rows.factors is not None and rows.key is not None:
        scale, extent = _own(rows.factors[None]), rows.key.scale.group_shape.col
        refuse_recording()
    how = source, layout, Scaling(scale, _NOTHING, rows.by_value, 1, extent, _NO_ZEROS, 0)
    run_blocks(decode_tokens, len(rows.values), kind, values, how, flat, grain=max(1, COPIED_BYTES // layout.stride))
    return flat


def _codes(key: QuantKey | None, dtype: Any, address: int) -> Codes:
    if key is not None:
        kind = _KINDS[key.dtype]
    elif dtype == np.float32:
        kind = FLOAT32
    else:
        kind = formats.FLOAT16 if dtype == np.float16 else formats.BFLOAT16
    return Codes(address, (0,) * (kind + 1), formats.STEP_BYTES[kind])


_NOTHING = np.zeros(1, np.float32)
_NOTHING.flags.writeable = False
_NO_ZEROS = np.zeros((1, 1, 1), np.uint8)


def _scaling(w: WeightOperand, before: bool) -> Scaling:
    scale, table, zp = np.ones((1, 1, 1), np.float32), _NOTHING, _NO_ZEROS
    if w.group_scale is not None:
        scale = _own(w.group_scale)
        table = w.scale_table if scale.dtype == np.uint8 else table
    zp_kind = 0
    if w.zp is not None and w.key is not None:
        zp, zp_kind = _own(w.zp), 2 if w.key.is_packed else 1
    return Scaling(scale, table, before, w.block[0], w.block[1], zp, zp_kind)
