"""Codes to numbers and back, by integer arithmetic on their bits: what a kernel does where Numba lacks the dtype.

Every function takes and gives 32 bits, whatever the width in memory.  None divides or rounds twice, so that all agree
bit for bit with the tables that the CPU looks up.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pymoe.device.arrays import BFLOAT16
from pymoe.device.numba_gpu import device

__all__ = [
    "BFLOAT16_BITS",
    "E4M3",
    "E8M0",
    "FLOAT16",
    "FLOAT32",
    "INT8",
    "decode",
    "encode",
    "encode_e4m3",
    "format_of",
]

FLOAT32, FLOAT16, BFLOAT16_BITS, E4M3, E8M0, INT8 = range(6)
"""How bits are to be read."""
_CODES = {"fp8": E4M3, "int8": INT8}

_SMALL_FLOAT16 = np.float32(2.0**112)
"""float16 bits, moved under float32's exponent, are too small by the difference of the biases, 127 - 15."""
_SMALL_E4M3 = np.float32(2.0**120)
"""As above: 127 - 7."""
_ULP_2_9 = np.float32(16384.0)
"""From here to twice as much the last place of a float32 is 2^-9, e4m3's least number."""


def format_of(dtype: Any, key: Any = None) -> int:
    """Return how to read elements of `dtype`, which are codes where a `QuantKey` is given."""
    if key is not None:
        return _CODES[key.dtype]
    return {np.dtype("float32"): FLOAT32, np.dtype("float16"): FLOAT16, BFLOAT16: BFLOAT16_BITS}[np.dtype(dtype)]


# docs: decode
@device
def decode(code, form):
    """Return the float32 that `code`, bits of format `form`, stands for; exact."""
    bits = np.uint32(code)
    if form == FLOAT32:
        return bits.view(np.float32)
    if form == BFLOAT16_BITS:  # the upper half of a float32
        return np.uint32(bits << 16).view(np.float32)
    if form == INT8:
        return np.float32(np.int64(bits) - ((np.int64(bits) >> 7) << 8))
    if form == E8M0:  # an exponent; 0 is a subnormal, 255 NaN
        if bits == 0:
            return np.uint32(0x00400000).view(np.float32)
        return np.uint32(0x7FC00000 if bits == 255 else bits << 23).view(np.float32)
    if form == FLOAT16:
        magnitude, sign = bits & 0x7FFF, (bits >> 15) << 31
        size = np.uint32(magnitude << 13).view(np.float32) * _SMALL_FLOAT16
        if magnitude >= 0x7C00:  # infinity and NaN keep their fraction
            size = np.uint32(0x7F800000 | (magnitude & 0x3FF) << 13).view(np.float32)
    else:
        magnitude, sign = bits & 0x7F, (bits >> 7) << 31
        size = np.uint32(magnitude << 20).view(np.float32) * _SMALL_E4M3
        if magnitude == 0x7F:  # e4m3 has NaN, and no infinity
            size = np.uint32(0x7FC00000).view(np.float32)
    return np.uint32(size.view(np.uint32) | sign).view(np.float32)


# end: decode


# docs: encode
@device
def encode(value, form):
    """Return the bits of `value`, float32, in format `form`: nearest, ties to even; NaN stays a quiet NaN."""
    bits = np.int64(value.view(np.uint32))
    size, sign = bits & 0x7FFFFFFF, bits >> 31
    if form == FLOAT32:
        return np.uint32(bits)
    if form == BFLOAT16_BITS:
        if size > 0x7F800000:
            return np.uint32((sign << 15) | 0x7FC0)
        return np.uint32((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)
    half = np.int64(0x7E00) if size > 0x7F800000 else np.int64(0x7C00)
    if size < 0x47800000:  # below 65536
        if size >= 0x38800000:  # normal: the exponent changes its bias, 13 bits of the fraction go
            half = (size - 0x38000000 + 0x0FFF + ((size >> 13) & 1)) >> 13
        elif size < 0x33000000:  # below half of the least subnormal
            half = np.int64(0)
        else:  # a count of 2^-24, from the fraction with its hidden bit
            shift = 126 - (size >> 23)
            fraction = (size & 0x7FFFFF) | 0x800000
            half = (fraction + (np.int64(1) << (shift - 1)) - 1 + ((fraction >> shift) & 1)) >> shift
    return np.uint32((sign << 15) | half)


@device
def encode_e4m3(value):
    """Return the e4m3 code of `value`, float32: nearest, ties to even; above 448 is 448, NaN is 0x7F."""
    bits = np.int64(value.view(np.uint32))
    size, sign = bits & 0x7FFFFFFF, (bits >> 24) & 0x80
    if size > 0x7F800000:
        return np.uint32(0x7F)
    if size < 0x3C800000:  # below 2^-6, the least normal number: the addition rounds to a count of 2^-9
        counted = np.float32(np.uint32(size).view(np.float32) + _ULP_2_9)
        return np.uint32(sign | (np.int64(counted.view(np.uint32)) - 0x46800000))
    size = min(size, np.int64(0x43E00000))
    return np.uint32(sign | (((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - 960))


# end: encode
