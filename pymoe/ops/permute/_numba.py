"""Permute on the CPU: a counting sort, and a gather of rows on threads."""

from __future__ import annotations

from typing import Any

import numpy as np

from pymoe.contracts import RowMap
from pymoe.device.numba_cpu import jit
from pymoe.device.threads import run_blocks

Array = Any

_NO_MAP = np.empty(0, np.int32)
_BLOCK_BYTES = 1 << 21
"""Least bytes a thread copies at a time; below that starting it costs more than it saves."""


def permute(topk_ids: Array, E_local: int, expert_map: Array | None) -> RowMap:
    ids = topk_ids.reshape(-1)
    if ids.dtype not in (np.int32, np.int64):
        # An unsigned id beyond int64 becomes negative, which has no row either.
        ids = ids.astype(np.int64)
    mapped, expert_map = expert_map is not None, _NO_MAP if expert_map is None else expert_map
    expert_offsets, place = np.empty((2, E_local + 1), np.int64)
    slot_to_row = np.empty(topk_ids.shape, np.int64)
    row_to_slot, row_to_token = np.empty((2, ids.size), np.int64)
    ids = np.ascontiguousarray(ids)
    flat = slot_to_row.reshape(-1), row_to_slot, row_to_token
    run_blocks(_sort, 1, ids, topk_ids.shape[1], expert_map, mapped, expert_offsets, place, *flat)
    P = int(expert_offsets[-1])
    return RowMap(expert_offsets, row_to_slot[:P], slot_to_row, row_to_token[:P])


def permute_rows(x: Array, row_to_token: Array) -> Array:
    rows = np.empty((len(row_to_token), x.shape[1]), x.dtype)
    width = x.shape[1] * x.itemsize
    if rows.size:
        unit = np.uint64 if width % 8 == 0 else np.uint8
        source = np.ascontiguousarray(x).view(unit)
        run_blocks(_copy_rows, len(rows), source, row_to_token, rows.view(unit), grain=max(1, _BLOCK_BYTES // width))
    return rows


@jit
def _sort(start, stop, ids, topk, expert_map, mapped, expert_offsets, place, slot_to_row, row_to_slot, row_to_token):
    """Fill the offsets, the rows of the slots, and the slots and tokens of the rows; slots are visited in order."""
    ids_end = len(expert_map) if mapped else len(expert_offsets) - 1
    expert_offsets[:] = 0
    for s in range(len(ids)):
        local = -1
        if ids[s] >= 0 and ids[s] < ids_end:
            local = expert_map[ids[s]] if mapped else ids[s]
        slot_to_row[s] = local
        if local >= 0:
            expert_offsets[local + 1] += 1
    for e in range(1, len(expert_offsets)):
        expert_offsets[e] += expert_offsets[e - 1]
    place[:] = expert_offsets
    for s in range(len(ids)):
        local = slot_to_row[s]
        if local >= 0:
            row_to_slot[place[local]] = s
            row_to_token[place[local]] = s // topk
            slot_to_row[s] = place[local]
            place[local] += 1


@jit
def _copy_rows(start, stop, x, row_to_token, rows):
    for r in range(start, stop):
        rows[r] = x[row_to_token[r]]
