"""Weight and reduce: sum rows that already stand in their slots."""

from __future__ import annotations

from typing import Any

from pymoe import checks
from pymoe.device.arrays import as_array, as_float32, is_cuda, namespace
from pymoe.device.backend import uses_numba
from pymoe.errors import ArgumentError, DTypeError, complaint
from pymoe.ops.weight_reduce import _numpy

__all__ = ["weight_reduce"]

Array = Any


def weight_reduce(
    slots: Array,
    topk_weights: Array | None = None,
    topk_ids: Array | None = None,
    *,
    out: Array | None = None,
    out_dtype: Any = None,
    backend: str | None = None,
) -> Array:
    """Weigh and sum the rows of each token's slots.

    ``out[t] = sum_j topk_weights[t, j] * slots[t, j]`` over the slots j whose id is not negative.

    Parameters
    ----------
    slots : ndarray, (M, topk, K), float
    topk_weights : ndarray, (M, topk), float, optional
        Taken as float32; None weighs every slot 1.
    topk_ids : ndarray, (M, topk), integer, optional
        A negative id leaves its slot out; None keeps all.
    out : ndarray, (M, K), float, optional
        Written and returned; must not overlap an input.
    out_dtype : dtype, optional
        Of the created result; None is the dtype of `slots`.  Not together with `out`.
    backend : {"numpy", "numba"}, optional
        None is the fastest there is; all give the same bits.

    Returns
    -------
    ndarray, (M, K)

    Raises
    ------
    ShapeError, DTypeError, ArgumentError
        An argument is wrong; nothing has been computed.

    Notes
    -----
    A float32 sum over slots 0..topk-1 that starts at 0, each product rounded before it is added; one rounding to the
    dtype of `out`.  A slot that is left out adds nothing, whatever it and its weight hold.

    Source
    ------
    vLLM 0.33.0 ``moe_sum`` and ``moe_fused_mul_sum``.

    Examples
    --------
    >>> import numpy as np
    >>> slots = np.array([[[1.0], [10.0]]], "f4")
    >>> weight_reduce(slots, np.array([[0.5, 2.0]]), np.array([[3, -1]])).tolist()
    [[0.5]]
    """
    call, implementation = "weight_reduce", _implementation(backend)
    slots = as_array(call, "slots", slots)
    checks.shape(call, "slots", slots, (None, None, None))
    checks.float_dtype(call, "slots", slots)
    M, topk, K = slots.shape
    if topk_weights is not None:
        topk_weights = as_array(call, "topk_weights", topk_weights)
        checks.shape(call, "topk_weights", topk_weights, (M, topk))
        checks.float_dtype(call, "topk_weights", topk_weights)
    if topk_ids is not None:
        topk_ids = as_array(call, "topk_ids", topk_ids)
        checks.shape(call, "topk_ids", topk_ids, (M, topk))
        if topk_ids.dtype.kind not in "iu":
            raise DTypeError(complaint(call, "topk_ids", "have an integer dtype", topk_ids.dtype))
    if out is None:
        out = namespace(slots).empty((M, K), slots.dtype if out_dtype is None else out_dtype)
        checks.float_dtype(call, "out_dtype", out)
    else:
        if out_dtype is not None:
            raise ArgumentError(complaint(call, "out_dtype", "be None where out is given", out_dtype))
        out = as_array(call, "out", out)
        checks.float_dtype(call, "out", out)
        inputs = {"slots": slots, "topk_weights": topk_weights, "topk_ids": topk_ids}
        checks.output(call, out, M, K, out.dtype, inputs)
    if is_cuda(slots):
        from pymoe.ops.weight_reduce import _cuda

        _cuda.weight_reduce_any(slots, topk_weights, topk_ids, out)
        return out
    weights = None if topk_weights is None else as_float32(topk_weights)
    implementation.weight_reduce(slots, weights, topk_ids, out)
    return out


def _implementation(backend: str | None) -> Any:
    """Return the module that computes; Numba is loaded on first use only."""
    if not uses_numba("weight_reduce", backend):
        return _numpy
    from pymoe.ops.weight_reduce import _numba

    return _numba
