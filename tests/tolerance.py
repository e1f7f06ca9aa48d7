"""The one table of error limits, each with where it comes from, and assertions that say where they failed.

u is half an ulp of the output dtype relative to 1: 2^-8 for bfloat16, 2^-11 for float16.
"""

from __future__ import annotations

import dataclasses

import numpy as np

UNIT = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24}


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits against a float64 reference on the same operands."""

    frobenius: float
    row: float
    element: float
    bias: float


def fused(dtype: str, K: int, width: int) -> Limits:
    """Limits of a fused layer: float32 accumulation, one rounding of h, one of the output.

    bf16 and fp16: the two roundings are uniform in half an ulp, rms 0.42 u each; sqrt(2) * 0.42 u = 2.33e-3 for
    u = 2^-8 measured over 12 shapes, worst row 3.1e-3, worst element 2.9 u; the limits add 30 %.  They do not grow with
    K, since the float32 sums are 2^-24 sqrt(K).  float32: no roundings but those of the sums, whose probable error is
    sqrt(K) 2^-24; the limit is twice that, and rows and elements get 4 and 16 times it.
    """
    if dtype == "float32":
        probable = 2 * np.sqrt(max(K, width)) * 2.0**-24
        return Limits(probable, 4 * probable, 16 * probable, probable)
    u = UNIT[dtype]
    return Limits(3.0e-3 * u * 2**8, 4.0e-3 * u * 2**8, 4 * u, 3.0e-4 * u * 2**8)


QUANTIZED_FROBENIUS = 7.5e-3
"""Against the ideal that requantizes too: one code of h may fall to the other side of an edge; bf16 output 1.7e-3."""


def errors(y: np.ndarray, expected: np.ndarray, dtype: str) -> Limits:
    """Return the four figures that `Limits` bounds."""
    y, expected = y.astype(np.float64), expected.astype(np.float64)
    difference = y - expected
    rms = np.sqrt((expected**2).mean(axis=1, keepdims=True))
    live = rms[:, 0] > 0
    row = np.linalg.norm(difference, axis=1)[live] / np.linalg.norm(expected, axis=1)[live]
    scale = np.maximum(np.abs(expected), rms)
    element = (np.abs(difference)[live] / scale[live]).max(initial=0)
    signed = (difference * np.sign(expected))[live] / scale[live]
    norm = np.linalg.norm(expected)
    frobenius = np.linalg.norm(difference) / norm if norm else float(np.abs(difference).max(initial=0) > 0)
    return Limits(frobenius, row.max(initial=0), element, abs(signed.mean()) if signed.size else 0.0)


def assert_fused(y: np.ndarray, expected: np.ndarray, K: int, width: int) -> None:
    """Raise unless `y` is within the fused limits of its dtype; names the worst coordinate."""
    dtype = y.dtype.name
    assert y.shape == expected.shape
    assert np.isfinite(y.astype(np.float64)).all(), "not finite"
    limits, found = fused(dtype, K, width), errors(y, expected, dtype)
    over = {
        name: (getattr(found, name), getattr(limits, name))
        for name in ("frobenius", "row", "element", "bias")
        if getattr(found, name) > getattr(limits, name)
    }
    if y.size < 100_000:
        over.pop("bias", None)  # the mean of few elements is noise
    if over:
        worst = np.unravel_index(np.abs(y.astype(np.float64) - expected).argmax(), y.shape)
        raise AssertionError(f"{over} (found, limit); worst at {worst}: {y[worst]} for {expected[worst]}")


def assert_frobenius(y: np.ndarray, expected: np.ndarray, limit: float) -> None:
    """Raise unless the relative Frobenius error is within `limit`."""
    found = errors(y, expected, "float32").frobenius
    assert found <= limit, f"relative Frobenius error {found}, limit {limit}"
