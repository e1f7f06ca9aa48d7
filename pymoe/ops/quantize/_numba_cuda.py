"""Quantize on the GPU in Numba: activations in fp8 and int8, one block of threads for what shares a scale.

The codes and scales are bit for bit those of ``docs/numerics``.  Largest magnitudes are compared as integers: the bits
of floats without a sign are in the order of the floats, and NaN is above them all.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import uint32

from pymoe.codec._numba_cuda import decode, encode_e4m3, format_of
from pymoe.device.arrays import namespace
from pymoe.device.numba_gpu import bits_of, cuda, device, everywhere, kernel, launch, product, require
from pymoe.errors import UnsupportedError, complaint
from pymoe.ops.quantize import _rules as rules
from pymoe.quantization import QuantKey

__all__ = ["quantize", "quantize_alone", "shapes", "supports"]

Array = Any

THREADS = 128
_GRID_Y = 65535

FP8_TENSOR, FP8_TOKEN, FP8_GROUP, INT8_TENSOR, INT8_TOKEN, INT8_GROUP = range(6)
_KINDS = {"tensor": 0, "row": 1, "block": 2}

_SIZE, _INFINITY, _LARGEST, _QUIET = 0x7FFFFFFF, 0x7F800000, 0x7F7FFFFF, 0x7FC00000
_NAN = np.float32(np.nan)
_ONE, _HALF, _448, _127 = np.float32(1), np.float32(0.5), np.float32(448), np.float32(127)
_FLT_MIN, _TINY, _TOKEN_FLOOR = np.float32(rules.FLT_MIN), np.float32(rules.TINY_AMAX), np.float32(rules.TOKEN_FLOOR)
_ROUNDER = np.float32(1.5 * 2**23)
"""Adding and subtracting it rounds a small float32 to a whole number, ties to even."""


# docs: rules
@device
def scale_of(amax, rule):
    """Return the scale of elements up to `amax` in magnitude; NaN of NaN."""
    if rule == FP8_TENSOR:
        scale = amax / _448
        return _ONE if amax == 0 else (scale if scale > _FLT_MIN else _FLT_MIN)
    if rule == FP8_TOKEN:
        scale = amax / _448
        return scale if scale > _TOKEN_FLOOR else _TOKEN_FLOOR
    if rule == INT8_TENSOR:
        scale = amax / _127
        return scale if scale > _TINY else _TINY
    largest = _448 if rule == FP8_GROUP else _127
    return (_TINY if amax < _TINY else amax) / largest


@device
def power_above(scale):
    """Return the e8m0 code of the least power of two that is at least `scale`: its exponent, plus 1 for a fraction."""
    bits = np.int64(scale.view(np.uint32))
    return (bits >> 23) + (1 if bits & 0x7FFFFF else 0)


@device
def factor_of(scale, amax, rule):
    """Return what an element is divided by (token of fp8, tensor and group of int8), else multiplied with."""
    if rule == FP8_TOKEN or rule == INT8_TENSOR or rule == INT8_GROUP:
        return scale
    if rule == INT8_TOKEN:
        return _127 / (_TINY if amax < _TINY else amax)
    return _ONE / scale


@device
def code_of(x, factor, rule):
    """Return the 8 bits that stand for `x`."""
    if rule == FP8_TENSOR or rule == FP8_GROUP:
        return encode_e4m3(product(x, factor))
    if rule == FP8_TOKEN:
        return encode_e4m3(np.float32(x / factor))
    y = product(x, factor) if rule == INT8_TOKEN else np.float32(x / factor)
    if y != y:
        return np.uint32(0)
    y = min(max(y, np.float32(-128)), _127)
    if rule == INT8_TENSOR:  # to the nearest, ties to even
        whole = np.int64(np.float32(np.float32(y + _ROUNDER) - _ROUNDER))
    else:  # towards zero; tokens then away from it where at least a half was cut off
        whole = np.int64(y)
        rest = np.float32(y - np.float32(whole))
        if rule == INT8_TOKEN and rest >= _HALF:
            whole += 1
        if rule == INT8_TOKEN and rest <= -_HALF:
            whole -= 1
    return np.uint32(whole & 0xFF)


# end: rules


# docs: largest
@device
def magnitude(x, keeps_nan):
    """Return the bits of ``|x|``: infinity counts as the largest number, NaN as 0 unless it is to be kept."""
    size = np.int64(x.view(np.uint32)) & _SIZE
    if size > _INFINITY:
        return np.int64(_QUIET) if keeps_nan else np.int64(0)
    return min(size, np.int64(_LARGEST))


@device
def largest_of_block(mine):
    """Return the largest of the numbers that the threads of this block bring, to each of them."""
    found = cuda.shared.array(THREADS, uint32)
    thread = cuda.threadIdx.x
    found[thread] = mine
    cuda.syncthreads()
    reach = THREADS // 2
    while reach:
        if thread < reach:
            found[thread] = max(found[thread], found[thread + reach])
        cuda.syncthreads()
        reach //= 2
    return found[0]


@device
def is_live(places, row):
    """Return whether any of the places of a row is one: a token that no expert here computes has none."""
    for j in range(places.shape[1]):
        if places[row, j] >= 0:
            return True
    return False


# end: largest


# docs: groups
@kernel
def quantize_groups_kernel(codes, scales, x, form, group, rule, in_powers, places):
    """Quantize one group of columns of one row: ``blockIdx.x`` is the row, ``blockIdx.y`` the group."""
    row, thread = cuda.blockIdx.x, cuda.threadIdx.x
    if not is_live(places, row):
        return
    g = cuda.blockIdx.y
    while g < scales.shape[1]:
        first, last = g * group, min((g + 1) * group, x.shape[1])
        mine = np.int64(0)
        for k in range(first + thread, last, THREADS):
            mine = max(mine, magnitude(decode(x[row, k], form), rule >= INT8_TENSOR))
        amax = np.uint32(largest_of_block(mine)).view(np.float32)
        scale = scale_of(amax, rule)
        if in_powers:
            power = power_above(scale)
            scale = np.uint32(power << 23).view(np.float32)
            if thread == 0:
                scales[row, g] = power
        elif thread == 0:
            scales[row, g] = scale if scale == scale else _NAN
        factor = factor_of(scale, amax, rule)
        for k in range(first + thread, last, THREADS):
            codes[row, k] = code_of(decode(x[row, k], form), factor, rule)
        cuda.syncthreads()  # the threads' common memory is about to be used again
        g += cuda.gridDim.y


# end: groups


@kernel
def find_largest_kernel(largest, x, form, places):
    """Write the bits of the largest magnitude of each row, 0 where the row is not live."""
    row, mine = cuda.blockIdx.x, np.int64(0)
    if is_live(places, row):
        for k in range(cuda.threadIdx.x, x.shape[1], THREADS):
            mine = max(mine, magnitude(decode(x[row, k], form), False))
    found = largest_of_block(mine)
    if cuda.threadIdx.x == 0:
        largest[row] = found


@kernel
def scale_tensor_kernel(scale, largest, rule):
    """Write the scale of all rows; one block."""
    mine = np.int64(0)
    for row in range(cuda.threadIdx.x, largest.shape[0], THREADS):
        mine = max(mine, np.int64(largest[row]))
    amax = np.uint32(largest_of_block(mine)).view(np.float32)
    if cuda.threadIdx.x == 0:
        scale[0] = scale_of(amax, rule)


@kernel
def quantize_tensor_kernel(codes, x, form, scale, rule, places):
    """Quantize a row by the one scale that there is."""
    row = cuda.blockIdx.x
    if not is_live(places, row):
        return
    factor = factor_of(scale[0], scale[0], rule)
    for k in range(cuda.threadIdx.x, x.shape[1], THREADS):
        codes[row, k] = code_of(decode(x[row, k], form), factor, rule)


def supports(key: QuantKey | None) -> bool:
    """Return whether activations can be quantized under `key`; None leaves them as they are."""
    return key is None or (key.dtype in ("fp8", "int8") and not rules.is_mx(key))


def shapes(key: QuantKey, rows: int, columns: int) -> tuple[tuple[tuple[int, ...], Any], ...]:
    """Return (shape, dtype) of the codes, the scales and the scratch memory of `quantize`."""
    kind = rules.layout(key)
    width = key.scale.group_shape.col if kind == "block" else columns
    scales = (1,) if kind == "tensor" else (rows, -(-columns // width))
    codes = np.dtype(np.int8 if key.dtype == "int8" else np.uint8)
    stored = np.dtype(np.uint8 if key.scale.dtype == "e8m0" else np.float32)
    return ((rows, columns), codes), (scales, stored), ((rows if kind == "tensor" else 0,), np.dtype(np.uint32))


def quantize(
    x: Array, key: QuantKey, given: Array | None, places: Array, codes: Array, scale: Array, scratch: Array
) -> None:
    """Quantize the rows of `x` (R, K) that have a place, into arrays of `shapes`; the other rows are left alone.

    Parameters
    ----------
    given : array, (1,), float32, optional
        The scale, of a static scheme; `scale` is not written then.
    places : array, (R, n), int32
        A row is live where one of its numbers is 0 or more.
    """
    R, form, kind = x.shape[0], format_of(x.dtype), rules.layout(key)
    rule = (FP8_TENSOR if key.dtype == "fp8" else INT8_TENSOR) + _KINDS[kind]
    x, codes = bits_of(x), bits_of(codes)
    if kind != "tensor":
        group = key.scale.group_shape.col if kind == "block" else x.shape[1]
        grid = (R, min(scale.shape[1], _GRID_Y))
        launch(
            quantize_groups_kernel, grid, THREADS, codes, scale, x, form, group, rule, scale.dtype == np.uint8, places
        )
        return
    if given is None:
        launch(find_largest_kernel, (R,), THREADS, scratch, x, form, places)
        launch(scale_tensor_kernel, (1,), THREADS, scale, scratch, rule)
    launch(quantize_tensor_kernel, (R,), THREADS, codes, x, form, scale if given is None else given, rule, places)


def quantize_alone(call: str, x: Array, key: QuantKey, given: Array | None, live: Array | None) -> tuple[Array, Array]:
    """Return (codes, scale) of all rows of `x`, or of the rows where `live` is true."""
    require(call, x)
    if not supports(key):
        raise UnsupportedError(complaint(call, "backend", "be another for this scheme", f"numba_cuda for {key.name}"))
    xp = namespace(x)
    codes, scale, scratch = (xp.empty(shape, dtype) for shape, dtype in shapes(key, *x.shape))
    given = None if given is None else given.reshape(1)
    places = everywhere(x, 0, (x.shape[0], 1), np.int32) if live is None else live.astype(np.int32)[:, None] - 1
    quantize(x, key, given, places, codes, scale, scratch)
    return codes, scale if given is None else given
