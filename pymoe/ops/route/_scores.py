"""Scores of expert logits, in steps that every backend repeats bit for bit.

Everything is float64 arithmetic of single IEEE operations (no fused multiply-add, no libm), rounded once to float32.
The polynomials are accurate to about 1e-15, so a float32 score is the correctly rounded one in all but about one case
in 10**7.
"""

from __future__ import annotations

import math

import numpy as np

FLOAT32_MAX = float(np.finfo(np.float32).max)
LANES = 32
"""Partial sums of a softmax denominator: lane l adds the experts e with e % 32 == l in ascending order."""

LOG2_E = 1.4426950408889634
LN2_HIGH = 6.93147180369123816490e-01  # 32 significant bits, so that n * LN2_HIGH is exact for every n that occurs
LN2_LOW = 1.90821492927058770002e-10
ROUND = 6755399441055744.0  # 1.5 * 2**52: adding and subtracting it rounds to the nearest integer, ties to even
EXP_MIN = -708.0  # e**-708 is a normal float64 that float32, and its square root, take for 0
EXP_TERMS = tuple(1.0 / math.factorial(k) for k in range(13, -1, -1))
LOG1P_TERMS = tuple(2.0 / (2 * k + 1) for k in range(15, -1, -1))
SOFTPLUS_LINEAR = 20.0
"""Above it softplus(x) is x."""


def clean(logits: np.ndarray) -> np.ndarray:
    """Return float32 logits with NaN as -inf and +inf as the largest float32."""
    return np.where(np.isnan(logits), np.float32(-np.inf), np.minimum(logits, np.float32(FLOAT32_MAX)))


def exp(t: np.ndarray) -> np.ndarray:
    """Return e**t for float64 t <= 0; below `EXP_MIN` as at `EXP_MIN`."""
    t = np.maximum(t, EXP_MIN)
    n = (t * LOG2_E + ROUND) - ROUND
    r = (t - n * LN2_HIGH) - n * LN2_LOW
    p = np.full_like(r, EXP_TERMS[0])
    for term in EXP_TERMS[1:]:
        p = p * r + term
    return np.ldexp(p, n.astype(np.int32))


def log1p(z: np.ndarray) -> np.ndarray:
    """Return log(1 + z) for float64 z in 0..1, as 2 artanh(z / (2 + z))."""
    s = z / (2.0 + z)
    q = s * s
    p = np.full_like(q, LOG1P_TERMS[0])
    for term in LOG1P_TERMS[1:]:
        p = p * q + term
    return s * p


def sigmoid(x: np.ndarray) -> np.ndarray:
    """Return the float32 sigmoid of clean logits."""
    t = x.astype(np.float64)
    z = exp(-np.abs(t))
    return (np.where(t >= 0, 1.0, z) / (1.0 + z)).astype(np.float32)


def sqrtsoftplus(x: np.ndarray) -> np.ndarray:
    """Return float32 sqrt(log(1 + e**x)) of clean logits; the root of x itself above `SOFTPLUS_LINEAR`."""
    t = x.astype(np.float64)
    soft = np.maximum(t, 0.0) + log1p(exp(-np.abs(t)))
    return np.sqrt(np.where(t > SOFTPLUS_LINEAR, t, soft)).astype(np.float32)


def lane_sum(x: np.ndarray) -> np.ndarray:
    """Return the row sums of float64 (M, E): `LANES` partial sums, then halves folded until one is left."""
    M, E = x.shape
    lanes = np.zeros((M, LANES))
    for start in range(0, E, LANES):
        block = x[:, start : start + LANES]
        lanes[:, : block.shape[1]] += block
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes[:, 0]


def softmax(x: np.ndarray) -> np.ndarray:
    """Return the float32 softmax over all experts of clean logits, 0 in rows of nothing but -inf."""
    top = x.max(axis=1, keepdims=True).astype(np.float64)
    z = exp(x - np.where(top == -np.inf, 0.0, top))
    return np.where(top == -np.inf, 0.0, z / lane_sum(z)[:, None]).astype(np.float32)


SCORES = {"softmax": softmax, "sigmoid": sigmoid, "sqrtsoftplus": sqrtsoftplus}
