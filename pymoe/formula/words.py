"""The words of closed functions: operations whose meaning a backend gives."""

from __future__ import annotations

import operator
from functools import lru_cache

from pymoe.formula import elementary
from pymoe.formula.program import Builder, Program

__all__ = ["ELEMENTARY", "WORDS", "Word", "program_of"]

WORDS = {
    "rounded": "a float as float32, anything else as it is", "wide": "a float as float64, anything else as it is",
    "divide": "quotient", "larger": "Python's max of two", "smaller": "Python's min of two", "exp": "exp(x)",
    "expm1": "exp(x) - 1", "log": "log(x)", "log1p": "log(1 + x)", "tanh": "tanh(x)", "erf": "erf(x)",
    "sqrt": "square root", "floor": "largest whole number not above",
    "ceil": "smallest whole number not below", "power": "x to the y",
}  # fmt: skip
"""What a backend defines.  From "divide" on, but for the two of Python, operands and results are float32."""

ELEMENTARY = tuple(word for word in WORDS if word not in ("rounded", "wide", "larger", "smaller"))
"""Words that are programs themselves, so that they have the same bits on every backend."""


@lru_cache(maxsize=len(ELEMENTARY))
def program_of(word: str) -> Program:
    """Return what one of `ELEMENTARY` computes."""
    builder = Builder(2 if word in ("divide", "power") else 1)
    compute = operator.truediv if word == "divide" else getattr(elementary, word)
    return builder.finish(compute(*builder.arguments()))


class Word(str):
    """The name of one of `WORDS`, where a part of a closed function uses it."""
