"""Permute: which rows each local expert computes, in which order."""

from __future__ import annotations

from typing import Any

import numpy as np

from pymoe import checks
from pymoe.contracts import DeviceRowMap, RowMap
from pymoe.device.arrays import as_array, is_cuda, namespace
from pymoe.device.backend import uses_numba
from pymoe.environment import is_checked
from pymoe.errors import ArgumentError, DTypeError, ShapeError, complaint
from pymoe.ops.permute import _numpy
from pymoe.ops.permute.align import batched_moe_align_block_size, moe_align_block_size

__all__ = [
    "batched_moe_align_block_size",
    "count_expert_num_tokens",
    "moe_align_block_size",
    "permute",
    "permute_rows",
]

Array = Any


def permute(
    topk_ids: Array, E_local: int, *, expert_map: Array | None = None, tile_rows: int = 64, backend: str | None = None
) -> Any:
    """Sort the routed slots by local expert; no row is moved.

    Stage: prepare -> **permute** -> GEMM1.

    Parameters
    ----------
    topk_ids : ndarray, (M, topk), integer
        Global expert of each slot.  An id below 0, at or above the global number of experts, or mapped to -1 gets no
        row; a repeated id gets one row a slot.
    E_local : int
        Experts here.
    expert_map : ndarray, (global_num_experts,), integer, optional
        Local index of each global expert, -1 where it is not here; None means that ids are local.
    tile_rows : int
        Most rows of a tile in the work list of a `DeviceRowMap`; a `RowMap` has none.
    backend : {"numpy", "numba", "numba_cuda"}, optional
        None is the fastest there is; all give the same bits.  CuPy arrays take None or "numba_cuda".

    Returns
    -------
    RowMap, or DeviceRowMap for CuPy arrays
        Its `expert_offsets` (E_local + 1,), `row_to_slot` (P,) and `slot_to_row` (M, topk) are int64, or int32 on the
        device, where `row_to_slot` has room for all slots.

    Raises
    ------
    ShapeError, DTypeError
        `topk_ids` is not 2-D or not integer, or `expert_map` not 1-D or not integer.
    ArgumentError
        `E_local` below 0, a map entry outside -1..E_local-1, or, in the checked mode, an id but -1 outside the range.
        On a device map entries are looked at in the checked mode only; else those outside count as -1.
    UnsupportedError
        On a device: more than 4096 experts here, or 2**31 slots.

    Notes
    -----
    Slots ascend within an expert, so the order depends on nothing but the ids.  On a device nothing waits.

    Source
    ------
    vLLM 0.33.0 ``moe_permute`` (``expert_first_token_offset``, ``permuted_idx``, ``inv_permuted_idx``); differs: slots
    without a row are absent instead of sorted last.

    Examples
    --------
    >>> import numpy as np
    >>> row_map = permute(np.array([[2, 0], [2, -1]]), 3)
    >>> row_map.expert_offsets.tolist(), row_map.row_to_slot.tolist(), row_map.slot_to_row.tolist()
    ([0, 1, 1, 3], [1, 0, 2], [[1, 0], [2, -1]])
    """
    topk_ids, E_local, expert_map = _routing("permute", topk_ids, E_local, expert_map)
    if backend == "numba_cuda":
        from pymoe.ops.permute import _numba_cuda

        tile_rows = checks.integer("permute", "tile_rows", tile_rows, 1)
        return _numba_cuda.permute_alone(topk_ids, E_local, expert_map, tile_rows)
    if is_cuda(topk_ids):
        uses_numba("permute", backend)  # refuses what is no backend at all
        from pymoe.ops.permute import _cuda

        tile_rows = checks.integer("permute", "tile_rows", tile_rows, 1)
        return _cuda.permute(topk_ids, E_local, expert_map, tile_rows)
    return _implementation("permute", backend).permute(topk_ids, E_local, expert_map)


