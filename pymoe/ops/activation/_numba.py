"""Activation on the CPU: the float32 steps of the definition in loops that the compiler turns into vectors.

exp, tanh and erfc are float64 polynomials without libm, branches or fused multiply-add, so that the bits of an element
do not depend on where in a vector it stands.  Their relative error is below 2**-40, hence they round to the
definition's float32 in all but about one case in 10**5, and then to its neighbour.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pymoe.activations import ActivationConfig, MoEActivation, RegisteredActivation
from pymoe.device.arrays import BFLOAT16, as_float32
from pymoe.device.numba_cpu import jit
from pymoe.device.threads import refuse_recording, run_blocks
from pymoe.ops.activation import _numba_formula, _numpy
from pymoe.ops.activation._numba_formula import round_row

Array = Any

_inlined = jit(inline="always")  # LLVM leaves calls of this length alone, and a loop with a call stays scalar

_BLOCK_ELEMENTS = 1 << 15
"""Least elements a thread computes at a time; below that starting it costs more than it saves."""

_SWIGLU, _GELU, _GELU_TANH, _SWIGLUSTEP, _SITU, _RELU2 = range(6)
_CODES = {
    MoEActivation.GELU: _GELU,
    MoEActivation.GELU_TANH: _GELU_TANH,
    MoEActivation.SWIGLUSTEP: _SWIGLUSTEP,
    MoEActivation.SITU: _SITU,
    MoEActivation.SILU_NO_MUL: _SWIGLU,
    MoEActivation.GELU_NO_MUL: _GELU,
    MoEActivation.GELU_TANH_NO_MUL: _GELU_TANH,
    MoEActivation.RELU2_NO_MUL: _RELU2,
}

_ZERO, _HALF, _ONE = np.float32(0), np.float32(0.5), np.float32(1)
_SQRT_HALF, _TANH_SCALE, _TANH_CUBIC = _numpy._SQRT_HALF, _numpy._TANH_SCALE, _numpy._TANH_CUBIC

_LOG2_E, _LN2 = 1.4426950408889634, 0.6931471805599453
_ROUND = 6755399441055744.0  # 1.5 * 2**52: its sum with n holds the integer nearest to n in the low bits
_EXP_TERMS = tuple(1.0 / math.factorial(k) for k in range(10, -1, -1))
_EXP_MIN, _EXP_MAX = -110.0, 90.0  # beyond them a float32 exponential is 0 or infinite
_TANH_LINEAR = 2.0**-6  # below it tanh is its series: 1 - exp(-2z) would cancel
_TANH_MAX = 20.0  # from here on tanh is 1 in float32
_ERFC_MAX = 14.5  # from here on erfc is 0 in float32


def _erfc_terms(degree: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the polynomial in ``y = 4 t - 2`` for ``log(erfc(z) exp(z**2) / t)``, t = 2 / (2 + z).

    Its even and its odd coefficients, highest first: two short loops are unrolled where one long loop is not, and a
    loop within a loop does not become vectors.
    """

    def tail(y: np.ndarray) -> np.ndarray:
        z = 8.0 / (y + 2.0) - 2.0
        return np.array([math.log(math.erfc(v) * math.exp(v * v) * (2.0 + v) / 2.0) for v in z])

    lowest = 8.0 / (2.0 + _ERFC_MAX) - 2.0
    fit = np.polynomial.Chebyshev.interpolate(tail, degree, domain=[lowest, 2.0])
    terms = [float(c) for c in fit.convert(kind=np.polynomial.Polynomial).coef]
    return tuple(terms[0::2][::-1]), tuple(terms[1::2][::-1])


_ERFC_EVEN, _ERFC_ODD = _erfc_terms(17)


