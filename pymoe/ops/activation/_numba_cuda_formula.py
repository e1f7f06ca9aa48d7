"""Users' activations on the GPU in Numba: the operations of their programs, none contracted or widened."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from pymoe.codec._numba_cuda import decode, encode
from pymoe.device.numba_gpu import cuda, device, floor, fma, kernel, product, sqrt
from pymoe.formula import Program, spell
from pymoe.ops.activation._numba_formula import _WORDS

__all__ = ["kernel_of"]

THREADS = 128
_WHOLE = np.float32(8388735.0)
"""2^23 + 127: what an exponent, put into the fraction of 2^23, is too large by."""


@device
def power_of_two(n):
    return np.uint32((n.view(np.uint32) << 23) + 0x3F800000 & 0xFFFFFFFF).view(np.float32)


@device
def exponent(x):
    return np.float32(np.uint32((x.view(np.uint32) >> 23) | 0x4B000000).view(np.float32) - _WHOLE)


@device
def mantissa(x):
    return np.uint32((x.view(np.uint32) & 0x007FFFFF) | 0x3F800000).view(np.float32)


_NAMES = {"fma": fma, "sqrt": sqrt, "floor": floor, "product": product, "power_of_two": power_of_two,
          "exponent": exponent, "mantissa": mantissa}  # fmt: skip


# docs: registered
def formula_of(program: Program) -> Any:
    """Return a program as a function that kernels can call: a line an operation, on float32."""
    constants: dict[str, str] = {}

    def named(number: float) -> str:  # as a global, which Numba takes as the float32 that it is
        return constants.setdefault(repr(number), f"c{len(constants)}")

    lines = spell(program, _WORDS | {"mul": "product({0}, {1})"}, named, "    {name} = {value}")
    arguments = ", ".join(f"a{i}" for i in range(program.arity))
    text = "\n".join([f"def formula({arguments}):", *lines, f"    return t{len(lines) - 1}"])
    names: dict[str, Any] = _NAMES | {name: np.float32(float(number)) for number, name in constants.items()}
    exec(text, names)  # our own words around a checked program: no text of the user's is in it
    return device(names["formula"])


@lru_cache(maxsize=64)
def kernel_of(program: Program, gated: bool) -> Any:
    """Return the kernel of a user's activation."""
    formula = formula_of(program)

    @kernel
    def registered_kernel(out, form, x, x_form, row_to_slot):
        row, width = cuda.blockIdx.x, out.shape[1]
        if row_to_slot[row] < 0:
            return
        for i in range(cuda.blockIdx.y * THREADS + cuda.threadIdx.x, width, cuda.gridDim.y * THREADS):
            g = decode(x[row, i], x_form)
            y = formula(g, decode(x[row, width + i], x_form)) if gated else formula(g)
            out[row, i] = encode(np.float32(y), form)

    return registered_kernel


# end: registered
