"""e8m0: the byte b is the power of two 2^(b - 127); 255 is NaN.  Exponents come from the bits, never from log2."""

from __future__ import annotations

import numpy as np

E8M0_NAN = 255

_BITS = np.arange(256, dtype=np.uint32) << np.uint32(23)
_BITS[0] = 1 << 22  # 2^-127 lies below the normal float32 numbers
_BITS[255] = 0x7FC00000
E8M0_VALUES: np.ndarray = _BITS.view(np.float32)
"""Value of each of the 256 codes, float32."""
E8M0_VALUES.setflags(write=False)


def decode_e8m0(codes: np.ndarray) -> np.ndarray:
    """Return the float32 powers of two of `codes` (uint8 or ml_dtypes.float8_e8m0fnu); 0 is 2^-127, 255 is NaN."""
    return E8M0_VALUES[codes.view(np.uint8)]


def encode_e8m0_ceil(x: np.ndarray) -> np.ndarray:
    """Return the codes of the smallest powers of two that are at least `x`.

    Parameters
    ----------
    x : ndarray, float32
        Not negative; 0 and all that is at most 2^-127 becomes 0, what exceeds 2^127 becomes 254, NaN 255.

    Returns
    -------
    ndarray, uint8, shape of `x`
    """
    bits = np.asarray(x, np.float32).view(np.uint32).astype(np.int64)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0)
    exponent = np.where(bits <= 1 << 22, 0, np.minimum(exponent, 254))
    return np.where(np.isnan(x), E8M0_NAN, exponent).astype(np.uint8)


def inverse_power(codes: np.ndarray) -> np.ndarray:
    """Return 2^(127 - b) in float32 for codes b in 0..253, all of them normal numbers; NaN for 255."""
    return E8M0_VALUES[np.where(codes == E8M0_NAN, np.uint8(E8M0_NAN), np.uint8(254) - codes)]
