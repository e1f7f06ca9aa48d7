"""Users' activations on the CPU: the operations of their programs in loops that the compiler turns into vectors."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

from pymoe.device.numba_cpu import jit
from pymoe.formula import Program, spell

__all__ = ["round_row", "rows"]

_WORDS = {
    "add": "{0} + {1}", "sub": "{0} - {1}", "mul": "{0} * {1}", "div": "{0} / {1}", "neg": "-{0}",
    "fma": "fma({0}, {1}, {2})", "abs": "abs({0})", "sqrt": "sqrt({0})", "floor": "floor({0})",
    "power_of_two": "power_of_two({0})", "exponent": "exponent({0})", "mantissa": "mantissa({0})", "lt": "{0} < {1}",
    "le": "{0} <= {1}", "eq": "{0} == {1}", "ne": "{0} != {1}", "and": "{0} & {1}", "or": "{0} | {1}",
    "not": "not {0}", "select": "{1} if {0} else {2}",
}  # fmt: skip


@lru_cache(maxsize=64)
def rows(program: Program, gated: bool) -> Any:
    """Return the kernel of a program: ``kernel(start, stop, x, y, bits)``, as those of the built-in activations.

    Not kept on disk: its text is in no file, by which Numba's cache goes.
    """
    constants: dict[float | str, str] = {}

    def named(number: float) -> str:  # as a global, which Numba takes as the float32 that it is
        return constants.setdefault(repr(number), f"c{len(constants)}")

    lines = spell(program, _WORDS, named, "    {name} = {value}")
    arguments = ", ".join(f"a{i}" for i in range(program.arity))
    text = "\n".join([f"def formula({arguments}):", *lines, f"    return t{len(lines) - 1}"])
    names: dict[str, Any] = {name: np.float32(float(number)) for number, name in constants.items()}
    names |= {"fma": _fma, "sqrt": math.sqrt, "floor": np.floor, "power_of_two": _power_of_two, "exponent": _exponent,
              "mantissa": _mantissa}  # fmt: skip
    exec(text, names)  # our own words around a checked program: no text of the user's is in it
    formula: Any = njit(error_model="numpy", inline="always")(names["formula"])

    @njit(nogil=True, error_model="numpy")
    def gated_rows(start, stop, x, y, bits):
        I, narrow = x.shape[1] // 2, bits.size > 0  # noqa: E741  the project's symbol
        row = np.empty(I, np.float32)
        for r in range(start, stop):
            gate, up, line = x[r, :I], x[r, I:], row if narrow else y[r]
            for i in range(I):
                line[i] = formula(gate[i], up[i])
            if narrow:
                round_row(line, bits[r])

    @njit(nogil=True, error_model="numpy")
    def plain_rows(start, stop, x, y, bits):
        narrow = bits.size > 0
        buffer = np.empty(x.shape[1], np.float32)
        for r in range(start, stop):
            row, line = x[r], buffer if narrow else y[r]
            for i in range(len(line)):
                line[i] = formula(row[i])
            if narrow:
                round_row(line, bits[r])

    kernel = gated_rows if gated else plain_rows
    kernel.compile("void(intp, intp, float32[:, ::1], float32[:, ::1], uint16[:, ::1])")
    return kernel


@intrinsic
def _fma(context, a, b, c):
    """a * b + c, rounded once."""

    def code(context, builder, signature, arguments):
        return builder.fma(*arguments)

    return types.float32(types.float32, types.float32, types.float32), code


_inlined = jit(inline="always")


@_inlined
def _power_of_two(n):
    bits = np.float32(n).view(np.uint32)
    return np.uint32((bits << np.uint32(23)) + np.uint32(0x3F800000)).view(np.float32)


@_inlined
def _exponent(x):
    bits = np.uint32((np.float32(x).view(np.uint32) >> np.uint32(23)) | np.uint32(0x4B000000))
    return bits.view(np.float32) - np.float32(8388735.0)


@_inlined
def _mantissa(x):
    bits = np.float32(x).view(np.uint32)
    return np.uint32((bits & np.uint32(0x007FFFFF)) | np.uint32(0x3F800000)).view(np.float32)


@jit
def round_row(line, bits):
    """Round a float32 row to bfloat16, ties to even; NaN stays a quiet NaN."""
    wide: Any = line.view(np.uint32)
    for i in range(wide.size):
        b = np.uint32(wide[i])
        rounded = (b + np.uint32(0x7FFF) + ((b >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        quiet = (b >> np.uint32(16)) | np.uint32(0x40)
        bits[i] = quiet if b & np.uint32(0x7FFFFFFF) > np.uint32(0x7F800000) else rounded
