"""Permute on the GPU in Numba: a stable counting sort, one block of threads an expert."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import int32

from pymoe.contracts import DeviceRowMap
from pymoe.device.arrays import namespace
from pymoe.device.numba_gpu import cuda, device, kernel, launch, require

__all__ = ["RowMapShapes", "permute", "permute_alone", "shapes"]

Array = Any

THREADS = 128


# docs: permute
@device
def local_expert(ids, slot, expert_map, has_map, ids_end):
    """Return which expert here computes a slot, -1 for none; no id is an index before it is known to be one."""
    expert = ids[slot]
    if expert < 0 or expert >= ids_end:
        return -1
    return expert_map[expert] if has_map else expert


@kernel
def count_kernel(counts, ids, expert_map, has_map, ids_end):
    """Count the slots of expert ``blockIdx.x``."""
    expert, thread = cuda.blockIdx.x, cuda.threadIdx.x
    found = cuda.shared.array(THREADS, int32)
    mine = 0
    for slot in range(thread, ids.shape[0], THREADS):
        if local_expert(ids, slot, expert_map, has_map, ids_end) == expert:
            mine += 1
    found[thread] = mine
    cuda.syncthreads()
    if thread == 0:
        total = 0
        for other in range(THREADS):
            total += found[other]
        counts[expert] = total


@kernel
def place_kernel(
    expert_offsets, row_to_slot, slot_to_row, tiles, tile_count, tile_rows, counts, ids, expert_map, has_map, ids_end
):
    """Give the slots of expert ``blockIdx.x`` their rows, in order; the last block deals with slots of nobody."""
    expert, thread, E = cuda.blockIdx.x, cuda.threadIdx.x, counts.shape[0]
    first, tile = 0, 0
    for other in range(expert):
        first += counts[other]
        tile += (counts[other] + tile_rows - 1) // tile_rows
    if thread == 0:
        expert_offsets[expert] = first
    if expert == E:
        if thread == 0:
            tile_count[0] = tile
        for row in range(first + thread, row_to_slot.shape[0], THREADS):
            row_to_slot[row] = -1
        for slot in range(thread, ids.shape[0], THREADS):
            local = local_expert(ids, slot, expert_map, has_map, ids_end)
            if local < 0 or local >= E:
                slot_to_row[slot] = -1
        return
    for start in range(thread * tile_rows, counts[expert], THREADS * tile_rows):
        t = tile + start // tile_rows
        tiles[t, 0] = expert
        tiles[t, 1] = first + start
        tiles[t, 2] = min(tile_rows, counts[expert] - start)
        tiles[t, 3] = 0
    # Each thread reads a run of slots, so that those of the threads before it come first.
    found = cuda.shared.array(THREADS, int32)
    run = (ids.shape[0] + THREADS - 1) // THREADS
    begin, end = thread * run, min((thread + 1) * run, ids.shape[0])
    mine = 0
    for slot in range(begin, end):
        if local_expert(ids, slot, expert_map, has_map, ids_end) == expert:
            mine += 1
    found[thread] = mine
    cuda.syncthreads()
    row = first
    for other in range(thread):
        row += found[other]
    for slot in range(begin, end):
        if local_expert(ids, slot, expert_map, has_map, ids_end) == expert:
            row_to_slot[row] = slot
            slot_to_row[slot] = row
            row += 1


# end: permute


class RowMapShapes(NamedTuple):
    """Shapes of the int32 arrays of a row map, and of the counts from which it is made."""

    expert_offsets: tuple[int, ...]
    row_to_slot: tuple[int, ...]
    slot_to_row: tuple[int, ...]
    tiles: tuple[int, ...]
    tile_count: tuple[int, ...]
    counts: tuple[int, ...]


def shapes(M: int, topk: int, E_local: int, tile_rows: int) -> RowMapShapes:
    """Return what `permute` needs for M tokens."""
    S = M * topk
    tiles = min(S, E_local) + S // tile_rows
    return RowMapShapes((E_local + 1,), (S,), (M, topk), (tiles, 4), (1,), (E_local,))


def permute(
    topk_ids: Array, E_local: int, expert_map: Array | None, tile_rows: int, arrays: dict[str, Array]
) -> DeviceRowMap:
    """Sort the slots of `topk_ids` (M, topk) by local expert into `arrays` of `shapes`."""
    if topk_ids.dtype not in (np.int32, np.int64):
        topk_ids = topk_ids.astype(np.int64)  # an unsigned id beyond int64 becomes negative: it has no row either
    ids = topk_ids.reshape(-1)
    row_map = DeviceRowMap(tile_rows=tile_rows, **{name: arrays[name] for name in RowMapShapes._fields[:5]})
    mapping = ids if expert_map is None else expert_map
    if not ids.size or not E_local or not mapping.size:
        _place_nothing(row_map)
        return row_map
    numbers = (ids, mapping, expert_map is not None, E_local if expert_map is None else expert_map.shape[0])
    launch(count_kernel, (E_local,), THREADS, arrays["counts"], *numbers)
    launch(
        place_kernel, (E_local + 1,), THREADS, row_map.expert_offsets, row_map.row_to_slot,
        row_map.slot_to_row.reshape(-1), row_map.tiles, row_map.tile_count, tile_rows, arrays["counts"], *numbers,
    )  # fmt: skip
    return row_map


def _place_nothing(row_map: DeviceRowMap) -> None:
    """Fill the map of slots that are all nobody's."""
    for counts in (row_map.expert_offsets, row_map.tile_count):
        counts[...] = 0
    for places in (row_map.row_to_slot, row_map.slot_to_row):
        places[...] = -1


def permute_alone(topk_ids: Array, E_local: int, expert_map: Array | None, tile_rows: int) -> DeviceRowMap:
    """Do `permute` into arrays of its own."""
    require("permute", topk_ids)
    xp = namespace(topk_ids)
    sizes = shapes(topk_ids.shape[0], topk_ids.shape[1], E_local, tile_rows)
    arrays = {name: xp.empty(shape, np.int32) for name, shape in sizes._asdict().items()}
    return permute(topk_ids, E_local, expert_map, tile_rows, arrays)
