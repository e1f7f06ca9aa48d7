"""exp, log, tanh, erf, pow and their like, written out in float32 operations: the same bits on every backend.

Each is a function of values that appends its steps.  Polynomials are interpolated at Chebyshev nodes; every function is
within 2 ulp of the true one for every argument, pow within 4, and follows C99 for zeros, infinities and NaN.
"""

from __future__ import annotations

import math
from typing import Any

from pymoe.formula.program import Value

__all__ = ["ceil", "erf", "exp", "expm1", "floor", "fma", "log", "log1p", "power", "select", "sqrt", "tanh"]

_INF, _NAN = math.inf, math.nan
_ROUND = 12582912.0  # 1.5 * 2**23: a sum with it is rounded to a whole number
_LOG2_E = 1.4426950408889634
_LN2_HIGH, _LN2_LOW = 0.693147182464599609375, -1.904654299957768e-09  # the float32 of ln 2, and the rest
_EXP_MOST, _EXP_LEAST = 89.0, -104.5  # beyond them the answer is infinite, or zero

_EXP = (0.5, 0.1666666716337204, 0.04166645556688309, 0.008333297446370125, 0.0013934534508734941,
        0.0001990043092519045)  # fmt: skip
"""(exp(r) - 1 - r) / r**2 for |r| <= ln(2) / 2."""
_LOG = (0.3333333134651184, -0.24999989569187164, 0.20000708103179932, -0.16668476164340973, 0.14249908924102783,
        -0.12411130219697952, 0.11661902815103531, -0.11570707708597183, 0.07147885859012604)  # fmt: skip
"""(log(1 + f) - f + f**2 / 2) / f**3 for 1 + f between the roots of 1/2 and 2."""
_ATANH = (0.6666666865348816, 0.4000012278556824, 0.2855069041252136, 0.23333817720413208)
"""(log((1 + s) / (1 - s)) / s - 2) / s**2 as a polynomial in s**2, for s**2 <= 0.0295."""
_TANH_SMALL = 0.6
_TANH = (-0.3333333432674408, 0.13333313167095184, -0.053961653262376785, 0.021789107471704483,
         -0.008412553928792477, 0.002373515162616968)  # fmt: skip
"""(tanh(x) / x - 1) / x**2 as a polynomial in x**2."""
_ERF_SMALL, _ERF_MOST = 0.92, 4.0  # from 4 on erf is 1
_ERF = (0.12837916612625122, -0.37612634897232056, 0.11283700168132782, -0.026859642937779427, 0.0052015813998878,
        -0.0008148385677486658, 8.392181189265102e-05)  # fmt: skip
"""erf(x) / x - 1 as a polynomial in x**2."""
_ERFC = (-0.00033454084768891335, 1.1303176879882812, 0.6316260099411011, 0.11033815145492554, -0.02662273868918419,
         0.004859320353716612, -0.0006282396498136222, 5.2177860197843984e-05, -2.3078011963661993e-06,
         3.163541251183233e-08)  # fmt: skip
"""-log(1 - erf(x)) for x between 0.92 and 4."""


def fma(a: Any, b: Any, c: Any) -> Value:
    """Return ``a * b + c`` with one rounding; one of them at least is a value."""
    builder = next(x.builder for x in (a, b, c) if isinstance(x, Value))
    return builder.step("fma", a, b, c)


def select(truth: Value, this: Any, that: Any) -> Value:
    """Return `this` where `truth` holds, else `that`."""
    return truth.builder.step("select", truth, this, that)


def sqrt(x: Value) -> Value:
    return x.builder.step("sqrt", x)


def floor(x: Value) -> Value:
    return x.builder.step("floor", x)


def ceil(x: Value) -> Value:
    return -floor(-x)


def exp(x: Value) -> Value:
    return _exp(x, 0.0)


def expm1(x: Value) -> Value:
    """exp(x) - 1 without cancellation for small x."""
    rest, n = _reduce(_within(x, -30.0, _EXP_MOST), 0.0)
    scale, again = _two_to(n)
    small = fma(rest, scale * again, fma(scale, again, -1.0))
    return select(_either(x < -20.0, x > 80.0), exp(x) - 1.0, select(x == 0.0, x, small))


def log(x: Value) -> Value:
    tiny = x < 2.0**-126
    m, n = _split(select(tiny, x * 2.0**23, x))
    n = select(tiny, n - 23.0, n)
    f = m - 1.0
    square = f * f
    small = f + fma(square * f, _polynomial(_LOG, f), -0.5 * square)
    y = fma(n, _LN2_HIGH, fma(n, _LN2_LOW, small))
    y = select(x < _INF, y, x)
    return select(x == 0.0, -_INF, select(x < 0.0, _NAN, y))


def log1p(x: Value) -> Value:
    """log(1 + x) without cancellation for small x."""
    u = x + 1.0
    lost = x - (u - 1.0)  # what the sum has rounded away; nothing where x is large or infinite
    y = log(u) + select(_either(x > 2.0**24, u <= 0.0), 0.0, lost / u)
    return select(x == 0.0, x, y)


