"""The same bits as ``_numpy.py``, a row at a time: integer arithmetic on the bits of the floats, which vectorizes."""

from __future__ import annotations

from typing import Any

import numpy as np

from pymoe.device.arrays import BFLOAT16, as_float32
from pymoe.device.numba_cpu import jit
from pymoe.device.threads import refuse_recording, run_blocks
from pymoe.ops.quantize import _numpy as definition
from pymoe.ops.quantize import _rules as rules
from pymoe.ops.quantize._rules import Coder, Scaling
from pymoe.quantization import QuantKey

Array = Any

_KINDS = {"e4m3": 0, "e2m1": 1, "rint": 2, "away": 3, "trunc": 4}
_GRAIN = 1 << 17
"""Elements that are worth waking a thread for: about 0.1 ms of work."""

_SIGN, _MAGNITUDE = np.int32(-(1 << 31)), np.int32(0x7FFFFFFF)
_INFINITY, _LARGEST, _NAN = np.int32(0x7F800000), np.int32(0x7F7FFFFF), np.int32(0x7FC00000)
_ROUNDER = np.float32(1.5 * 2**23)
"""Added and taken away again it rounds magnitudes below 2^22 to integers, ties to even."""


def extremes(x: Array, block: tuple[int, int], poison: bool) -> tuple[Array, Array]:
    """See ``_numpy.extremes``."""
    R, K = x.shape
    low, high = np.empty((2, -(-R // block[0]), -(-K // block[1])), np.float32)
    bits, shift = _bits(x)
    grain = max(1, _GRAIN // max(1, block[0] * K))
    run_blocks(
        _extremes, len(low), bits, shift, block[0], block[1], poison, low.view(np.int32), high.view(np.int32),
        grain=grain,
    )  # fmt: skip
    return low, high


def scaling(key: QuantKey, low: Array, high: Array, global_scale: Array | None, stored: Array) -> Scaling:
    """See ``_numpy.scaling``."""
    if not rules.is_made_by_group(key):
        refuse_recording()
        return definition.scaling(key, low, high, global_scale, stored)
    factor, divides, by_row = np.empty_like(stored), rules.coder(key).divides, rules.layout(key) == "row"
    floors = (np.float32(0), rules.TOKEN_FLOOR) if key.dtype == "fp8" and by_row else (rules.TINY_AMAX, np.float32(0))
    run_blocks(
        _scale_groups, len(low), low, high, rules.largest(key), *floors, divides, key.dtype == "fp8", stored, factor,
        grain=max(1, _GRAIN // max(1, low.shape[1])),
    )  # fmt: skip
    return Scaling(stored, factor)


def encode(x: Array, block: tuple[int, int], factor: Array, offset: Array | float, coder: Coder, out: Array) -> None:
    """See ``_numpy.encode``."""
    R, K = x.shape
    bits, shift = _bits(x)
    factor = np.ascontiguousarray(factor, np.float32)
    offset = np.full(factor.shape, offset, np.float32)
    run_blocks(
        _encode, R, bits, shift, block[0], block[1], factor, offset, _KINDS[coder.kind], coder.divides,
        np.float32(coder.low), np.float32(coder.high), out.view(np.uint8), grain=max(1, _GRAIN // max(1, K)),
    )  # fmt: skip


def _bits(x: Array) -> tuple[Array, int]:
    """Return the bits of `x`, and by how much they are shifted left to be those of a float32."""
    if x.dtype == BFLOAT16:
        return np.ascontiguousarray(x).view(np.uint16), 16
    bits = as_float32(x).view(np.uint32)
    if bits.ctypes.data != x.ctypes.data:
        refuse_recording()
    return bits, 0


@jit
def _load(bits, r, shift, row):
    for k in range(row.size):
        row[k] = np.uint32(bits[r, k]) << np.uint32(shift)


@jit
def _extremes(start, stop, bits, shift, block_rows, block_columns, poison, low, high):
    """Write the bits of both extremes; `low` and `high` come as int32."""
    R, K = bits.shape
    row = np.empty(K, np.uint32)
    signed = row.view(np.int32)
    columns = low.shape[1]
    largest = np.empty(columns, np.int32)
    for b in range(start, stop):
        for c in range(columns):
            largest[c] = low[b, c] = high[b, c] = 0
        for r in range(b * block_rows, min(R, (b + 1) * block_rows)):
            _load(bits, r, shift, row)
            for c in range(columns):
                lo, hi, size = _range(signed, c * block_columns, min(K, (c + 1) * block_columns))
                low[b, c] = max(low[b, c], lo)
                high[b, c] = max(high[b, c], hi)
                largest[c] = max(largest[c], size)
        for c in range(columns):
            if poison and largest[c] > _INFINITY:
                low[b, c] = _NAN
                high[b, c] = _NAN
            else:
                low[b, c] = min(low[b, c], _LARGEST) | _SIGN
                high[b, c] = min(high[b, c], _LARGEST)


@jit
def _scale_groups(start, stop, low, high, largest, least_amax, least_scale, divides, inverts, scale, factor):
    """Write the scale of each group and what its elements are divided by or multiplied with, as ``_rules`` says."""
    for b in range(start, stop):
        for c in range(low.shape[1]):
            below, amax = -low[b, c], high[b, c]
            # Comparisons with NaN are false: a poisoned group keeps its NaN.
            amax = abs(below if not below <= amax else amax)
            amax = least_amax if amax < least_amax else amax
            step = np.float32(amax / largest)
            step = least_scale if step < least_scale else step
            scale[b, c] = np.float32(np.nan) if step != step else step
            if divides:
                factor[b, c] = step
            elif inverts:
                factor[b, c] = np.float32(1) / step
            else:
                factor[b, c] = largest / amax


@jit
def _range(bits, first, last):
    """Return the bits of the largest magnitude below 0, above 0, and of all, the first two without NaN."""
    lo, hi, size = np.int32(0), np.int32(0), np.int32(0)
    part = bits[first:last]  # a loop from 0 becomes vectors, one from a first index does not
    for k in range(part.size):
        magnitude = np.int32(part[k] & _MAGNITUDE)
        value = np.int32(part[k] if magnitude <= _INFINITY else 0)
        # Among floats of one sign the bits grow with the magnitude; those of the other sign are below 0.
        hi = max(hi, value)
        lo = max(lo, np.int32(value ^ _SIGN))
        size = max(size, magnitude)
    return lo, hi, size


@jit
def _encode(
    start, stop, bits, shift, block_rows, block_columns, factor, offset, kind, divides, low, high, out
):  # fmt: skip
    K = bits.shape[1]
    loaded = np.empty(K, np.uint32)
    row = loaded.view(np.float32)
    codes = np.empty(K, np.uint8)
    packed = out.shape[1] != K
    for r in range(start, stop):
        _load(bits, r, shift, loaded)
        b = r // block_rows
        for c in range(factor.shape[1]):
            part, f = row[c * block_columns : min(K, (c + 1) * block_columns)], factor[b, c]
            if divides:
                for k in range(part.size):
                    part[k] = part[k] / f
            else:
                for k in range(part.size):
                    part[k] = part[k] * f
        if kind == 0:
            _e4m3(row, codes)
        elif kind == 1:
            _e2m1(row, codes)
        else:
            for c in range(factor.shape[1]):
                first, last = c * block_columns, min(K, (c + 1) * block_columns)
                _integers(row, first, last, kind, offset[b, c], low, high, codes)
        if packed:
            for k in range(out.shape[1]):
                out[r, k] = codes[2 * k] | (codes[2 * k + 1] << 4)
        else:
            for k in range(K):
                out[r, k] = codes[k]


@jit
def _e4m3(values, codes):
    bits: Any = values.view(np.int32)
    for k in range(values.size):
        size = np.int32(bits[k] & _MAGNITUDE)
        sign = (bits[k] >> 24) & 0x80
        small = np.float32(abs(values[k]) + np.float32(16384.0)).view(np.int32) - np.int32(0x46800000)
        capped = np.int32(min(size, np.int32(0x43E00000)))
        normal = ((capped + 0x7FFFF + ((capped >> np.int32(20)) & 1)) >> 20) - 960
        code = (small if size < 0x3C800000 else normal) | sign
        codes[k] = np.uint8(code if size <= _INFINITY else 0x7F)


@jit
def _e2m1(values, codes):
    bits: Any = values.view(np.int32)
    for k in range(values.size):
        size = np.int32(bits[k] & _MAGNITUDE)
        sign = (bits[k] >> 28) & 8
        small = np.float32(abs(values[k]) + np.float32(4194304.0)).view(np.int32) - np.int32(0x4A800000)
        capped = np.int32(min(size, np.int32(0x40C00000)))
        normal = ((capped + 0x1FFFFF + ((capped >> np.int32(22)) & 1)) >> 22) - 252
        code = (small if size < 0x3F800000 else normal) | sign
        codes[k] = np.uint8(code if size <= _INFINITY else 0)


@jit
def _integers(values, first, last, kind, offset, low, high, codes):
    least, most = np.float32(low - offset), np.float32(high - offset)
    part, coded = values[first:last], codes[first:last]
    for k in range(part.size):
        y = part[k]
        y = np.float32(0) if y != y else y
        y = least if y < least else (most if y > most else y)
        if kind == 2:
            whole = np.int32((y + _ROUNDER) - _ROUNDER)
        else:
            whole = np.int32(y)
            if kind == 3:
                rest = y - np.float32(whole)
                whole = np.int32(whole + (rest >= np.float32(0.5)) - (rest <= np.float32(-0.5)))
        coded[k] = np.uint8(whole + np.int32(offset))
