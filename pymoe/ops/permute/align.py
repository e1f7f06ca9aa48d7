"""The index sort of block-tiled GEMMs: slots by expert, every expert padded to whole blocks."""

from __future__ import annotations

from typing import Any

import numpy as np

from pymoe import checks
from pymoe.device.arrays import as_array, as_numpy, is_cuda, namespace
from pymoe.errors import ArgumentError, DTypeError, UnsupportedError, complaint
from pymoe.ops.permute import _numpy

Array = Any


def moe_align_block_size(
    topk_ids: Array,
    block_size: int,
    num_experts: int,
    expert_map: Array | None = None,
    pad_sorted_ids: bool = False,
    ignore_invalid_experts: bool = False,
    *,
    return_scatter_idx: bool = False,
) -> tuple[Array, ...]:
    """Sort the slots by expert and pad each expert to a multiple of `block_size`; no row is moved.

    Parameters
    ----------
    topk_ids : ndarray, (M, topk), integer
        Ids below 0 or at or above `num_experts` are dropped.  S = M * topk below.
    block_size : int
        Rows of a block.
    num_experts : int
        Size of the space of `topk_ids`: the global number of experts where a map is given.
    expert_map : ndarray, (num_experts,), integer, optional
        Local index of each global expert, -1 where it is not here.
    pad_sorted_ids : bool
        Round the capacity up to a multiple of `block_size`.
    ignore_invalid_experts : bool
        With a map: drop the slots of experts that are not here and sort by local expert, instead of sorting all by
        global expert and marking the blocks of the others with -1.
    return_scatter_idx : bool
        Return the fourth array; with a map this needs `ignore_invalid_experts`.

    Returns
    -------
    sorted_token_ids : ndarray, (capacity,), int32
        Flat slots ``t * topk + j``, ascending within an expert, then the sentinel S.  The capacity is
        ``S + num_experts * (block_size - 1)``, and at most ``S * block_size`` when S is below `num_experts`.
    expert_ids : ndarray, (ceil(capacity / block_size),), int32
        Expert of each block (local where a map is given); -1 in the unused tail and where the expert is not here.
    num_tokens_post_padded : ndarray, (1,), int32
        How many entries of `sorted_token_ids` are in use, a multiple of `block_size`.
    scatter_idx : ndarray, (S, 1), int32
        Only if asked for: the slot's own index where it was sorted, -1 where it was dropped.

    Raises
    ------
    ShapeError, DTypeError, ArgumentError
        An argument is wrong.
    UnsupportedError
        The capacity does not fit int32.

    Source
    ------
    vLLM 0.33.0 ``moe_align_block_size``; slots are always in order here, and any number of experts is taken.

    Examples
    --------
    >>> import numpy as np
    >>> slots, experts, used = moe_align_block_size(np.array([[1], [0], [1]]), 2, 2)
    >>> slots.tolist(), experts.tolist(), used.tolist()
    ([1, 3, 0, 2, 3], [0, 1, -1], [4])
    """
    call = "moe_align_block_size"
    topk_ids = as_array(call, "topk_ids", topk_ids)
    checks.shape(call, "topk_ids", topk_ids, (None, None))
    if topk_ids.dtype.kind not in "iu":
        raise DTypeError(complaint(call, "topk_ids", "have an integer dtype", topk_ids.dtype))
    block_size = checks.integer(call, "block_size", block_size, 1)
    num_experts = checks.integer(call, "num_experts", num_experts, 0)
    mapping = None if expert_map is None else as_array(call, "expert_map", expert_map)
    if mapping is not None:
        checks.shape(call, "expert_map", mapping, (num_experts,))
        mapping, _ = checks.expert_map(call, mapping, -1, num_experts)
        if return_scatter_idx and not ignore_invalid_experts:
            rule = "be True for return_scatter_idx with an expert_map"
            raise ArgumentError(complaint(call, "ignore_invalid_experts", rule, ignore_invalid_experts))
    S = topk_ids.size
    capacity = S + num_experts * (block_size - 1)
    if pad_sorted_ids:
        capacity = -(-capacity // block_size) * block_size
    if S < num_experts:
        capacity = min(S * block_size, capacity)
    _fits_int32(call, capacity)
    if is_cuda(topk_ids):
        from pymoe.ops.permute import _cuda

        own, labels = (mapping, None) if ignore_invalid_experts else (None, mapping)
        ids = namespace(topk_ids).ascontiguousarray(topk_ids)
        arrays = _cuda.align(ids, block_size, num_experts, own, labels, capacity)
        return arrays if return_scatter_idx else arrays[:3]
    row_map = _numpy.permute(topk_ids, num_experts, mapping if ignore_invalid_experts else None)
    counts = np.diff(row_map.expert_offsets)
    sorted_token_ids, expert_ids, used = _blocks(row_map.row_to_slot, counts, block_size, capacity, S)
    if mapping is not None and not ignore_invalid_experts:
        expert_ids = np.where(expert_ids >= 0, mapping[expert_ids], -1).astype(np.int32) if num_experts else expert_ids
    if not return_scatter_idx:
        return sorted_token_ids, expert_ids, used
    scatter_idx = np.where(row_map.slot_to_row >= 0, np.arange(S).reshape(topk_ids.shape), -1)
    return sorted_token_ids, expert_ids, used, scatter_idx.astype(np.int32).reshape(S, 1)


def batched_moe_align_block_size(
    max_tokens_per_batch: int, block_size: int, expert_num_tokens: Array
) -> tuple[Array, Array, Array]:
    """Return the block layout of slabs (B, max_tokens_per_batch, K) whose first rows are valid.

    Parameters
    ----------
    max_tokens_per_batch : int
        Rows of a slab.
    block_size : int
        Rows of a block.
    expert_num_tokens : ndarray, (B,), integer
        Valid rows of each slab.

    Returns
    -------
    sorted_ids : ndarray, (B * round_up(max_tokens_per_batch, block_size),), int32
        Flat rows ``b * max_tokens_per_batch + i``, each slab padded to whole blocks with the sentinel
        ``B * max_tokens_per_batch``.
    expert_ids : ndarray, (len(sorted_ids) / block_size,), int32
        Slab of each block, -1 in the unused tail.
    num_tokens_post_padded : ndarray, (1,), int32
        How many entries of `sorted_ids` are in use.

    Raises
    ------
    ShapeError, DTypeError, ArgumentError
        An argument is wrong, or a count is outside 0..max_tokens_per_batch.
    UnsupportedError
        The capacity does not fit int32.

    Source
    ------
    vLLM 0.33.0 ``batched_moe_align_block_size``.

    Examples
    --------
    >>> import numpy as np
    >>> ids, experts, used = batched_moe_align_block_size(3, 2, np.array([1, 0, 3]))
    >>> ids.tolist(), experts.tolist(), used.tolist()
    ([0, 9, 6, 7, 8, 9, 9, 9, 9, 9, 9, 9], [0, 2, 2, -1, -1, -1], [6])
    """
    call = "batched_moe_align_block_size"
    max_tokens_per_batch = checks.integer(call, "max_tokens_per_batch", max_tokens_per_batch, 0)
    block_size = checks.integer(call, "block_size", block_size, 1)
    counts = as_numpy(call, "expert_num_tokens", expert_num_tokens)
    checks.shape(call, "expert_num_tokens", counts, (None,))
    if counts.dtype.kind not in "iu":
        raise DTypeError(complaint(call, "expert_num_tokens", "have an integer dtype", counts.dtype))
    wrong = (counts < 0) | (counts > max_tokens_per_batch)
    if wrong.any():
        where = int(np.argmax(wrong))
        got = f"{counts[where]} at {where}"
        raise ArgumentError(complaint(call, "expert_num_tokens", f"be in 0..{max_tokens_per_batch}", got))
    B = counts.shape[0]
    capacity = B * -(-max_tokens_per_batch // block_size) * block_size
    _fits_int32(call, capacity)
    valid = np.arange(max_tokens_per_batch) < counts[:, None]
    return _blocks(np.flatnonzero(valid), counts.astype(np.int64), block_size, capacity, valid.size)


def _fits_int32(call: str, capacity: int) -> None:
    if capacity > np.iinfo(np.int32).max:
        raise UnsupportedError(complaint(call, "capacity", "fit int32", capacity, "Split the tokens into chunks"))


def _blocks(members: Array, counts: Array, block_size: int, capacity: int, sentinel: int) -> tuple[Array, Array, Array]:
    """Lay `members`, ``counts[e]`` of them an expert in this order, out in whole blocks an expert."""
    blocks = -(-counts // block_size)
    ends, starts = np.cumsum(counts), np.cumsum(blocks) * block_size
    shift = (starts - blocks * block_size) - (ends - counts)
    sorted_ids = np.full(capacity, sentinel, np.int32)
    sorted_ids[np.arange(members.size) + np.repeat(shift, counts)] = members
    expert_ids = np.full(-(-capacity // block_size), -1, np.int32)
    used = int(blocks.sum())
    expert_ids[:used] = np.repeat(np.arange(counts.size), blocks)
    return sorted_ids, expert_ids, np.array([used * block_size], np.int32)
