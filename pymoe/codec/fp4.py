"""e2m1: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives, no infinity and no NaN; and the packing of 4-bit codes."""

from __future__ import annotations

import numpy as np

E2M1_MAX = 6.0

E2M1_VALUES: np.ndarray = np.array(
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0], np.float32
)
"""Value of each of the 16 codes, float32; bit 3 is the sign."""
E2M1_VALUES.setflags(write=False)


def encode_e2m1(x: np.ndarray) -> np.ndarray:
    """Return the codes nearest to `x`, ties to the even code.

    Parameters
    ----------
    x : ndarray, float32
        Anything beyond 6, infinities included, becomes 6 of its sign.  NaN has no code: it becomes 0, and the caller
        carries it in the scale.

    Returns
    -------
    ndarray, uint8, shape of `x`
        Codes 0..15; -0 and what rounds to it from below is 8.
    """
    size = np.abs(x)
    codes = (size > 0.25).astype(np.uint8)
    # Midpoints go to the neighbour with the even code: up at 0.75, 1.75 and 3.5, down at the others.
    for reached in (size >= 0.75, size > 1.25, size >= 1.75, size > 2.5, size >= 3.5, size > 5.0):
        codes += reached
    # The sign of a NaN is whatever the machine made of it, so it must not reach the code.
    codes |= (np.signbit(x) & (size == size)).astype(np.uint8) << np.uint8(3)
    return codes


def decode_e2m1(codes: np.ndarray) -> np.ndarray:
    """Return the float32 values of unpacked `codes` 0..15."""
    return E2M1_VALUES[codes]


def pack_nibbles(codes: np.ndarray) -> np.ndarray:
    """Return bytes (..., K/2) of 4-bit codes (..., K): even k in the low nibble, odd k in the high one."""
    return codes[..., 0::2] | (codes[..., 1::2] << np.uint8(4))


def unpack_nibbles(packed: np.ndarray) -> np.ndarray:
    """Return 4-bit codes (..., K), uint8, of bytes (..., K/2); the inverse of `pack_nibbles`."""
    codes = np.empty((*packed.shape[:-1], 2 * packed.shape[-1]), np.uint8)
    np.bitwise_and(packed, np.uint8(15), out=codes[..., 0::2])
    np.right_shift(packed, np.uint8(4), out=codes[..., 1::2])
    return codes
