"""A user's activation in CUDA C++: the prelude of units that hold an activation."""

from __future__ import annotations

import math
from functools import lru_cache

from pymoe.activations import ActivationConfig, RegisteredActivation
from pymoe.device.jit import KernelId
from pymoe.formula import spell

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
    return kernel._replace(prelude=_prelude(own)) if isinstance(own, RegisteredActivation) else kernel


@lru_cache(maxsize=256)
def _prelude(activation: RegisteredActivation) -> str:
    """Return the definitions that ``activation/activation.cuh`` asks for; equal for what computes the same."""
    lines = spell(activation.program, _WORDS, _number, "    const {kind} {name} = {value};\n")
    names = "float a0, float a1" if activation.is_gated else "float a0, float"
    return (
        "#define PYMOE_OWN_ACTIVATION\n"
        '#include "activation/operations.cuh"\n'
        "namespace pymoe {\n"
        f"__device__ __forceinline__ float own_activation({names}) {{\n"
        f"{''.join(lines)}    return t{len(lines) - 1};\n}}\n}}  // namespace pymoe\n"
    )


def _number(number: float) -> str:
    """Return a float32 constant, exactly."""
    if math.isnan(number):
        return "__uint_as_float(0x7fc00000u)"
    if math.isinf(number):
        return f"__uint_as_float({'0xff800000u' if number < 0 else '0x7f800000u'})"
    return f"({number.hex()}f)"
