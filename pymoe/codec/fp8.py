"""e4m3fn: 1 sign, 4 exponent bits with bias 7, 3 mantissa bits; at most 448, no infinity, NaN is 0x7F and 0xFF."""

from __future__ import annotations

import ml_dtypes
import numpy as np

E4M3_MAX = 448.0
E4M3_NAN = 0x7F

E4M3_VALUES: np.ndarray = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
"""Value of each of the 256 codes, float32."""
E4M3_VALUES.setflags(write=False)


def encode_e4m3(x: np.ndarray) -> np.ndarray:
    """Return the codes nearest to `x`, ties to the even code.

    Parameters
    ----------
    x : ndarray, float32
        Anything beyond 448, infinities included, becomes 448 of its sign; NaN of either sign becomes 0x7F.

    Returns
    -------
    ndarray, uint8, shape of `x`
        -0 and what rounds to it from below is 0x80.
    """
    with np.errstate(all="ignore"):
        # Clamped first: the cast itself turns what rounds beyond 448 into NaN.
        inside = np.clip(x, np.float32(-E4M3_MAX), np.float32(E4M3_MAX))
        codes = np.atleast_1d(inside.astype(ml_dtypes.float8_e4m3fn)).view(np.uint8).reshape(np.shape(x))
        return np.where(np.isnan(x), np.uint8(E4M3_NAN), codes)


def decode_e4m3(codes: np.ndarray) -> np.ndarray:
    """Return the float32 values of `codes` (uint8 or ml_dtypes.float8_e4m3fn); 0x7F and 0xFF are NaN."""
    return E4M3_VALUES[codes.view(np.uint8)]
