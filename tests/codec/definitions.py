"""Quantizers written a second time, slowly and from the formulas alone: the tests' measure of pymoe's.

Nothing here is shared with pymoe.  Values of codes are written as sums of powers of two; the nearest code is looked
up among exact midpoints in float64, in which every float32 and every midpoint is a number.
"""

from __future__ import annotations

import math

import numpy as np

F = np.float32
E4M3 = [(m * 2.0**-9 if e == 0 else (8 + m) * 2.0 ** (e - 10)) for e in range(16) for m in range(8)][:127]
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


@np.errstate(invalid="ignore")  # a signalling NaN warns when it is cast
def nearest(x, values, sign_bit, nan_code):
    """Code of the value nearest to each x, ties to the even code, saturating; the sign bit is x's."""
    x = np.asarray(x, np.float64)
    size, values = np.abs(x), np.array(values)
    middle = (values[1:] + values[:-1]) / 2
    below = np.searchsorted(middle, size, side="left")  # number of midpoints below |x|
    on_tie = (below < len(middle)) & (size == middle[np.minimum(below, len(middle) - 1)])
    codes = np.where(on_tie & (below % 2 == 1), below + 1, below)
    codes = np.where(np.signbit(x), codes | sign_bit, codes)
    return np.where(np.isnan(x), nan_code, codes).astype(np.uint8)


def e4m3(x):
    return nearest(x, E4M3, 0x80, 0x7F)


def e2m1(x):
    return nearest(x, E2M1, 8, 0)


def e4m3_value(code):
    if code & 0x7F == 0x7F:
        return math.nan
    return math.copysign(E4M3[code & 0x7F], -1.0 if code & 0x80 else 1.0)


def power_at_least(x):
    """Exponent n of the smallest power of two with 2**n >= x, exact."""
    mantissa, n = math.frexp(float(x))  # x = mantissa * 2**n with mantissa in [0.5, 1)
    return n - 1 if mantissa == 0.5 else n


def magnitude(group):
    """Largest magnitude of a float32 group without its NaN, infinity counted as the largest float32."""
    finite = [min(abs(float(v)), float(np.finfo(F).max)) for v in np.ravel(group) if not math.isnan(v)]
    return F(max(finite, default=0.0))


def has_nan(group):
    return bool(np.isnan(group).any())


def clamp_int(y, low, high, code_of_nan=0):
    return np.where(np.isnan(y), code_of_nan, np.clip(y, low, high))


def half_away(y):
    """Nearest integer, ties away from zero, in float64 (where adding a half to a float32 is exact)."""
    y = np.asarray(y, np.float64)
    return np.copysign(np.floor(np.abs(y) + 0.5), y)


def _static_floor(amax, largest):
    return F(1) if amax == 0 else max(F(amax) / F(largest), F(2.0**-126))


@np.errstate(all="ignore")
def fp8(group, form, static=False):
    """(codes, scale) of one group under an fp8 key; `form` is tensor, row, block, ue8m0 or mx."""
    amax = magnitude(group)
    if form == "mx":
        n = max(power_at_least(float(amax) / 448.0) if amax > 2.0**-119 else -127, -127)
        return e4m3(np.asarray(group, np.float64) * 2.0**-n), n + 127
    if static or form == "tensor":
        scale = _static_floor(amax, 448)
    elif form == "row":
        scale = max(amax / F(448), F(1) / F(448 * 512))
    else:
        scale = max(amax, F(1e-10)) / F(448)
    if form == "ue8m0":
        n = power_at_least(scale)
        return e4m3(np.asarray(group, np.float64) * 2.0**-n), n + 127
    y = group / scale if form == "row" else group * (F(1) / scale)
    return e4m3(y), scale


@np.errstate(all="ignore")
def int8(group, form, static=False):
    """(codes, scale) of one group under an int8 key; `form` is tensor, row or block."""
    amax = magnitude(group)
    if has_nan(group) and form != "tensor":
        return np.zeros(group.shape, np.int8), F(np.nan)
    if static:
        scale = _static_floor(amax, 127)
        y = np.rint(group / scale)
    elif form == "tensor":
        scale = max(amax / F(127), F(1e-10))
        y = np.rint(group / scale)
    elif form == "row":
        amax = max(amax, F(1e-10))
        scale = amax / F(127)
        y = half_away(np.clip(group * (F(127) / amax), F(-200), F(200)))
    else:
        scale = max(amax, F(1e-10)) / F(127)
        y = np.trunc(np.clip(group / scale, -128, 127))
    return clamp_int(y, -128, 127).astype(np.int8), scale


@np.errstate(all="ignore")
def mxfp4(group):
    if has_nan(group):
        return np.zeros(group.shape, np.uint8), 255
    amax = magnitude(group)
    mantissa, n = math.frexp(float(amax))
    exponent = (n - 1 + (mantissa >= 0.875)) - 2 if amax > 0 else -127
    exponent = max(exponent, -127)
    return e2m1(np.asarray(group, np.float64) * 2.0**-exponent), exponent + 127


@np.errstate(all="ignore")
def nvfp4(group, global_scale, multiplies):
    """(codes, e4m3 scale) of one group of 16."""
    if has_nan(group):
        return np.zeros(group.shape, np.uint8), 0x7F
    sixth, g = magnitude(group) / F(6), F(global_scale)
    code = int(e4m3(sixth / g if multiplies else g * sixth))
    block = F(e4m3_value(code))
    factor = F(0) if block == 0 else F(1) / (block * g if multiplies else block / g)
    return e2m1(group * factor), code


@np.errstate(all="ignore")
def weight_only(group, bits, symmetric):
    """(codes, scale, zero point) of one group of unsigned integers."""
    half, last = 1 << (bits - 1), (1 << bits) - 1
    if has_nan(group):
        return np.full(group.shape, half if symmetric else 0, np.uint8), F(np.nan), half if symmetric else 0
    biggest = np.finfo(F).max
    low = min(F(0), F(max(group.min(), -biggest)))
    high = max(F(0), F(min(group.max(), biggest)))
    if symmetric:
        scale = max(high / F(half - 1), -low / F(half))
        scale = F(1) if scale == 0 else max(scale, F(2.0**-126))
        zp = half
    else:
        scale = min(max(high - low, F(1e-5)), biggest) / F(last)
        zp = int(np.clip(np.rint(-low / scale), 0, last))
    return np.clip(np.rint(group / scale).astype(np.float64) + zp, 0, last).astype(np.uint8), scale, zp
