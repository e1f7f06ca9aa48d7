"""The definition: extremes of groups, elements to codes, codes to values, for one matrix at a time."""

from __future__ import annotations

from typing import Any

import numpy as np

from pymoe.codec.fp4 import encode_e2m1, pack_nibbles
from pymoe.codec.fp8 import encode_e4m3
from pymoe.ops.quantize import _rules as rules
from pymoe.ops.quantize._rules import FLT_MAX, Coder, Scaling
from pymoe.quantization import QuantKey

Array = Any


def spread(grid: Array, shape: tuple[int, int], block: tuple[int, int]) -> Array:
    """Return the values of a grid of blocks at each element of a matrix of `shape`, or broadcastable to it."""
    for axis in (0, 1):
        if grid.shape[axis] != 1 and block[axis] != 1:
            grid = np.repeat(grid, block[axis], axis=axis)
    return grid[: shape[0], : shape[1]]


def extremes(x: Array, block: tuple[int, int], poison: bool) -> tuple[Array, Array]:
    """Return (low, high), float32, of each block: least and largest element, but at most 0 and at least 0.

    Parameters
    ----------
    x : ndarray, (R, K), float
    block : (int, int)
        Rows and columns of a block; the last ones may be smaller.
    poison : bool
        Whether a NaN makes its block's extremes NaN; else it is ignored.  Infinity counts as the largest float32.
    """
    R, K = x.shape
    grid = (-(-R // block[0]), -(-K // block[1]))
    low, high = np.zeros((2, *grid), np.float32)
    if not low.size:
        return low, high
    with np.errstate(all="ignore"):
        x = x.astype(np.float32)
        nan = np.isnan(x)
        x = np.where(nan, np.float32(0), np.clip(x, -FLT_MAX, FLT_MAX))
        np.minimum(_reduce(np.minimum, x, block), np.float32(0), out=low)
        np.maximum(_reduce(np.maximum, x, block), np.float32(0), out=high)
    if poison and nan.any():
        poisoned = _reduce(np.logical_or, nan, block)
        low[poisoned] = high[poisoned] = np.nan
    return low, high


def _reduce(pick: np.ufunc, x: Array, block: tuple[int, int]) -> Array:
    columns = pick.reduceat(x, np.arange(0, x.shape[1], block[1]), axis=1)
    return pick.reduceat(columns, np.arange(0, x.shape[0], block[0]), axis=0)


def scaling(key: QuantKey, low: Array, high: Array, global_scale: Array | None, stored: Array) -> Scaling:
    """Return the scaling of groups by ``_rules.scaling``; the scales themselves are written to `stored` too."""
    made = rules.scaling(key, low, high, global_scale)
    stored[...] = made.scale
    return made


def encode(x: Array, block: tuple[int, int], factor: Array, offset: Array | float, coder: Coder, out: Array) -> None:
    """Write to `out` the codes of `x` (R, K): (R, K/2) bytes for 4-bit codes, else (R, K).

    `factor`, and `offset` unless it is one number, are grids of blocks, float32.
    """
    with np.errstate(all="ignore"):
        wide = spread(factor, x.shape, block)
        x = x.astype(np.float32)
        y = x / wide if coder.divides else x * wide
        if coder.kind == "e4m3":
            out[...] = encode_e4m3(y)
        elif coder.kind == "e2m1":
            out[...] = pack_nibbles(encode_e2m1(y))
        else:
            shift = np.float32(offset) if np.ndim(offset) == 0 else spread(offset, x.shape, block)
            codes = _integers(y, shift, coder)
            out[...] = pack_nibbles(codes.astype(np.uint8)) if coder.high == 15 else codes.astype(out.dtype)


def _integers(y: Array, offset: Array, coder: Coder) -> Array:
    """Return rounded, shifted and clamped `y`, still float32."""
    whole = np.rint(y)
    if coder.kind != "rint":
        whole = np.trunc(y)
    if coder.kind == "away":
        # y - trunc(y) is exact, where y + 0.5 would round just below a half up.
        whole = whole + np.where(np.abs(y - whole) >= np.float32(0.5), np.copysign(np.float32(1), y), np.float32(0))
    return np.where(np.isnan(y), offset, np.clip(whole + offset, np.float32(coder.low), np.float32(coder.high)))
