"""Users' activations on the GPU in Numba: the operations of their programs, none contracted or widened."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from pymoe.codec._numba_cuda import decode, encode
from pymoe.device._numba_ltoir import inlined, python_words
from pymoe.device.numba_gpu import SIMULATED, cuda, device, floor, fma, kernel, product, sqrt
from pymoe.formula import ClosedFunction, Program
from pymoe.formula._numba import SPELLING, define, function_of
from pymoe.formula.words import ELEMENTARY, program_of

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
def formula_of(program: Program | ClosedFunction) -> Any:
    """Return a user's function as one that kernels can call: of a program a line an operation, on float32."""
    if isinstance(program, Program):
        return device(define(program, SPELLING | {"mul": "product({0}, {1})"}, _NAMES))
    if SIMULATED:  # its floats would be Python's, which are no float32
        return function_of(program)
    words = {word: formula_of(program_of(word)) for word in ELEMENTARY if word in program.words}
    return program.build(words | python_words(apart=True), inlined)


@lru_cache(maxsize=64)
def kernel_of(program: Program | ClosedFunction, gated: bool) -> Any:
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
