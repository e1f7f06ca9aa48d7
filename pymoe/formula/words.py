"""The words of closed functions: operations whose meaning a backend gives."""

from __future__ import annotations

import operator
from functools import lru_cache

import numpy as np

from pymoe.formula import elementary
from pymoe.formula.functions import FUNCTIONS
from pymoe.formula.program import Builder, Program

__all__ = ["ELEMENTARY", "WORDS", "Word", "program_of"]

WORDS = {
    "rounded": "a float as float32, anything else as it is", "wide": "a float as float64, anything else as it is",
    "bounded": "a number as one of 64 bits, NaN as 0", "larger": "Python's max", "smaller": "Python's min",
    "divide": "quotient", "maximum": "NumPy's, NaN where either is", "minimum": "the same", "exp": "exp(x)",
    "expm1": "exp(x) - 1", "log": "log(x)", "log1p": "log(1 + x)", "tanh": "tanh(x)", "erf": "erf(x)",
    "sqrt": "square root", "floor": "largest whole number not above", "sign": "NumPy's: 1, 0, -1 or NaN",
    "ceil": "smallest whole number not below", "power": "x to the y",
}  # fmt: skip
"""What a backend defines.  From "divide" on operands and results are float32."""

_TYPED = ("rounded", "wide", "bounded", "larger", "smaller")
"""Words whose result depends on the type of their operands."""
ELEMENTARY = tuple(word for word in WORDS if word not in _TYPED)
"""Words that are programs themselves, so that they have the same bits on every backend."""

_OF_NUMPY = {"maximum": np.maximum, "minimum": np.minimum, "sign": np.sign}


@lru_cache(maxsize=len(ELEMENTARY))
def program_of(word: str) -> Program:
    """Return what one of `ELEMENTARY` computes."""
    builder = Builder(2 if word in ("divide", "power", "maximum", "minimum") else 1)
    if word in _OF_NUMPY:
        _, compute = FUNCTIONS[_OF_NUMPY[word]]
    else:
        compute = operator.truediv if word == "divide" else getattr(elementary, word)
    return builder.finish(compute(*builder.arguments()))


class Word(str):
    """The name of one of `WORDS`, where a part of a closed function uses it."""
