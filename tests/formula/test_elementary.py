"""exp, log, tanh, erf and pow of formulas: near the true value everywhere, and C99's answers at the edges."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.formula.evaluate import EDGES, run, sample

FUNCTIONS = {
    "exp": (lambda x: math.exp(x), math.exp, 1.0),
    "expm1": (lambda x: math.expm1(x), math.expm1, 1.5),
    "log": (lambda x: math.log(x), math.log, 1.0),
    "log1p": (lambda x: math.log1p(x), math.log1p, 1.5),
    "tanh": (lambda x: math.tanh(x), math.tanh, 1.5),
    "erf": (lambda x: math.erf(x), math.erf, 1.5),
    "sqrt": (lambda x: math.sqrt(x), math.sqrt, 0.5),
    "floor": (lambda x: math.floor(x), np.floor, 0.0),
}


def true(function, *x):
    """Return the value in float64 under C99's rules, where Python raises instead."""
    try:
        return float(function(*(float(v) for v in x)))
    except OverflowError:
        return math.inf
    except ValueError:
        return -math.inf if (function, x[0]) in ((math.log, 0), (math.log1p, -1)) else math.nan


def ulps(y, exact):
    """Return the distance of float32 `y` from `exact`, in units in the last place of the float32 nearest to it."""
    with np.errstate(all="ignore"):
        nearest = exact.astype(np.float32)
        unit = np.maximum(np.spacing(np.abs(nearest)), np.float32(2.0**-149)).astype(np.float64)
        off = np.abs(y.astype(np.float64) - exact) / unit
    return np.where((y == nearest) | (np.isnan(y) & np.isnan(nearest)), 0, np.where(np.isnan(off), np.inf, off))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_one_number(name):
    fn, exact, limit = FUNCTIONS[name]
    x = sample()
    y = run(fn, x)
    off = ulps(y, np.array([true(exact, v) for v in x]))
    worst = off.argmax()
    assert off[worst] <= limit, (x[worst], y[worst], off[worst])
    if name not in ("exp", "log"):  # they keep the sign of zero
        assert np.array_equal(np.signbit(y[:2]), [False, True])


def test_pow():
    rng = np.random.default_rng(1)
    pairs = [(a, b) for a in EDGES for b in EDGES]
    near_one = (1 + rng.normal(0, 0.2, 9000)).astype(np.float32)
    x = np.concatenate([np.array(pairs, np.float32)[:, 0], np.abs(sample(4000)), near_one, sample(3000)])
    whole = np.rint(rng.normal(0, 6, len(x)))
    y = np.where(np.arange(len(x)) % 3 == 0, whole, rng.normal(0, 30, len(x)))
    y[: len(pairs)] = np.array(pairs)[:, 1]
    y = y.astype(np.float32)
    with np.errstate(all="ignore"):
        expected = np.power(x.astype(np.float64), y.astype(np.float64))  # C99's, which math.pow raises instead of
    z = run(lambda a, b: pow(a, b), x, y)
    off = ulps(z, expected)
    worst = off.argmax()
    assert off[worst] <= 4, (x[worst], y[worst], z[worst], expected[worst])
    zero = expected == 0
    assert np.array_equal(np.signbit(z[zero]), np.signbit(expected[zero]))


def test_small_whole_exponents_are_products():
    x = sample(200)
    with np.errstate(all="ignore"):
        square = x * x
        for n, product in {1: x, 2: square, 3: square * x, 4: square * square}.items():
            assert np.array_equal(run(lambda a, n=n: a**n, x), product, equal_nan=True)
            assert np.array_equal(run(lambda a, n=n: a**-n, x), 1 / product, equal_nan=True)


def test_fma_is_rounded_once():
    """Products whose low half decides: a sum in float64 alone would round twice."""
    from pymoe.ops.activation._numpy import _fma

    rng = np.random.default_rng(2)
    a, b = (np.float32(1) + rng.integers(0, 2**23, (2, 50_000)).astype(np.float32) * np.float32(2.0**-23)).astype("f4")
    product = a.astype(np.float64) * b
    c = (np.round(product * 2) / 2 * 2.0**24 * np.sign(rng.normal(size=len(a)))).astype(np.float32)
    from fractions import Fraction

    got = _fma(a, b, c)
    for i in range(0, len(a), 50):
        exact = Fraction(float(a[i])) * Fraction(float(b[i])) + Fraction(float(c[i]))
        around = [np.nextafter(got[i], np.float32(to)) for to in (-np.inf, np.inf)]
        error = abs(Fraction(float(got[i])) - exact)
        assert all(error <= abs(Fraction(float(n)) - exact) for n in around)
    tie = np.float32(2.0**-24)  # 1 + 2**-24 + a little more rounds up; the little is lost in float64
    assert _fma(tie, np.float32(1 + 2.0**-23), np.float32(1)) == np.float32(1 + 2.0**-23)
    small = np.float32(2.0**-100)
    assert _fma(small, small, np.float32(1)) == 1