def tanh(x: Value) -> Value:
    a = abs(x)
    square = x * x
    near = fma(square * x, _polynomial(_TANH, square), x)
    far = 1.0 - 2.0 / (exp(2.0 * select(a > 10.0, 10.0, a)) + 1.0)
    return select(x == 0.0, x, select(a < _TANH_SMALL, near, _signed(far, x)))


def erf(x: Value) -> Value:
    a = abs(x)
    square = x * x
    near = fma(x, _polynomial(_ERF, square), x)
    far = 1.0 - exp(-_polynomial(_ERFC, select(a > _ERF_MOST, _ERF_MOST, a)))
    return select(a < _ERF_SMALL, near, _signed(far, x))


def power(x: Any, y: Any) -> Value:
    """x to the y as C99's pow: exp(y log x) with the logarithm in two floats."""
    builder = (x if isinstance(x, Value) else y).builder
    x, y = (v if isinstance(v, Value) else builder.step("mul", v, 1.0) for v in (x, y))
    a = abs(x)
    high, low = _log_of_two_parts(a)
    product = y * high
    inside = _both(product < _EXP_MOST, product > _EXP_LEAST)
    rest = select(inside, fma(y, low, fma(y, high, -product)), 0.0)
    magnitude = _exp(product, rest)
    rising = y > 0.0
    magnitude = select(a == 0.0, select(rising, 0.0, _INF), magnitude)
    magnitude = select(a == _INF, select(rising, _INF, 0.0), magnitude)
    whole = floor(y) == y
    half = y * 0.5
    odd = _both(whole, floor(half) < half)
    negative = _either(x < 0.0, _both(x == 0.0, 1.0 / x < 0.0))
    signed = select(_both(negative, odd), -magnitude, magnitude)
    signed = select(_both(_both(x < 0.0, x > -_INF), floor(y) < y), _NAN, signed)
    signed = select(_both(a == 1.0, abs(y) == _INF), 1.0, signed)
    signed = select(_either(x != x, y != y), x + y, signed)
    return select(_either(y == 0.0, x == 1.0), 1.0, signed)


def _exp(x: Value, more: Any) -> Value:
    """exp(x + more), where `more` is far below x."""
    x = _within(x, _EXP_LEAST, _EXP_MOST)
    rest, n = _reduce(x, more)
    scale, again = _two_to(n)
    return (1.0 + rest) * scale * again


def _reduce(x: Value, more: Any) -> tuple[Value, Value]:
    """Return exp(r) - 1 and n of x + more = r + n ln 2."""
    n = fma(x, _LOG2_E, _ROUND) - _ROUND
    r = fma(n, -_LN2_LOW, fma(n, -_LN2_HIGH, x))
    r = r + more if isinstance(more, Value) else r
    return fma(r * r, _polynomial(_EXP, r), r), n


def _log_of_two_parts(a: Value) -> tuple[Value, Value]:
    """Return the logarithm of a positive float32 as a sum of two, of which the second is what the first leaves."""
    tiny = a < 2.0**-126
    m, n = _split(select(tiny, a * 2.0**23, a))
    n = select(tiny, n - 23.0, n)
    over, under = m - 1.0, m + 1.0
    under_low = m - (under - 1.0)
    s = over / under
    s_low = fma(-s, under_low, fma(-s, under, over)) / under
    square = s * s
    tail = fma(square * s, _polynomial(_ATANH, square), 2.0 * s_low)
    whole, part = n * _LN2_HIGH, 2.0 * s
    whole_low = fma(n, _LN2_LOW, fma(n, _LN2_HIGH, -whole))
    high = whole + part  # |whole| is above |part| unless it is 0, so what is lost is found by two differences
    low = (part - (high - whole)) + (whole_low + tail)
    total = high + low
    return total, low - (total - high)


def _split(x: Value) -> tuple[Value, Value]:
    """Return m between the roots of 1/2 and 2, and n, of a positive normal x = m * 2**n."""
    m, n = x.builder.step("mantissa", x), x.builder.step("exponent", x)
    large = m > math.sqrt(2.0)
    return select(large, 0.5 * m, m), select(large, n + 1.0, n)


def _polynomial(terms: tuple[float, ...], x: Value) -> Value:
    """Return the sum of ``terms[k] * x**k`` by Horner's rule."""
    total: Any = terms[-1]
    for term in terms[-2::-1]:
        total = fma(total, x, term)
    return total


def _within(x: Value, least: float, most: float) -> Value:
    """Limit x on both sides; NaN passes."""
    x = select(x > most, most, x)
    return select(x < least, least, x)


def _two_to(n: Value) -> tuple[Value, Value]:
    """Return two factors of 2**n, which itself may be no float32."""
    half = fma(n, 0.5, _ROUND)
    step = n.builder.step
    return step("power_of_two", half), step("power_of_two", (n - (half - _ROUND)) + _ROUND)


def _signed(magnitude: Value, x: Value) -> Value:
    return select(x < 0.0, -magnitude, magnitude)


def _both(a: Value, b: Value) -> Value:
    return a.builder.step("and", a, b)


def _either(a: Value, b: Value) -> Value:
    return a.builder.step("or", a, b)
