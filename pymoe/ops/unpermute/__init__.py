"""Unpermute: weigh the experts' rows and sum them back into tokens."""

from __future__ import annotations

from typing import Any

from pymoe import checks
from pymoe.contracts import DeviceRowMap, DeviceSlabMap, RowMap
from pymoe.device.arrays import as_array, as_float32, is_cuda, namespace
from pymoe.device.backend import uses_numba
from pymoe.errors import ArgumentError, ShapeError, complaint
from pymoe.ops.unpermute import _numpy

__all__ = ["unpermute"]

Array = Any


def unpermute(
    rows: Array,
    row_map: RowMap | DeviceRowMap | DeviceSlabMap,
    *,
    topk_weights: Array | None = None,
    out: Array | None = None,
    out_dtype: Any = None,
    backend: str | None = None,
) -> Array:
    """Weigh the rows of the experts and sum them by token.

    ``out[t] = sum_j topk_weights[t, j] * rows[row_map.slot_to_row[t, j]]`` over the slots j that have a row.

    Stage: GEMM2 -> **unpermute** -> finalize.

    Parameters
    ----------
    rows : ndarray, (P, K), float
        In the order of `row_map`; further rows are not read.
    row_map : RowMap, DeviceRowMap or DeviceSlabMap
        Of `permute`; on a device rows may also be slabs, (E_local * slab_rows, K).
    topk_weights : ndarray, (M, topk), float, optional
        Taken as float32; None weighs every row 1.
    out : ndarray, (M, K), float, optional
        Written and returned; must not overlap an input.
    out_dtype : dtype, optional
        Of the created result; None is the dtype of `rows`.  Not together with `out`.
    backend : {"numpy", "numba", "numba_cuda"}, optional
        None is the fastest there is; all give the same bits.  CuPy arrays take None or "numba_cuda".

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
    dtype of `out`.  A slot without a row adds nothing, whatever its weight; a token without rows is exactly 0.

    Source
    ------
    vLLM 0.33.0 ``moe_unpermute``.

    Examples
    --------
    >>> import numpy as np
    >>> from pymoe.ops.permute import permute
    >>> row_map = permute(np.array([[1, 0], [-1, -1]]), 2)
    >>> unpermute(np.array([[1.0], [10.0]], "f4"), row_map, topk_weights=np.array([[0.5, 2.0], [1.0, 1.0]])).tolist()
    [[7.0], [0.0]]
    """
    call, implementation = "unpermute", _implementation(backend)
    rows = as_array(call, "rows", rows)
    checks.shape(call, "rows", rows, (None, None))
    checks.float_dtype(call, "rows", rows)
    on_device = is_cuda(rows) or backend == "numba_cuda"
    if on_device == isinstance(row_map, RowMap):
        where = "on the device of rows" if on_device else "in host memory"
        raise ArgumentError(complaint(call, "row_map", f"be of permute {where}", type(row_map).__name__))
    if isinstance(row_map, RowMap) and rows.shape[0] < row_map.P:
        raise ShapeError(complaint(call, "rows", f"have at least the {row_map.P} rows of row_map", rows.shape))
    shape = (row_map.slot_to_row.shape[0], rows.shape[1])
    if topk_weights is not None:
        topk_weights = as_array(call, "topk_weights", topk_weights)
        checks.shape(call, "topk_weights", topk_weights, row_map.slot_to_row.shape)
        checks.float_dtype(call, "topk_weights", topk_weights)
    if out is None:
        out = namespace(rows).empty(shape, rows.dtype if out_dtype is None else out_dtype)
        checks.float_dtype(call, "out_dtype", out)
    else:
        if out_dtype is not None:
            raise ArgumentError(complaint(call, "out_dtype", "be None where out is given", out_dtype))
        out = as_array(call, "out", out)
        checks.float_dtype(call, "out", out)
        checks.output(call, out, *shape, out.dtype, {"rows": rows, "topk_weights": topk_weights})
    if backend == "numba_cuda":
        implementation.unpermute(rows, row_map.slot_to_row, topk_weights, out)
        return out
    if on_device:
        from pymoe.ops.unpermute import _cuda

        _cuda.unpermute_any(rows, row_map.slot_to_row, topk_weights, out)
        return out
    weights = None if topk_weights is None else as_float32(topk_weights)
    implementation.unpermute(rows, row_map.slot_to_row, weights, out)
    return out


def _implementation(backend: str | None) -> Any:
    """Return the module that computes; Numba is loaded on first use only."""
    if backend == "numba_cuda":
        from pymoe.ops.unpermute import _numba_cuda

        return _numba_cuda
    if not uses_numba("unpermute", backend):
        return _numpy
    from pymoe.ops.unpermute import _numba

    return _numba
