"""What a formula may compute with: Python's operators and functions, and what each of them does to a value."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from pymoe.formula import elementary
from pymoe.formula.program import Builder, Value, float32

__all__ = ["COMPARISONS", "FUNCTIONS", "OPERATORS", "choose"]

_MOST_FACTORS = 4
"""Whole exponents up to here are products."""


def _power(x: Any, y: Any) -> Any:
    if not isinstance(x, Value) and not isinstance(y, Value):
        return x**y
    if isinstance(y, int) and abs(y) <= _MOST_FACTORS and y != 0:
        square = x * x if abs(y) > 1 else x
        product = {1: x, 2: square, 3: square * x, 4: square * square}[abs(y)]
        return product if y > 0 else 1.0 / product
    return elementary.power(x, y)


def _minimum(first: Any, *others: Any) -> Any:
    """Python's min: the first of the smallest, so that a NaN in front stays and another does not."""
    for other in others:
        first = choose(other < first, other, first)
    return first


def _maximum(first: Any, *others: Any) -> Any:
    for other in others:
        first = choose(first < other, other, first)
    return first


def _np_minimum(a: Any, b: Any) -> Any:
    """NumPy's minimum: NaN where either is NaN."""
    return choose(a != a, a, choose(b != b, b, _minimum(a, b)))


def _np_maximum(a: Any, b: Any) -> Any:
    return choose(a != a, a, choose(b != b, b, _maximum(a, b)))


def _np_sign(x: Any) -> Any:
    """NumPy's sign: 0 of both zeros, NaN of NaN."""
    return choose(x > 0.0, 1.0, choose(x < 0.0, -1.0, choose(x == 0.0, 0.0, x)))


def choose(truth: Any, this: Any, that: Any) -> Any:
    return elementary.select(truth, this, that) if isinstance(truth, Value) else (this if truth else that)


def _function(of_values: Callable[..., Any], of_numbers: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that computes numbers that are known as Python does."""
    return lambda *x: of_numbers(*x) if _builder(*x) is None else of_values(*x)


def _builder(*x: Any) -> Builder | None:
    return next((v.builder for v in x if isinstance(v, Value)), None)


def _identity(x: Any) -> Any:
    return x if isinstance(x, Value) else float(x)


OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv, ast.Pow: _power,
}  # fmt: skip
COMPARISONS: dict[type, Callable[..., Any]] = {
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}  # fmt: skip

FUNCTIONS: dict[Any, tuple[Any, Callable[..., Any]]] = {
    abs: ((1,), abs), math.fabs: ((1,), abs), np.abs: ((1,), abs), np.fabs: ((1,), abs),
    min: (range(2, 9), _minimum), max: (range(2, 9), _maximum),
    np.minimum: ((2,), _np_minimum), np.maximum: ((2,), _np_maximum),
    pow: ((2,), _power), math.pow: ((2,), _power), np.power: ((2,), _power),
    float: ((1,), _identity), np.float32: ((1,), lambda x: x if isinstance(x, Value) else float32(x)),
    np.where: ((3,), choose), np.sign: ((1,), _np_sign), np.square: ((1,), lambda x: x * x),
    np.negative: ((1,), operator.neg), np.add: ((2,), operator.add), np.subtract: ((2,), operator.sub),
    np.multiply: ((2,), operator.mul), np.divide: ((2,), operator.truediv),
}  # fmt: skip
"""What may be called: how many arguments it takes, and what it computes."""
for _name in ("exp", "expm1", "log", "log1p", "tanh", "sqrt", "floor", "ceil"):
    for _library in (math, np):
        FUNCTIONS[getattr(_library, _name)] = (1,), _function(getattr(elementary, _name), getattr(math, _name))
FUNCTIONS[math.erf] = (1,), _function(elementary.erf, math.erf)
if hasattr(math, "fma"):  # Python 3.13
    FUNCTIONS[math.fma] = (3,), _function(elementary.fma, math.fma)