def permute_rows(x: Array, row_map: RowMap | DeviceRowMap, *, backend: str | None = None) -> Array:
    """Return the tokens' rows in the order of `row_map`.

    Parameters
    ----------
    x : ndarray, (M, K), any dtype
        One row a token; codes and scales travel alike.
    row_map : RowMap
        Of `permute`.
    backend : {"numpy", "numba"}, optional
        All give the same bits.

    Returns
    -------
    ndarray, (P, K), dtype of `x`; (M * topk, K) on a device
        Row r is ``x[row_map.row_to_token[r]]``; rows from P on are not written.

    Raises
    ------
    ShapeError
        `x` is not 2-D or has another number of tokens than `row_map`.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([[1.0], [2.0]])
    >>> permute_rows(x, permute(np.array([[1, 0], [0, -1]]), 2)).tolist()
    [[1.0], [2.0], [1.0]]
    """
    x = as_array("permute_rows", "x", x)
    checks.shape("permute_rows", "x", x, (row_map.slot_to_row.shape[0], None))
    if is_cuda(x) != isinstance(row_map, DeviceRowMap):
        rule = "be on the device of row_map" if isinstance(row_map, DeviceRowMap) else "be in host memory as row_map is"
        raise ArgumentError(complaint("permute_rows", "x", rule, type(x).__name__))
    if isinstance(row_map, DeviceRowMap):
        from pymoe.ops.permute import _cuda

        rows = namespace(x).empty((row_map.slot_to_row.size, x.shape[1]), x.dtype)
        _cuda.scatter_rows(namespace(x).ascontiguousarray(x), row_map.slot_to_row, rows)
        return rows
    return _implementation("permute_rows", backend).permute_rows(x, row_map.row_to_token)


def count_expert_num_tokens(topk_ids: Array, E_local: int, expert_map: Array | None = None) -> Array:
    """Return how many slots each local expert computes.

    Parameters
    ----------
    topk_ids : ndarray, (M, topk), integer
    E_local : int
    expert_map : ndarray, (global_num_experts,), integer, optional
        As for `permute`.

    Returns
    -------
    ndarray, (E_local,), int32

    Raises
    ------
    ShapeError, DTypeError, ArgumentError
        As `permute`.

    Source
    ------
    vLLM 0.33.0 ``count_expert_num_tokens``.

    Examples
    --------
    >>> import numpy as np
    >>> count_expert_num_tokens(np.array([[2, 0], [2, -1]]), 3).tolist()
    [1, 0, 2]
    """
    topk_ids, E_local, expert_map = _routing("count_expert_num_tokens", topk_ids, E_local, expert_map)
    if is_cuda(topk_ids):
        from pymoe.ops.permute import _cuda

        counts = namespace(topk_ids).zeros(E_local, np.int32)
        _cuda.count_experts(topk_ids, E_local, expert_map, counts)
        return counts
    local = _numpy.local_experts(topk_ids, E_local, expert_map)
    return np.bincount(local[local >= 0], minlength=E_local).astype(np.int32)


def _routing(call: str, topk_ids: Array, E_local: int, expert_map: Array | None) -> tuple[Array, int, Array | None]:
    """Return the three arguments that say whose a slot is, or refuse them."""
    topk_ids = as_array(call, "topk_ids", topk_ids)
    if topk_ids.ndim != 2:
        raise ShapeError(complaint(call, "topk_ids", "have shape (any, any)", topk_ids.shape))
    if topk_ids.dtype.kind not in "iu":
        raise DTypeError(complaint(call, "topk_ids", "have an integer dtype", topk_ids.dtype))
    E_local = checks.integer(call, "E_local", E_local, 0)
    mapping = None if expert_map is None else as_array(call, "expert_map", expert_map)
    mapping, global_num_experts = checks.expert_map(call, mapping, -1, E_local)
    if is_checked():
        checks.legal_ids(call, topk_ids, global_num_experts)
    if is_cuda(topk_ids):
        topk_ids = namespace(topk_ids).ascontiguousarray(topk_ids)
        mapping = None if mapping is None else namespace(topk_ids).asarray(mapping)
    return topk_ids, E_local, mapping


def _implementation(call: str, backend: str | None) -> Any:
    """Return the module that computes; Numba is loaded on first use only."""
    if not uses_numba(call, backend):
        return _numpy
    from pymoe.ops.permute import _numba

    return _numba
