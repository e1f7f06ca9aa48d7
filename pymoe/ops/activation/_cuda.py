"""Activation on CuPy arrays; GEMM1 applies it itself, so this serves whoever needs it alone."""

from __future__ import annotations

from typing import Any

import numpy as np

from pymoe.activations import ActivationConfig
from pymoe.device.arrays import BFLOAT16, namespace
from pymoe.device.enumerators import FORMATS, activation_fields
from pymoe.device.jit import KernelId
from pymoe.device.launch import LaunchPlan
from pymoe.device.own_activation import with_activation
from pymoe.device.parameters import struct
from pymoe.errors import ArgumentError, DTypeError, ShapeError, complaint

__all__ = ["activation", "kernels"]

Array = Any

_CALL = "activation"
_KERNEL = KernelId("activation/activation.cu", "pymoe::activation_kernel")
_FLOATS = {np.dtype("float32"): "F32", np.dtype("float16"): "FP16", BFLOAT16: "BF16"}
_THREADS = 256
_BLOCKS = 4096
"""Enough to fill any device several times over; threads go on in steps of the grid."""


def kernels(arch: str) -> tuple[KernelId, ...]:
    """Return every kernel this module can launch on `arch`."""
    return (_KERNEL,)


def activation(x: Array, config: ActivationConfig, out: Array | None, out_dtype: Any, backend: str | None) -> Array:
    """Do what `pymoe.ops.activation` says on CuPy arrays, on the current stream."""
    if backend not in (None, "cuda", "numba_cuda"):
        raise ArgumentError(complaint(_CALL, "backend", "be cuda, numba_cuda or None for CuPy arrays", repr(backend)))
    if x.ndim != 2 or (config.is_gated and x.shape[1] % 2):
        rule = "be 2-D, with an even number of columns for a gated activation"
        raise ShapeError(complaint(_CALL, "x", rule, x.shape))
    cupy, R, width = namespace(x), x.shape[0], config.width(x.shape[1])
    if out is None:
        out = cupy.empty((R, width), x.dtype if out_dtype is None else out_dtype)
    elif out_dtype is not None:
        raise ArgumentError(complaint(_CALL, "out_dtype", "be None where out is given", out_dtype))
    if out.shape != (R, width):
        raise ShapeError(complaint(_CALL, "out", f"have shape {(R, width)}", out.shape))
    for name, array in (("x", x), ("out", out)):
        if array.dtype not in _FLOATS:
            raise DTypeError(complaint(_CALL, name, "be float32, float16 or bfloat16", array.dtype))
    if cupy.may_share_memory(x, out):
        raise ArgumentError(complaint(_CALL, "out", "not overlap x", "overlapping memory"))
    if backend == "numba_cuda":
        from pymoe.ops.activation import _numba_cuda

        _numba_cuda.activation(x, config, out)
        return out
    fields = activation_fields(config)
    if out.size:
        rows = out if out.flags.c_contiguous else cupy.empty(out.shape, out.dtype)
        launch(cupy.ascontiguousarray(x), rows, fields, with_activation(_KERNEL, config))
        if rows is not out:
            out[...] = rows
    return out


def launch(x: Array, out: Array, fields: Any, kernel: KernelId) -> None:
    """Compute all rows of contiguous arrays."""
    blocks = min(-(-out.size // _THREADS), _BLOCKS)
    integers = (out.shape[1], FORMATS[_FLOATS[x.dtype]], FORMATS[_FLOATS[out.dtype]])
    parameters = struct(*(np.int32(number) for number in fields[:2]), *(np.float32(number) for number in fields[2:]))
    plan = LaunchPlan(kernel, (blocks, 1, 1), (_THREADS, 1, 1))
    plan(x, out, np.int64(out.shape[0]), *(np.int32(number) for number in integers), parameters)
