"""Users' functions for Numba on the CPU: programs, an operation a line, and closed functions as they are."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
from numba import njit, types
from numba.core.imputils import impl_ret_borrowed
from numba.extending import intrinsic

from pymoe.errors import ArgumentError, complaint
from pymoe.formula.closed import ClosedFunction
from pymoe.formula.program import PYTHON, Program, spell
from pymoe.formula.words import ELEMENTARY, program_of

__all__ = ["PLAIN", "SPELLING", "check", "define", "function_of", "inlined"]

SPELLING = PYTHON | {
    "div": "{0} / {1}", "abs": "abs({0})", "sqrt": "sqrt({0})", "floor": "floor({0})", "not": "not {0}",
    "select": "{1} if {0} else {2}",
}  # fmt: skip

inlined: Any = njit(error_model="numpy", inline="always")
"""LLVM leaves calls of this length alone, and a loop with a call stays scalar."""


def define(program: Program, spelling: dict[str, str], names: dict[str, Any]) -> Any:
    """Return a program as a Python function that calls `names`: a line an operation."""
    constants: dict[str, str] = {}

    def named(number: float) -> str:  # as a global, which Numba takes as the float32 that it is
        return constants.setdefault(repr(number), f"c{len(constants)}")

    lines = spell(program, spelling, named, "    {name} = {value}")
    arguments = ", ".join(f"a{i}" for i in range(program.arity))
    text = "\n".join([f"def formula({arguments}):", *lines, f"    return t{len(lines) - 1}"])
    scope = names | {name: np.float32(float(number)) for number, name in constants.items()}
    exec(text, scope)  # our own words around a checked program: no text of the user's is in it
    return scope["formula"]


@intrinsic
def _fma(context, a, b, c):
    """a * b + c, rounded once."""

    def code(context, builder, signature, arguments):
        return builder.fma(*arguments)

    return types.float32(types.float32, types.float32, types.float32), code


@inlined
def _power_of_two(n):
    bits = np.float32(n).view(np.uint32)
    return np.uint32((bits << np.uint32(23)) + np.uint32(0x3F800000)).view(np.float32)


@inlined
def _exponent(x):
    bits = np.uint32((np.float32(x).view(np.uint32) >> np.uint32(23)) | np.uint32(0x4B000000))
    return bits.view(np.float32) - np.float32(8388735.0)


@inlined
def _mantissa(x):
    bits = np.float32(x).view(np.uint32)
    return np.uint32((bits & np.uint32(0x007FFFFF)) | np.uint32(0x3F800000)).view(np.float32)


_NAMES = {"fma": _fma, "sqrt": math.sqrt, "floor": np.floor, "power_of_two": _power_of_two, "exponent": _exponent,
          "mantissa": _mantissa}  # fmt: skip


def function_of(program: Program | ClosedFunction) -> Any:
    """Return a user's function as one that Numba's functions call."""
    if isinstance(program, ClosedFunction):
        return program.build(_words(), inlined)
    return inlined(define(program, SPELLING, _NAMES))


def _as_float(width: Any) -> Any:
    """Return the word that makes a float of another width `width`, and leaves anything else alone."""

    @intrinsic
    def convert(context, x):
        given = types.unliteral(x)
        wanted = width if isinstance(given, types.Float) else given

        def code(context, builder, signature, arguments):
            if wanted is given:
                return impl_ret_borrowed(context, builder, wanted, arguments[0])
            return context.cast(builder, arguments[0], given, wanted)

        return wanted(given), code

    return convert


def larger(a, b):
    return b if a < b else a


def smaller(a, b):
    return b if b < a else a


def bounded(x):
    most, least = 9223372036854774784, -9223372036854775808  # the largest float64 below 2**63, and -2**63
    return (x if x >= least else least) if x <= most else (most if x > most else 0)


PLAIN = {"larger": larger, "smaller": smaller, "bounded": bounded}
"""Words that are plain functions."""


@lru_cache(maxsize=1)
def _words() -> dict[str, Any]:
    """Return the words of closed functions."""
    elementary = {word: function_of(program_of(word)) for word in ELEMENTARY}
    conversions = {"rounded": _as_float(types.float32), "wide": _as_float(types.float64)}
    return elementary | conversions | {word: inlined(function) for word, function in PLAIN.items()}


def check(call: str, function: ClosedFunction, reason: str) -> None:
    """Compile a closed function.

    Raises
    ------
    ArgumentError
        Numba refuses it as well, or it returns no number; `reason` is why it was not translated.
    """
    compiled = njit(error_model="numpy")(function_of(function).py_func)
    try:
        compiled.compile((types.float32,) * function.arity)
    except Exception as error:  # of Numba, which raises kinds of Python's too
        remedy = f"Numba does not compile it either: {_short(error)}"
        raise ArgumentError(f"{reason} {remedy}") from None
    result = compiled.nopython_signatures[0].return_type
    if not isinstance(types.unliteral(result), types.Float | types.Integer | types.Boolean):
        got = f"{result} at {function.place}"
        raise ArgumentError(complaint(call, "fn", "return a number on every path", got)) from None


def _short(error: Any) -> str:
    """Return the reason and the place of an error of Numba, which says much."""
    text = getattr(error, "msg", str(error))
    lines = [line.strip(" >.") for line in text.splitlines() if line.strip(" >.") and "Failed in" not in line]
    reason = " ".join(lines[: 2 if lines[0].endswith(":") else 1]) if lines else type(error).__name__
    loc = getattr(error, "loc", None)
    place = f" at {loc.filename}:{loc.line}" if loc is not None else ""
    return f"{reason}{place}."
