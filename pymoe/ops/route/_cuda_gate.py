"""The router's gate on the GPU: logits in float32, a token's bits independent of how many there are."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from pymoe.device.arrays import BFLOAT16, namespace
from pymoe.device.jit import KernelId
from pymoe.device.launch import LaunchPlan
from pymoe.device.parameters import address

Array = Any

DTYPES = {np.dtype("float32"): "float", np.dtype("float16"): "pymoe::fp16", BFLOAT16: "pymoe::bf16"}
_UNIT = "route/gate.cu"
_FEW, _MEDIUM, _MANY = (1, 1, 16), (2, 2, 16), (4, 4, 8)
_MEDIUM_IN_PIECES, _MANY_IN_PIECES = (1, 2, 16), (2, 4, 8)
"""Tiles of 16 tokens and of 8 experts that a warp multiplies, and warps of a block."""
_MULTIPROCESSORS = 132
"""Of an H100.  A smaller tile spreads the work until every one has a block, a larger one reads less; the bits are the
same."""
_EACH, _VECTOR_BYTES = 8, 16


def kernels(arch: str) -> tuple[KernelId, ...]:
    """Return every instance that can be asked for on `arch`."""
    pairs = [(x, w) for x in DTYPES for w in DTYPES]
    aligned = [_kernel(x, w, shape, True) for x, w in pairs for shape in _shapes(x, w)]
    return (*aligned, *(_kernel(x, w, _FEW, False) for x, w in pairs))


def _shapes(x: np.dtype, weight: np.dtype) -> tuple[tuple[int, int, int], ...]:
    """Return the shapes for few, more and many tokens: pieces of wide numbers leave fewer registers for sums."""
    medium = _MEDIUM if BFLOAT16 in (x, weight) else _MEDIUM_IN_PIECES
    return _FEW, medium, _MANY if x == weight == BFLOAT16 else _MANY_IN_PIECES


def _kernel(x: np.dtype, weight: np.dtype, shape: tuple[int, int, int], aligned: bool) -> KernelId:
    return KernelId(
        _UNIT,
        f"pymoe::gate_kernel<{DTYPES[x]}, {DTYPES[weight]}, {', '.join(map(str, shape))}, {str(aligned).lower()}>",
    )


def gate(x: Array, weight: Array, bias: Array | None = None, *, empty: Callable[..., Array] | None = None) -> Array:
    """Return the logits ``x @ weight.T + bias``, (M, E) float32, of tokens (M, K).

    Parameters
    ----------
    x : (M, K), weight : (E, K), float32 | float16 | bfloat16, C-contiguous
        Of any two of these dtypes.
    bias : (E,), float32, optional
    empty : callable, optional
        ``empty(shape, dtype)`` gives the result; default CuPy's.

    Notes
    -----
    float32 sums.  Products of 16-bit numbers are exact, and those with float32 weights within 2**-24 of the exact ones.
    A float32 or float16 infinity (or a magnitude above 3.39e38) makes the logits of its token, or expert, NaN.
    """
    (M, K), E = x.shape, weight.shape[0]
    logits = (empty or namespace(x).empty)((M, E), np.float32)
    if M and E:
        aligned = K % _EACH == 0 and address(x) % _VECTOR_BYTES == 0 and address(weight) % _VECTOR_BYTES == 0
        arguments = (logits, x, weight, 0 if bias is None else bias)
        _plan(x.dtype, weight.dtype, M, E, aligned)(*arguments, *map(np.int32, (M, E, K)))
    return logits


@lru_cache(maxsize=1024)
def _plan(x: np.dtype, weight: np.dtype, M: int, E: int, aligned: bool) -> LaunchPlan:
    # Rows that no 16-byte load can read are read one number at a time, whatever M is: so rare that one shape must do.
    few, medium, many = _shapes(x, weight)
    if not aligned or _blocks(few, M, E) <= _MULTIPROCESSORS:
        shape = few
    else:
        shape = medium if _blocks(medium, M, E) <= 2 * _MULTIPROCESSORS else many
    tiles_m, tiles_e, warps = shape
    shared = warps * 512 * tiles_m * tiles_e
    return LaunchPlan(_kernel(x, weight, shape, aligned), (_blocks(shape, M, E), 1, 1), (32 * warps, 1, 1), shared)


def _blocks(shape: tuple[int, int, int], M: int, E: int) -> int:
    return -(-M // (16 * shape[0])) * -(-E // (8 * shape[1]))
