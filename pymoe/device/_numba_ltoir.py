"""Users' functions for Numba-CUDA: as LTO-IR, of which nvJitLink makes a part of a kernel."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from pymoe.device.linking import SYMBOL, WORD_SYMBOL
from pymoe.device.numba_gpu import SIMULATED, cuda
from pymoe.errors import BackendUnavailableError, complaint
from pymoe.formula import ClosedFunction
from pymoe.formula._numba import PLAIN
from pymoe.formula.words import ELEMENTARY, program_of

__all__ = ["compile_function", "inlined", "python_words"]

inlined: Any = cuda.jit(device=True, inline="always")
"""Inlined by Numba itself: a function that it calls would be compiled for the current device, and there may be none."""


def _as_float(width: str, apart: bool = False) -> Any:
    """Return the word that makes a float of another width `width`, and leaves anything else alone.

    The result is `apart` where no compiler may join what made it with what comes next: it is then a sum, rounded by
    itself, with the zero that changes nothing.
    """
    from numba.cuda import cgutils, types
    from numba.cuda.extending import intrinsic

    @intrinsic
    def convert(context, x):
        given = types.unliteral(x)
        wanted = getattr(types, width) if isinstance(given, types.Float) else given

        def code(context, builder, signature, arguments):
            value = context.cast(builder, arguments[0], given, wanted)
            if not apart or wanted is given and not isinstance(given, types.Float):
                return value
            sum_type = ir.FunctionType(value.type, [value.type, value.type])
            add = cgutils.get_or_insert_function(builder.module, sum_type, "llvm.nvvm.add.rn.f")
            return builder.call(add, [value, ir.Constant(value.type, -0.0)])

        return wanted(given), code

    return convert


def python_words(apart: bool) -> dict[str, Any]:
    """Return the words that depend on their operand's type."""
    conversions = {"rounded": _as_float("float32", apart), "wide": _as_float("float64")}
    return conversions | {word: inlined(function) for word, function in PLAIN.items()}


def compile_function(function: ClosedFunction, arch: str) -> bytes:
    """Return a function as LTO-IR that calls the elementary words by their C names."""
    if SIMULATED:
        remedy = "Unset NUMBA_ENABLE_CUDASIM"
        text = complaint("pymoe", "Numba-CUDA", "compile activations that are not translated", "its simulator", remedy)
        raise BackendUnavailableError(text)
    from numba.cuda import types

    words = python_words(apart=False) | {word: _external(word) for word in function.words.intersection(ELEMENTARY)}
    number = int(arch.removeprefix("sm_").rstrip("a"))
    code, _ = cuda.compile(
        function.build(words, inlined).py_func,
        types.float32(*[types.float32] * function.arity),
        cc=divmod(number, 10),
        output="ltoir",
        abi="c",
        abi_info={"abi_name": SYMBOL},
        forceinline=True,
    )
    return code


def _external(word: str) -> Any:
    """Return a word as a function that the kernel's unit defines."""
    operands = ", ".join(["float32"] * program_of(word).arity)
    return cuda.declare_device(WORD_SYMBOL.format(word), f"float32({operands})", abi="c")
