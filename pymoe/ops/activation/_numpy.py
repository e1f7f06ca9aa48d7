"""The definition of every activation: float32 operations in the order written here.

exp, tanh and erfc take a float32 and give the float32 nearest to the true value, by way of float64.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from pymoe.activations import ActivationConfig, MoEActivation, RegisteredActivation
from pymoe.formula import ClosedFunction, Program, spell
from pymoe.formula.program import PYTHON

Array = Any

_SQRT_HALF = np.float32(math.sqrt(0.5))
_TANH_SCALE = np.float32(-2.0 * math.sqrt(2.0 / math.pi))
_TANH_CUBIC = np.float32(0.044715)
_ONE = np.float32(1)
_erfc64: Any = np.frompyfunc(math.erfc, 1, 1)


def activation(x: Array, config: ActivationConfig, out: Array) -> None:
    kind = config.activation
    with np.errstate(all="ignore"):
        x = x.astype(np.float32, copy=False)
        if not config.is_gated:
            y = _call(kind, x) if isinstance(kind, RegisteredActivation) else _UNGATED[kind](x)
        else:
            I = x.shape[1] // 2  # noqa: E741  the project's symbol
            gate, up = (x[:, 0::2], x[:, 1::2]) if config.is_interleaved else (x[:, :I], x[:, I:])
            y = _call(kind, gate, up) if isinstance(kind, RegisteredActivation) else _gated(gate, up, config)
        out[...] = y


def _exp(z: Array) -> Array:
    return np.exp(z.astype(np.float64)).astype(np.float32)


def _tanh(z: Array) -> Array:
    return np.tanh(z.astype(np.float64)).astype(np.float32)


def _erfc(z: Array) -> Array:
    return _erfc64(z).astype(np.float32)


def silu(g: Array, alpha: float = 1.0) -> Array:
    """Return ``g * sigmoid(alpha * g)``; division keeps it exact where the exponential vanishes against 1."""
    return g / (_ONE + _exp(np.float32(-alpha) * g))


def gelu(g: Array) -> Array:
    """Return ``g/2 * (1 + erf(g / sqrt 2))`` through erfc, which does not cancel for negative g."""
    return np.float32(0.5) * g * _erfc(-_SQRT_HALF * g)


def gelu_tanh(g: Array) -> Array:
    """Return ``g/2 * (1 + tanh z)`` as ``g * sigmoid(2 z)``, which does not cancel for negative g."""
    return g / (_ONE + _exp(_TANH_SCALE * (g + _TANH_CUBIC * (g * g * g))))


def relu2(g: Array) -> Array:
    positive = np.maximum(g, np.float32(0))
    return positive * positive


_UNGATED: dict[Any, Callable[[Array], Array]] = {
    MoEActivation.SILU_NO_MUL: silu,
    MoEActivation.GELU_NO_MUL: gelu,
    MoEActivation.GELU_TANH_NO_MUL: gelu_tanh,
    MoEActivation.RELU2_NO_MUL: relu2,
}


def _gated(gate: Array, up: Array, config: ActivationConfig) -> Array:
    kind, p = config.activation, dict[str, Any](config.resolved())
    limit: Any = None if p["clamp_limit"] is None else np.float32(p["clamp_limit"])
    if kind is MoEActivation.GELU:
        return gelu(gate) * up
    if kind is MoEActivation.GELU_TANH:
        return gelu_tanh(gate) * up
    if kind is MoEActivation.SWIGLUSTEP:
        return np.minimum(silu(gate), limit) * np.clip(up, -limit, limit)
    if kind is MoEActivation.SITU:
        return _situ(gate, up, p["situ_beta"], p["situ_linear_beta"])
    if limit is not None:
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
    return silu(gate, p["alpha"]) * (up + np.float32(p["beta"]))


def _situ(gate: Array, up: Array, beta: float, linear_beta: float | None) -> Array:
    b = np.float32(beta)
    if linear_beta is not None and linear_beta > 0:
        up = np.float32(linear_beta) * _tanh(up / np.float32(linear_beta))
    return b * _tanh(gate / b) / (_ONE + _exp(-gate)) * up


def _call(kind: RegisteredActivation, *arguments: Array) -> Array:
    """Apply a user's function to arrays of its arguments."""
    if isinstance(kind.program, ClosedFunction):  # NumPy cannot run it on whole arrays: Numba's is the definition
        from pymoe.ops.activation._numba_formula import rows

        y = np.empty(arguments[0].shape, np.float32)
        x = np.concatenate(arguments, axis=1)
        rows(kind.program, kind.is_gated)(0, len(x), x, y, np.empty((0, 0), np.uint16))
        return y
    y = _evaluator(kind.program)(*arguments)
    return np.broadcast_to(y, arguments[0].shape)


_WORDS = PYTHON | {
    "div": "np.divide({0}, {1})", "abs": "np.abs({0})", "sqrt": "np.sqrt({0})", "floor": "np.floor({0})",
    "not": "np.logical_not({0})", "select": "np.where({0}, {1}, {2})",
}  # fmt: skip


@functools.lru_cache(maxsize=64)
def _evaluator(program: Program) -> Callable[..., Array]:
    """Return a function of float32 arrays that does the operations of a program, each on whole arrays."""
    lines = spell(program, _WORDS, lambda number: f"f32({number!r})", "    {name} = {value}")
    arguments = ", ".join(f"a{i}" for i in range(program.arity))
    text = "\n".join([f"def formula({arguments}):", *lines, f"    return t{len(lines) - 1}"])
    names = {"np": np, "f32": np.float32, "inf": math.inf, "nan": math.nan, "fma": _fma,
             "power_of_two": _power_of_two, "exponent": _exponent, "mantissa": _mantissa}  # fmt: skip
    exec(text, names)  # our own words around a checked program: no text of the user's is in it
    formula: Any = names["formula"]
    return formula


def _fma(a: Array, b: Array, c: Array) -> Array:
    """Return ``a * b + c`` rounded once: the product is exact in float64, its sum there is rounded to odd."""
    product, addend = np.multiply(a, b, dtype=np.float64), np.asarray(c, np.float64)
    total = product + addend
    back = total - product
    error = (product - (total - back)) + (addend - back)  # what the sum has lost
    even = (total.view(np.int64) & 1) == 0
    towards = np.where(np.isfinite(error) & (error != 0) & even, np.where(error > 0, np.inf, -np.inf), total)
    return np.nextafter(total, towards).astype(np.float32)


def _power_of_two(n: Array) -> Array:
    bits = np.asarray(n).view(np.uint32)
    return ((bits << np.uint32(23)) + np.uint32(0x3F800000)).view(np.float32)


def _exponent(x: Array) -> Array:
    return (np.asarray(x).view(np.uint32) >> np.uint32(23)).astype(np.float32) - np.float32(127)


def _mantissa(x: Array) -> Array:
    bits = np.asarray(x).view(np.uint32)
    return ((bits & np.uint32(0x007FFFFF)) | np.uint32(0x3F800000)).view(np.float32)
