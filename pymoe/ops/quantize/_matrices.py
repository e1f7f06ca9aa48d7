"""Whole matrices to codes and back: groups are found, scaled by the rules, and encoded by a backend."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pymoe.codec.e8m0 import decode_e8m0
from pymoe.codec.fp4 import decode_e2m1, unpack_nibbles
from pymoe.codec.fp8 import decode_e4m3
from pymoe.device.arrays import is_cuda, namespace
from pymoe.device.backend import uses_numba
from pymoe.errors import ArgumentError, ShapeError, complaint
from pymoe.ops.quantize import _numpy as definition
from pymoe.ops.quantize import _rules as rules
from pymoe.quantization import QuantKey

Array = Any


class Quantized(NamedTuple):
    """Codes (B, R, columns), scales (B, row blocks, column blocks), nvfp4's global scales (B,), zero points."""

    codes: Array
    scale: Array
    global_scale: Array | None
    zp: Array | None


def kernels(backend: str | None) -> Any:
    """Return the module that has `extremes` and `encode` for `backend`, or refuse its name."""
    if not uses_numba("quantize_activations", backend):
        return definition
    from pymoe.ops.quantize import _numba

    return _numba


def block_of(
    call: str, key: QuantKey, rows: int, columns: int, block_shape: Any = None, *, argument: str = "x"
) -> tuple[int, int]:
    """Return (rows, columns) of a block of `key` in a matrix, or refuse the block shape or the matrix."""
    kind = rules.layout(key)
    if block_shape is not None:
        given = _pair(call, block_shape)
        if kind != "block" or rules.is_mx(key) or key.dtype == "fp4":
            raise ArgumentError(complaint(call, "block_shape", f"be None for {key.name}", given))
    multiple = key.scale.group_shape.col if rules.is_mx(key) or key.dtype == "fp4" else 2 if key.is_packed else 1
    if columns < 1 or columns % multiple:
        rule = f"have a multiple of {multiple} columns for {key.name}" if multiple > 1 else "have at least one column"
        raise ShapeError(complaint(call, argument, rule, columns))
    if kind != "block":
        return (max(rows, 1) if kind == "tensor" else 1), columns
    row, column = key.scale.group_shape
    if block_shape is not None:
        row, column = (given[0] if row > 1 else 1), given[1]
    return row, columns if column == -1 else column


def _pair(call: str, block_shape: Any) -> tuple[int, int]:
    try:
        row, column = (int(extent) for extent in block_shape)
    except (TypeError, ValueError):
        raise ArgumentError(complaint(call, "block_shape", "be two integers", repr(block_shape))) from None
    if row < 0 or (column < 1 and column != -1):
        raise ArgumentError(complaint(call, "block_shape", "be (rows, columns) of a block", (row, column)))
    return max(row, 1), column


def quantize_matrices(
    x: Array,
    key: QuantKey,
    block: tuple[int, int],
    *,
    scale: Array | None = None,
    global_scale: Array | None = None,
    live: Array | None = None,
    backend: str | None = None,
) -> Quantized:
    """Return the codes and scales of every matrix of `x` (B, R, K), each for itself.

    `scale` (B, row blocks, column blocks) and `global_scale` (B,) replace those that the elements would give; `live`
    (R,) are the rows that a scale of the whole matrix is made of.
    """
    if is_cuda(x):
        from pymoe.ops.quantize import _cuda

        made = _cuda.quantize_matrices(x, key, block, scale=scale, global_scale=global_scale, live=live)
        if key.scale2 is None or made.global_scale is not None:
            return made
        return made._replace(global_scale=namespace(x).ones(x.shape[0], np.float32))
    B, R, K = x.shape
    module, coder = kernels(backend), rules.coder(key)
    codes = np.empty((B, R, K // 2 if key.is_packed else K), np.int8 if key.dtype == "int8" else np.uint8)
    row_blocks = 1 if rules.layout(key) == "tensor" else -(-R // block[0])
    grid = np.empty((B, row_blocks, -(-K // block[1])), np.float32 if key.scale.dtype == "float32" else np.uint8)
    zp = None if key.symmetric else np.empty(grid.shape, np.uint8)
    globals_ = None if key.scale2 is None else np.empty(B, np.float32)
    for e in range(B):
        if scale is not None:
            scaling = rules.given_scaling(key, scale[e])
            grid[e] = scaling.scale
        else:
            low, high = _extremes(module, x[e], key, block, live)
            if globals_ is not None:
                globals_[e] = _global_scale(key, low, high, None if global_scale is None else global_scale[e])
            scaling = module.scaling(key, low, high, None if globals_ is None else globals_[e], grid[e])
        if zp is not None:
            zp[e] = scaling.offset  # type: ignore[assignment]
        offset = rules.middle(key) if scaling.offset is None else scaling.offset
        module.encode(x[e], block, scaling.factor, offset, coder, codes[e])
    return Quantized(codes, grid, globals_, zp)


def _extremes(module: Any, x: Array, key: QuantKey, block: tuple[int, int], live: Array | None) -> tuple[Array, Array]:
    if rules.layout(key) != "tensor":
        return module.extremes(x, block, rules.poisons(key))
    # Row by row and then over the rows: the largest of the largest, whatever rows take part.
    low, high = module.extremes(x, (1, block[1]), False)
    if live is not None:
        low, high = low[live], high[live]
    return low.min(axis=0, initial=0, keepdims=True), high.max(axis=0, initial=0, keepdims=True)


def _global_scale(key: QuantKey, low: Array, high: Array, given: Any) -> np.float32:
    """Return nvfp4's global scale of one matrix: given, 1 for activations, else from the largest magnitude."""
    if given is not None:
        return np.float32(given)
    if not key.scale.static:
        return np.float32(1)
    amax = np.maximum(-low, high)
    return np.float32(rules.global_scale_of(amax.max(where=~np.isnan(amax), initial=0)))


def dequantize_matrix(
    codes: Array, key: QuantKey, block: tuple[int, int], scale: Array, global_scale: Any = None, zp: Array | None = None
) -> Array:
    """Return the float32 values of one matrix of codes; `scale` and `zp` are its grids of blocks."""
    with np.errstate(all="ignore"):
        values = _values(codes, key)
        if zp is not None:
            values -= definition.spread(zp.astype(np.float32), values.shape, block)
        values = values * definition.spread(float_scale(scale, key), values.shape, block)
        if global_scale is None:
            return values
        return values * global_scale if key.scale.static else values / global_scale


def float_scale(scale: Array, key: QuantKey) -> Array:
    """Return scales in float32, whatever they are stored in."""
    if scale.dtype != np.uint8:
        return scale
    return decode_e4m3(scale) if key.scale.dtype == "fp8" else decode_e8m0(scale)


def _values(codes: Array, key: QuantKey) -> Array:
    if key.dtype == "fp8":
        return decode_e4m3(codes)
    if key.dtype == "fp4":
        return decode_e2m1(unpack_nibbles(codes))
    whole = unpack_nibbles(codes) if key.is_packed else codes
    return whole.astype(np.float32) - np.float32(rules.middle(key))