def activation(x: Array, config: ActivationConfig, out: Array) -> None:
    x = as_float32(x)
    narrow = out.dtype == BFLOAT16 and out.flags.c_contiguous
    grain = max(1, _BLOCK_ELEMENTS // max(1, out.shape[1]))
    kernel, parameters = _kernel(config)
    if narrow:
        run_blocks(kernel, len(x), x, _NO_FLOATS, out.view(np.uint16), *parameters, grain=grain)
        return
    y = out if out.dtype == np.float32 and out.flags.c_contiguous else np.empty(out.shape, np.float32)
    run_blocks(kernel, len(x), x, y, _NO_BITS, *parameters, grain=grain)
    if y is not out:
        refuse_recording()
        with np.errstate(all="ignore"):
            out[...] = y


_NO_FLOATS, _NO_BITS = np.empty((0, 0), np.float32), np.empty((0, 0), np.uint16)
"""One of the two outputs of a kernel is none of these: float32, or the bits of bfloat16."""


def _kernel(config: ActivationConfig) -> tuple[Any, tuple[Any, ...]]:
    """Return the kernel of an activation and its numbers."""
    if isinstance(config.activation, RegisteredActivation):
        return _numba_formula.rows(config.activation.program, config.is_gated), ()
    if not config.is_gated:
        return _plain_rows, (_CODES[config.activation],)
    parameters = config.resolved()
    limit = np.float32(np.inf if parameters["clamp_limit"] is None else parameters["clamp_limit"])
    if config.activation in _CODES:
        b, linear = (np.float32(parameters[name] or 0.0) for name in ("situ_beta", "situ_linear_beta"))
        return _gated_rows, (_CODES[config.activation], limit, b, linear)
    numbers = limit, np.float32(-parameters["alpha"]), np.float32(parameters["beta"])
    return (_swiglu_pairs if config.is_interleaved else _swiglu_rows), numbers


@_inlined
def _exp64(z):
    z = _EXP_MAX if z > _EXP_MAX else z
    z = _EXP_MIN if z < _EXP_MIN else z
    shifted = z * _LOG2_E + _ROUND
    r = z - (shifted - _ROUND) * _LN2
    p = _EXP_TERMS[0]
    for k in range(1, len(_EXP_TERMS)):
        p = p * r + _EXP_TERMS[k]
    # The integer in the low bits of `shifted`, moved up, adds to the exponent; NaN has none of those bits set.
    return np.int64(np.float64(p).view(np.int64) + (np.float64(shifted).view(np.int64) << 52)).view(np.float64)


@_inlined
def _exp(z):
    return np.float32(_exp64(np.float64(z)))


@_inlined
def _tanh(z32):
    z = np.float64(z32)
    a = abs(z)
    e = _exp64(-2.0 * (_TANH_MAX if a > _TANH_MAX else a))
    far = (1.0 - e) / (1.0 + e)
    square = z * z
    near = z - z * square * (1.0 / 3.0 - square * (2.0 / 15.0))
    return np.float32(near if a < _TANH_LINEAR else (-far if z < 0.0 else far))


@_inlined
def _erfc(z32):
    z = np.float64(z32)
    a = abs(z)
    a = _ERFC_MAX if a > _ERFC_MAX else a
    t = 2.0 / (2.0 + a)
    y = 4.0 * t - 2.0
    square = y * y
    even, odd = _ERFC_EVEN[0], _ERFC_ODD[0]
    for k in range(1, len(_ERFC_EVEN)):
        even = even * square + _ERFC_EVEN[k]
    for k in range(1, len(_ERFC_ODD)):
        odd = odd * square + _ERFC_ODD[k]
    tail = t * _exp64(even + y * odd - a * a)
    return np.float32(2.0 - tail if z < 0.0 else tail)


@_inlined
def _silu(g, minus_alpha):
    return g / (_ONE + _exp(minus_alpha * g))


@_inlined
def _gelu(g):
    return _HALF * g * _erfc(-_SQRT_HALF * g)


@_inlined
def _gelu_tanh(g):
    return g / (_ONE + _exp(_TANH_SCALE * (g + _TANH_CUBIC * (g * g * g))))


@_inlined
def _clamp(v, limit):
    """Return `v` within -limit..limit; written so that NaN passes."""
    v = -limit if v < -limit else v
    return limit if v > limit else v


@_inlined
def _swiglu(g, u, limit, minus_alpha, beta):
    g = limit if g > limit else g
    return _silu(g, minus_alpha) * (_clamp(u, limit) + beta)


@_inlined
def _situ(g, u, b, linear):
    if linear > _ZERO:
        u = linear * _tanh(u / linear)
    return b * _tanh(g / b) / (_ONE + _exp(-g)) * u


@jit
def _swiglu_rows(start, stop, x, y, bits, limit, minus_alpha, beta):
    I, narrow = x.shape[1] // 2, bits.size > 0  # noqa: E741  the project's symbol
    row = np.empty(I, np.float32)
    for r in range(start, stop):
        gate, up, line = x[r, :I], x[r, I:], row if narrow else y[r]
        for i in range(I):
            line[i] = _swiglu(gate[i], up[i], limit, minus_alpha, beta)
        if narrow:
            round_row(line, bits[r])


@jit
def _swiglu_pairs(start, stop, x, y, bits, limit, minus_alpha, beta):
    narrow = bits.size > 0
    row = np.empty(x.shape[1] // 2, np.float32)
    for r in range(start, stop):
        pairs, line = x[r], row if narrow else y[r]
        for i in range(len(line)):
            line[i] = _swiglu(pairs[2 * i], pairs[2 * i + 1], limit, minus_alpha, beta)
        if narrow:
            round_row(line, bits[r])


@jit
def _gated_rows(start, stop, x, y, bits, code, limit, b, linear):
    I, narrow = x.shape[1] // 2, bits.size > 0  # noqa: E741
    row = np.empty(I, np.float32)
    for r in range(start, stop):
        gate, up, line = x[r, :I], x[r, I:], row if narrow else y[r]
        if code == _GELU:
            for i in range(I):
                line[i] = _gelu(gate[i]) * up[i]
        elif code == _GELU_TANH:
            for i in range(I):
                line[i] = _gelu_tanh(gate[i]) * up[i]
        elif code == _SWIGLUSTEP:
            for i in range(I):
                step = _silu(gate[i], -_ONE)
                line[i] = (limit if step > limit else step) * _clamp(up[i], limit)
        else:
            for i in range(I):
                line[i] = _situ(gate[i], up[i], b, linear)
        if narrow:
            round_row(line, bits[r])


@jit
def _plain_rows(start, stop, x, y, bits, code):
    narrow = bits.size > 0
    buffer = np.empty(x.shape[1], np.float32)
    for r in range(start, stop):
        row, line = x[r], buffer if narrow else y[r]
        if code == _SWIGLU:
            for i in range(len(line)):
                line[i] = _silu(row[i], -_ONE)
        elif code == _GELU:
            for i in range(len(line)):
                line[i] = _gelu(row[i])
        elif code == _GELU_TANH:
            for i in range(len(line)):
                line[i] = _gelu_tanh(row[i])
        else:
            for i in range(len(line)):
                positive = _ZERO if row[i] < _ZERO else row[i]
                line[i] = positive * positive
        if narrow:
            round_row(line, bits[r])
