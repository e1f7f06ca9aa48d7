"""The definition of permute: a stable sort of the slots by local expert."""

from __future__ import annotations

from typing import Any

import numpy as np

from pymoe.contracts import RowMap

Array = Any


def local_experts(topk_ids: Array, E_local: int, expert_map: Array | None) -> Array:
    """Return the local expert of every slot, flat int64, -1 for none.

    Ids are compared in their own dtype, so that none wraps into the range, and only legal ones become an index.
    """
    ids = topk_ids.reshape(-1)
    legal = (ids >= 0) & (ids < (E_local if expert_map is None else len(expert_map)))
    local = np.full(ids.size, -1, np.int64)
    local[legal] = ids[legal] if expert_map is None else expert_map[ids[legal]]
    return local


def permute(topk_ids: Array, E_local: int, expert_map: Array | None) -> RowMap:
    local = local_experts(topk_ids, E_local, expert_map)
    live = np.flatnonzero(local >= 0)
    row_to_slot = live[np.argsort(local[live], kind="stable")]
    slot_to_row = np.full(topk_ids.shape, -1, np.int64)
    slot_to_row.reshape(-1)[row_to_slot] = np.arange(row_to_slot.size)
    expert_offsets = np.zeros(E_local + 1, np.int64)
    np.cumsum(np.bincount(local[live], minlength=E_local), out=expert_offsets[1:])
    return RowMap(expert_offsets, row_to_slot, slot_to_row)


def permute_rows(x: Array, row_to_token: Array) -> Array:
    return x[row_to_token]
