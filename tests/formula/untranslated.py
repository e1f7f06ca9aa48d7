"""Functions that the translator refuses and Numba takes: loops, helpers, tables, other functions of math."""

from __future__ import annotations

import math

import numpy as np

TABLE = (0.5, -0.25, 0.125)
SCALES = np.array([0.75, 1.5], np.float32)


def softened(x, turns=3, factor=0.9):
    """Halve until small, then a few turns of which one is left out."""
    y = x
    while abs(y) > 4.0:
        y = y / 2.0
    for k in range(turns):
        if k == 1:
            continue
        y = y * factor + 0.01 * k
    return y


def horner(gate, up):
    y = 0.0
    for c in TABLE:
        y = y * gate + c
    return y / (1.0 + math.exp(-gate)) * up


def helped(gate, up):
    return softened(gate) * softened(up, factor=0.7) + softened(gate, 5)


def wave(gate, up):
    return math.sin(gate) * up + math.cos(up) / (2.0 + abs(gate)) - math.atan2(gate, up)


def newton(gate, up):
    """The cube root of 1 + gate**2 by Newton's method, left when it no longer moves."""
    a = 1.0 + gate * gate
    y = a
    for _ in range(200):
        following = y - (y * y * y - a) / (3.0 * y * y)
        if abs(following - y) <= 1e-5 * y:
            break
        y = following
    return y * up


def picked(gate, up):
    y = gate
    for k in range(2):
        y += SCALES[k] * up if gate > k else up % 2 + gate % 0.3
    return max(y, -3, up) - min(y, 1.0)


def plain_wave(x):
    y = x
    while y > 3.0:
        y -= 2.5
    return math.sinh(y * 0.1) + math.floor(x) ** 2


GATED = [horner, helped, wave, newton, picked]
EXACT = [horner, helped, newton, picked]
"""Of these all backends have the same bits: no function of float64 is rounded twice."""


def operands(size=4000, seed=0):
    """Return gate and up of everyday size, with what is special in front."""
    rng = np.random.default_rng(seed)
    special = np.array([0.0, -0.0, 1.0, -1.0, 0.5, 3.0, -100.0, 100.0, 1e-30, -1e-42], np.float32)
    pairs = np.stack([np.repeat(special, len(special)), np.tile(special, len(special))])
    return np.concatenate([pairs, rng.normal(0, 3, (2, size)).astype(np.float32)], axis=1)
