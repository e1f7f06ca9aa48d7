"""A user's activation in CUDA C++: the prelude of units that hold an activation."""

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
    "div": "divide({0}, {1})", "fma": "__fmaf_rn({0}, {1}, {2})", "abs": "fabsf({0})", "sqrt": "square_root({0})",
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
    return _BEGIN + _function("own_activation", program, program.arity == 1) + _END


@lru_cache(maxsize=256)
def _prelude_of_closed(function: ClosedFunction) -> str:
    """Return the definitions for a function that is linked: its call, and the words that it calls in turn."""
    words = sorted(function.words.intersection(ELEMENTARY))
    definitions = [_function(WORD_SYMBOL.format(word), program_of(word), external=True) for word in words]
    arguments = ", ".join(f"a{i}" for i in range(function.arity))
    return (
        f"// {function.digest}\n{_BEGIN}{''.join(definitions)}"
        f'extern "C" __device__ float {SYMBOL}({_parameters(function.arity)});\n'
        f"__device__ __forceinline__ float own_activation({_parameters(function.arity, function.arity == 1)}) {{\n"
        f"    return {SYMBOL}({arguments});\n}}\n{_END}"
    )


_BEGIN = '#define PYMOE_OWN_ACTIVATION\n#include "activation/operations.cuh"\nnamespace pymoe {\n'
_END = "}  // namespace pymoe\n"


def _function(name: str, program: Program, unread: bool = False, external: bool = False) -> str:
    """Return a program as a function, which `unread` gives one more parameter."""
    lines = spell(program, _WORDS, _number, "    const {kind} {name} = {value};\n")
    kind = 'extern "C" __device__' if external else "__device__ __forceinline__"
    return (
        f"{kind} float {name}({_parameters(program.arity, unread)}) {{\n"
        f"{''.join(lines)}    return t{len(lines) - 1};\n}}\n"
    )


def _parameters(arity: int, unread: bool = False) -> str:
    return ", ".join([*(f"float a{i}" for i in range(arity)), *["float"] * unread])


def _number(number: float) -> str:
    """Return a float32 constant, exactly."""
    if math.isnan(number):
        return "__uint_as_float(0x7fc00000u)"
    if math.isinf(number):
        return f"__uint_as_float({'0xff800000u' if number < 0 else '0x7f800000u'})"
    return f"({number.hex()}f)"
