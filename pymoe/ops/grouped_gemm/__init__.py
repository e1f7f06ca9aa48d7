"""Grouped GEMM: every row times the weights of the expert that owns it."""

from __future__ import annotations

from typing import Any

import numpy as np

from pymoe import checks
from pymoe.codec.e8m0 import decode_e8m0
from pymoe.codec.fp8 import decode_e4m3
from pymoe.codec.weights import WeightOperand
from pymoe.device.arrays import HIDDEN_DTYPES, as_numpy, is_cuda
from pymoe.device.backend import uses_numba
from pymoe.errors import ArgumentError, DTypeError, ShapeError, UnsupportedError, complaint
from pymoe.ops.grouped_gemm import _numpy
from pymoe.ops.grouped_gemm._operands import Rows
from pymoe.quantization import QuantKey, kTf32

__all__ = ["grouped_gemm"]

Array = Any

_CALL = "grouped_gemm"


def grouped_gemm(
    a: Array,
    w: WeightOperand,
    expert_offsets: Array,
    *,
    gather: Array | None = None,
    a_scale: Array | None = None,
    a_key: QuantKey | None = None,
    out: Array | None = None,
    backend: str | None = None,
) -> Array:
    """Multiply rows grouped by expert with that expert's weights.

    Stage: permute -> **GEMM1** -> activation -> **GEMM2** -> unpermute.

    Parameters
    ----------
    a : ndarray, (rows, K)
        float32, float16 or bfloat16, or codes under `a_key` with `a_scale`.  A CuPy array computes on its device; the
        other arrays must be there too.
    w : WeightOperand
        (E, N, K) with its scales and bias; row = output feature.
    expert_offsets : ndarray, (E + 1,), integer
        Rows of expert e are ``expert_offsets[e]:expert_offsets[e + 1]``; the last entry is P.
    gather : ndarray, (P,), integer, optional
        Row of `a` for each row; None is the row itself.
    a_scale : ndarray, optional
        (1,) for all rows, (rows, 1) a row, or (rows, groups) along k.
    a_key : QuantKey, optional
        How `a` is quantized; None where it is floats.
    out : ndarray, (P, N) float32, C-contiguous, optional
        Written and returned.
    backend : {"numpy", "numba", "cuda", "numba_cuda"}, optional
        None is "numba" for NumPy arrays and "cuda" for CuPy arrays, which take "numba_cuda" too.

    Returns
    -------
    ndarray, (P, N), float32

    Raises
    ------
    ShapeError, DTypeError, ArgumentError
        Arguments that do not fit each other; nothing has been computed.

    Notes
    -----
    Sums run over k in float32 (int8 by int8: exact integers).  Tensor, channel and token scales multiply the sum
    afterwards, first the row's, then the weight's; blocks of fp8 and int8 scale their partial sums; mx and nvfp4
    scale before the sum, weight-only schemes there or their partial sums, see ``docs/numerics``.  A row's bits depend
    on no other row, nor on how many rows or threads.

    Source
    ------
    vLLM 0.33.0 ``fused_moe_kernel``; differs: no padding of rows, float32 result.
    """
    if backend == "numba_cuda":
        from pymoe.ops.grouped_gemm import _numba_cuda

        return _numba_cuda.multiply_sorted(a, w, expert_offsets, gather, a_scale, a_key, out)
    if is_cuda(a):
        from pymoe.ops.grouped_gemm import _cuda

        return _cuda.multiply_sorted(a, w, expert_offsets, gather, a_scale, a_key, out, backend)
    if w.key == kTf32:
        raise UnsupportedError(complaint(_CALL, "w.key", "be another for NumPy arrays", w.key.name, "Use no key"))
    numba = uses_numba(_CALL, backend)
    a = as_numpy(_CALL, "a", a)
    E, N = w.codes.shape[:2]
    offsets, gather = _rows(expert_offsets, E, gather, a)
    P = int(offsets[-1])
    if out is None:
        out = np.empty((P, N), np.float32)
    elif out.shape != (P, N) or out.dtype != np.float32 or not out.flags.c_contiguous:
        got = f"{out.dtype} {out.shape}"
        raise ShapeError(complaint(_CALL, "out", f"be C-contiguous float32 of shape {(P, N)}", got))
    if w.bias is not None:
        checks.shape(_CALL, "w.bias", w.bias, (E, N))
    rows = _rows_of(a, w, a_key, a_scale)
    if P and N:
        if numba:
            from pymoe.ops.grouped_gemm import _numba

            _numba.grouped_gemm(rows, w, offsets, gather, out)
        else:
            _numpy.grouped_gemm(rows, w, offsets, gather, out)
    return out


def _rows(expert_offsets: Any, E: int, gather: Any, a: Array) -> tuple[Array, Array]:
    """Return (offsets, source rows) as int64, checked so that no row is read out of bounds."""
    offsets = np.ascontiguousarray(expert_offsets, np.int64)
    checks.shape(_CALL, "expert_offsets", offsets, (E + 1,))
    if E and (offsets[0] != 0 or (np.diff(offsets) < 0).any()):
        raise ArgumentError(complaint(_CALL, "expert_offsets", "start at 0 and never fall", offsets.tolist()))
    P = int(offsets[-1])
    if gather is None:
        if a.shape[0] != P:
            raise ShapeError(complaint(_CALL, "a", f"have {P} rows like expert_offsets", a.shape))
        return offsets, np.arange(P)
    gather = np.ascontiguousarray(gather, np.int64)
    checks.shape(_CALL, "gather", gather, (P,))
    if P and (gather.min() < 0 or gather.max() >= a.shape[0]):
        rule = f"name rows in 0..{a.shape[0] - 1}"
        raise ArgumentError(complaint(_CALL, "gather", rule, f"{gather.min()}..{gather.max()}"))
    return offsets, gather


def _rows_of(a: Array, w: WeightOperand, key: QuantKey | None, scale: Any) -> Rows:
    """Return the left operand, checked, with float32 factors."""
    packed = 2 if key is not None and key.is_packed else 1
    checks.shape(_CALL, "a", a, (None, w.K // packed))
    if key is None:
        if a.dtype not in HIDDEN_DTYPES:
            raise DTypeError(complaint(_CALL, "a", "be float32, float16 or bfloat16 without a_key", a.dtype))
        return Rows(a)
    if a.dtype.itemsize != 1:
        raise DTypeError(complaint(_CALL, "a", f"hold one-byte codes of {key.name}", a.dtype))
    if scale is None:
        raise ArgumentError(complaint(_CALL, "a_scale", f"be given for {key.name}", None))
    scale = as_numpy(_CALL, "a_scale", scale)
    if key.scale.group_shape.col <= 1:
        if scale.size not in (1, a.shape[0]):
            raise ShapeError(complaint(_CALL, "a_scale", f"hold 1 or {a.shape[0]} scales", scale.shape))
        return Rows(a, key, scale.reshape(-1).astype(np.float32, copy=False))
    extent = key.scale.group_shape.col
    checks.shape(_CALL, "a_scale", scale, (a.shape[0], -(-w.K // extent)))
    in_blocks = w.key is not None and w.key.dtype in ("fp8", "int8") and extent == w.block[1] and w.block[0] > 1
    return Rows(a, key, _float_scale(scale, key), by_value=not in_blocks)


def _float_scale(scale: Array, key: QuantKey) -> Array:
    """Return group scales in float32, whatever they are stored in."""
    if scale.dtype.itemsize > 1:
        return np.ascontiguousarray(scale, np.float32)
    return decode_e4m3(scale) if key.scale.dtype == "fp8" else decode_e8m0(scale)
