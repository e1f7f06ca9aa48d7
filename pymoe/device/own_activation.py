"""A user's activation in CUDA C++: the prelude of units that hold an activation.

It defines ``own_formula(a0, a1, quotient)``, a template of what divides: an epilogue divides without a branch, and
looks once a warp whether that was allowed.
"""

from __future__ import annotations

import math
from functools import lru_cache

from pymoe.activations import ActivationConfig, RegisteredActivation
from pymoe.device.jit import KernelId
from pymoe.device.linking import SYMBOL, WORD_SYMBOL
from pymoe.formula import ClosedFunction, Program, spell
from pymoe.formula.words import ELEMENTARY, program_of

__all__ = ["with_activation"]

_WORDS = {
    # Intrinsics, which the compiler never joins to a fused operation of its own making.
    "add": "__fadd_rn({0}, {1})", "sub": "__fsub_rn({0}, {1})", "mul": "__fmul_rn({0}, {1})", "neg": "-{0}",
    "div": "quotient({0}, {1})", "fma": "__fmaf_rn({0}, {1}, {2})", "abs": "fabsf({0})", "sqrt": "square_root({0})",
    "floor": "floorf({0})", "power_of_two": "power_of_two({0})", "exponent": "exponent_of({0})",
    "mantissa": "mantissa_of({0})", "lt": "{0} < {1}", "le": "{0} <= {1}", "eq": "{0} == {1}", "ne": "{0} != {1}",
    "and": "{0} && {1}", "or": "{0} || {1}", "not": "!{0}", "select": "{0} ? {1} : {2}",
}  # fmt: skip


def with_activation(kernel: KernelId, activation: ActivationConfig) -> KernelId:
    """Return the instance of a kernel for an activation: another one where that is a user's."""
    own = activation.activation
    if not isinstance(own, RegisteredActivation):
        return kernel
    if isinstance(own.program, ClosedFunction):
        return kernel._replace(prelude=_prelude_of_closed(own.program), linked=own.program)
    return kernel._replace(prelude=_prelude(own.program))


@lru_cache(maxsize=256)
def _prelude(program: Program) -> str:
    """Return the definitions that ``activation/activation.cuh`` asks for; equal for what computes the same."""
    return _BEGIN + _formula(program.arity, "quotient", _body(program, _WORDS)) + _END


@lru_cache(maxsize=256)
def _prelude_of_closed(function: ClosedFunction) -> str:
    """Return the definitions for a function that is linked: its call, and the words that it calls in turn."""
    words = sorted(function.words.intersection(ELEMENTARY))
    definitions = [_external(WORD_SYMBOL.format(word), program_of(word)) for word in words]
    arguments = ", ".join(f"a{i}" for i in range(function.arity))
    call = f"    return {SYMBOL}({arguments});\n"
    return (
        f"// {function.digest}\n{_BEGIN}{''.join(definitions)}"
        f'extern "C" __device__ float {SYMBOL}({_parameters(function.arity)});\n'
        f"{_formula(function.arity, '', call)}{_END}"
    )


_BEGIN = '#define PYMOE_OWN_ACTIVATION\n#include "activation/operations.cuh"\nnamespace pymoe {\n'
_END = "}  // namespace pymoe\n"


def _formula(arity: int, quotient: str, body: str) -> str:
    parameters = f"{_parameters(arity)}{', float' * (2 - arity)}, Quotient {quotient}".rstrip()
    return f"template <class Quotient>\n__device__ __forceinline__ float own_formula({parameters}) {{\n{body}}}\n"


def _external(name: str, program: Program) -> str:
    """Return a program as a function that a linked one calls by its name."""
    body = _body(program, _WORDS | {"div": "divide({0}, {1})"})
    return f'extern "C" __device__ float {name}({_parameters(program.arity)}) {{\n{body}}}\n'


def _body(program: Program, words: dict[str, str]) -> str:
    lines = spell(program, words, _number, "    const {kind} {name} = {value};\n")
    return f"{''.join(lines)}    return t{len(lines) - 1};\n"


def _parameters(arity: int) -> str:
    return ", ".join(f"float a{i}" for i in range(arity))


def _number(number: float) -> str:
    """Return a float32 constant, exactly."""
    if math.isnan(number):
        return "__uint_as_float(0x7fc00000u)"
    if math.isinf(number):
        return f"__uint_as_float({'0xff800000u' if number < 0 else '0x7f800000u'})"
    return f"({number.hex()}f)"
