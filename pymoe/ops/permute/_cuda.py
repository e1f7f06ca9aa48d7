"""Permute on the GPU: a stable counting sort in one launch for few slots, three for many; the host learns no count."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from pymoe.contracts import DeviceRowMap, DeviceSlabMap
from pymoe.device.arrays import namespace
from pymoe.device.jit import KernelId
from pymoe.device.launch import LaunchPlan
from pymoe.device.parameters import address, integer_kind, struct
from pymoe.device.workspace import ALIGNMENT
from pymoe.errors import UnsupportedError, complaint

Array = Any
Empty = Callable[..., Array]

MAX_EXPERTS = 4096
_UNIT = "permute/permute.cu"
_LAYOUTS = ("PACKED", "PADDED", "SLABS")
_STAGES = ("permute_kernel", "permute_count_kernel", "permute_scan_kernel", "permute_place_kernel")
_UNITS = {16: "uint4", 8: "uint2", 4: "pymoe::uint32", 2: "pymoe::uint16", 1: "pymoe::uint8"}
_SINGLES = ("work_list_kernel", "count_experts_kernel", "live_tokens_kernel")

_WARP, _THREADS = 32, 1024
_SCRATCH_BYTES = 16
_SEGMENT = 2048
_ONE_BLOCK_SLOTS = 8192
"""Up to here one block sorts faster than three launches do."""
_SLOTS_OF_A_THREAD = 2
_SHARED_BYTES = 96 * 1024
"""Fits a block of every architecture."""
_LARGEST = np.iinfo(np.int32).max


def kernels(arch: str) -> tuple[KernelId, ...]:
    """Return every instance that can be asked for on `arch`."""
    sorts = [KernelId(_UNIT, f"pymoe::{stage}<pymoe::{layout}>") for stage in _STAGES for layout in _LAYOUTS]
    scatters = [_scatter_kernel(unit) for unit in _UNITS]
    return (*sorts, *scatters, *(_single(name) for name in _SINGLES))


def _single(name: str) -> KernelId:
    return KernelId(_UNIT, f"pymoe::{name}")


def _scatter_kernel(unit: int) -> KernelId:
    return KernelId(_UNIT, f"pymoe::scatter_rows_kernel<{_UNITS[unit]}>")


class _Sort(NamedTuple):
    """Launches of one sort: one, or count, scan and place over `segments`."""

    plans: tuple[LaunchPlan, ...]
    sizes: np.void
    segments: int


def permute(
    topk_ids: Array,
    E_local: int,
    expert_map: Array | None,
    tile_rows: int,
    *,
    even: bool = False,
    empty: Empty | None = None,
) -> DeviceRowMap:
    """Sort slots (M, topk), C-contiguous, of any integer dtype; `expert_map` is int32.

    The work list has an expert's tiles one after the other, experts ascending; `even`, tiles of an expert are about
    equally long, multiples of eight rows but for the last, and the longest come first.
    Arrays come from ``empty(shape, dtype)``, by default CuPy's.
    """
    empty = empty or namespace(topk_ids).empty
    M, topk = topk_ids.shape
    S = M * topk
    offsets, row_to_slot = empty((E_local + 1,), np.int32), empty((S,), np.int32)
    slot_to_row, tile_count = empty((M, topk), np.int32), empty((1,), np.int32)
    tiles = empty((tile_capacity(S, E_local, tile_rows), 4), np.int32)
    sort = _sort("PACKED", topk_ids.shape, E_local, _ids(topk_ids, expert_map, E_local), tile_rows, 0, (S, -1), 0, even)
    outputs = (row_to_slot, slot_to_row, offsets, tiles, 0, tile_count)
    _run(sort, outputs, topk_ids, expert_map, 0, E_local, empty)
    return DeviceRowMap(offsets, row_to_slot, slot_to_row, tiles, tile_count, tile_rows)


def permute_slabs(
    topk_ids: Array,
    E_local: int,
    expert_map: Array | None,
    slab_rows: int,
    tile_rows: int,
    *,
    empty: Empty | None = None,
) -> DeviceSlabMap:
    """Give each expert's tokens the first rows of a slab of `slab_rows`, in token order, one row a token.

    A slot whose slab is full gets no row; that needs more tokens than `slab_rows`.
    """
    empty = empty or namespace(topk_ids).empty
    if E_local * slab_rows > _LARGEST:
        rule = f"have at most {_LARGEST} rows in all slabs"
        raise UnsupportedError(complaint("permute_slabs", "slab_rows", rule, f"{slab_rows} for {E_local} experts"))
    counts, slot_to_row = empty((E_local,), np.int32), empty(topk_ids.shape, np.int32)
    tiles, tile_count = empty((E_local * -(-slab_rows // tile_rows), 4), np.int32), empty((1,), np.int32)
    ids = _ids(topk_ids, expert_map, E_local)
    sort = _sort("SLABS", topk_ids.shape, E_local, ids, tile_rows, slab_rows, (0, 0), 0)
    _run(sort, (0, slot_to_row, counts, tiles, 0, tile_count), topk_ids, expert_map, 0, E_local, empty)
    return DeviceSlabMap(counts, slot_to_row, tiles, tile_count, slab_rows, tile_rows)


def align(
    topk_ids: Array,
    block_size: int,
    num_experts: int,
    expert_map: Array | None,
    labels: Array | None,
    capacity: int,
    *,
    empty: Empty | None = None,
) -> tuple[Array, Array, Array, Array]:
    """Return the four arrays of `moe_align_block_size`; `labels` names the experts that `expert_ids` holds."""
    empty = empty or namespace(topk_ids).empty
    S = topk_ids.size
    blocks = -(-capacity // block_size)
    sorted_ids, expert_ids = empty((capacity,), np.int32), empty((blocks,), np.int32)
    used, scatter_idx = empty((1,), np.int32), empty((S, 1), np.int32)
    ids = _ids(topk_ids, expert_map, num_experts)
    sort = _sort("PADDED", topk_ids.shape, num_experts, ids, block_size, 0, (capacity, S), blocks)
    outputs = (sorted_ids, scatter_idx, 0, 0, expert_ids, used)
    _run(sort, outputs, topk_ids, expert_map, 0 if labels is None else labels, num_experts, empty)
    return sorted_ids, expert_ids, used, scatter_idx


def work_list(
    expert_num_tokens: Array, slab_rows: int, tile_rows: int, *, empty: Empty | None = None
) -> tuple[Array, Array]:
    """Return (tiles, tile_count), as in `DeviceSlabMap`, of slabs with int32 counts (E_local,) on the device."""
    empty = empty or namespace(expert_num_tokens).empty
    E = expert_num_tokens.shape[0]
    _few_experts("work_list", E)
    tiles, tile_count = empty((E * -(-slab_rows // tile_rows), 4), np.int32), empty((1,), np.int32)
    plan = LaunchPlan(_single("work_list_kernel"), (1, 1, 1), (_threads(E), 1, 1), _SCRATCH_BYTES + 12 * E)
    plan(tiles, tile_count, expert_num_tokens, np.int32(E), np.int32(slab_rows), np.int32(tile_rows))
    return tiles, tile_count


def count_experts(topk_ids: Array, E_local: int, expert_map: Array | None, counts: Array) -> None:
    """Add the slots of each expert to `counts`, (E_local,) int32."""
    _few_experts("count_expert_num_tokens", E_local)
    if topk_ids.size:
        blocks = min(-(-topk_ids.size // _SEGMENT), 512)
        plan = LaunchPlan(_single("count_experts_kernel"), (blocks, 1, 1), (_THREADS, 1, 1), 4 * E_local)
        sizes = _sizes(topk_ids.shape, E_local, _ids(topk_ids, expert_map, E_local), 1, (0, 0), 0, 1, 0)
        plan(counts, topk_ids, _pointer(expert_map), sizes)


def live_tokens(
    topk_ids: Array, num_experts: int, E_local: int, expert_map: Array | None, *, empty: Empty | None = None
) -> Array:
    """Return (M,) uint8: 1 for tokens that some expert here computes."""
    empty = empty or namespace(topk_ids).empty
    M = topk_ids.shape[0]
    live = empty((M,), np.uint8)
    if M:
        kind, _ = _ids(topk_ids, expert_map, num_experts)
        ids_end = num_experts if expert_map is None else min(num_experts, expert_map.shape[0])
        sizes = _sizes(topk_ids.shape, E_local, (kind, ids_end), 1, (0, 0), 0, 1, 0)
        plan = LaunchPlan(_single("live_tokens_kernel"), (-(-M // 256), 1, 1), (256, 1, 1))
        plan(live, topk_ids, _pointer(expert_map), np.int32(M), sizes)
    return live


def scatter_rows(x: Array, slot_to_row: Array, out: Array) -> None:
    """Copy token t of `x` (M, columns) to the rows of its slots in `out` (rows, columns), any dtype, C-contiguous."""
    M, width = x.shape[0], x.shape[1] * x.itemsize
    if M and width and slot_to_row.size:
        unit = next(n for n in _UNITS if width % n == 0 and address(x) % n == 0 and address(out) % n == 0)
        plan = _scatter_plan(M, width // unit, unit)
        plan(out, x, slot_to_row, np.int32(slot_to_row.shape[1]), np.int32(width // unit))


def tile_capacity(S: int, E_local: int, tile_rows: int) -> int:
    """Return the most tiles that S slots can fill: one a started tile, and one more an expert that has rows."""
    return min(S, E_local) + S // tile_rows


def scratch_bytes(M: int, topk: int, E_local: int, tile_rows: int) -> int:
    """Return the bytes that all arrays of `permute` take where each begins at a multiple of `ALIGNMENT`."""
    S = M * topk
    lengths = [E_local + 1, S, S, 1, 4 * tile_capacity(S, E_local, tile_rows)]
    if not _warps_of_one_block(S, E_local):
        lengths += [_segments(S) * E_local, E_local]
    return sum(-(-4 * length // ALIGNMENT) * ALIGNMENT for length in lengths)


@lru_cache(maxsize=1024)
def _scatter_plan(M: int, units: int, unit: int) -> LaunchPlan:
    threads = min(256, -(-units // _WARP) * _WARP)
    return LaunchPlan(_scatter_kernel(unit), (M, -(-units // threads), 1), (threads, 1, 1))


def _run(
    sort: _Sort, outputs: tuple[Any, ...], ids: Array, expert_map: Array | None, labels: Any, E: int, empty: Empty
) -> None:
    mapping = _pointer(expert_map)
    if len(sort.plans) == 1:
        sort.plans[0](*outputs, ids, mapping, labels, sort.sizes)
        return
    row_to_slot, slot_to_row, *rest = outputs
    counts, starts = empty((sort.segments, E), np.int32), empty((E,), np.int32)
    count, scan, place = sort.plans
    count(counts, row_to_slot, ids, mapping, sort.sizes)
    scan(counts, starts, *rest, labels, np.int32(sort.segments), sort.sizes)
    place(row_to_slot, slot_to_row, counts, starts, ids, mapping, sort.sizes)


@lru_cache(maxsize=1024)
def _sort(
    layout: str,
    shape: tuple[int, int],
    E: int,
    ids: tuple[int, int],
    tile_rows: int,
    slab_rows: int,
    fill: tuple[int, int],
    blocks: int,
    even: bool = False,
) -> _Sort:
    """Plan the sort of slots of `shape`; everything follows from sizes."""
    S = shape[0] * shape[1]
    _few_experts("permute", E)
    if S > _LARGEST:
        remedy = "Split the tokens into chunks"
        raise UnsupportedError(complaint("permute", "topk_ids", f"have at most {_LARGEST} slots", S, remedy))
    stages = [KernelId(_UNIT, f"pymoe::{stage}<pymoe::{layout}>") for stage in _STAGES]
    warps = _warps_of_one_block(S, E)
    if warps:
        sizes = _sizes(shape, E, ids, warps, fill, blocks, tile_rows, slab_rows, even)
        shared = _one_block_bytes(S, E, warps)
        return _Sort((LaunchPlan(stages[0], (1, 1, 1), (_block_of(S, E), 1, 1), shared),), sizes, 1)
    segments = _segments(S)
    fixed = 4 * (E + _SEGMENT)
    warps = min(_THREADS // _WARP, (_SHARED_BYTES - fixed) // max(2 * E, 1))
    grid, block = (segments, 1, 1), (_THREADS, 1, 1)
    count = LaunchPlan(stages[1], grid, block, 4 * E)
    scan = LaunchPlan(stages[2], (1, 1, 1), (_THREADS, 1, 1), _SCRATCH_BYTES + 16 * E + 4 * max(E, _THREADS))
    place = LaunchPlan(stages[3], grid, block, fixed + 2 * warps * E)
    sizes = _sizes(shape, E, ids, warps, fill, blocks, tile_rows, slab_rows, even)
    return _Sort((count, scan, place), sizes, segments)


def _one_block_bytes(S: int, E: int, warps: int) -> int:
    """Return the shared memory of ``permute_kernel`` of any layout."""
    return -(-(_SCRATCH_BYTES + 16 * E) // 16) * 16 + -(-2 * warps * E // 16) * 16 + 8 * S


def _block_of(S: int, E: int) -> int:
    """Return the threads of the block that sorts S slots: more warps only take each other's turns."""
    return _threads(max(-(-S // _SLOTS_OF_A_THREAD), min(E, 256)))


def _segments(S: int) -> int:
    return max(1, -(-S // _SEGMENT))


def _warps_of_one_block(S: int, E: int) -> int:
    """Return how many warps rank S slots if one block sorts them; 0 where they are too many, or their counters."""
    wanted = max(1, -(-S // _WARP))
    room = (_SHARED_BYTES - _one_block_bytes(S, E, 0)) // max(2 * E, 1)
    warps = min(_block_of(S, E) // _WARP, wanted, room)
    return warps if S <= _ONE_BLOCK_SLOTS and warps >= min(8, wanted) else 0


@lru_cache(maxsize=1024)
def _sizes(
    shape: tuple[int, int],
    E: int,
    ids: tuple[int, int],
    warps: int,
    fill: tuple[int, int],
    blocks: int,
    tile_rows: int,
    slab_rows: int,
    even: bool = False,
) -> np.void:
    """Return the kernels' ``Sizes``."""
    numbers = (shape[0] * shape[1], shape[1], E, *ids, warps, *fill, blocks, tile_rows, slab_rows, even)
    return struct(*map(np.int32, numbers))


def _ids(topk_ids: Array, expert_map: Array | None, E: int) -> tuple[int, int]:
    """Return the kernels' number of the ids' dtype, and where legal ids end."""
    return integer_kind(topk_ids.dtype), E if expert_map is None else expert_map.shape[0]


def _few_experts(call: str, E: int) -> None:
    if E > MAX_EXPERTS:
        raise UnsupportedError(complaint(call, "E_local", f"be at most {MAX_EXPERTS} on a GPU", E))


def _threads(work: int) -> int:
    return min(_THREADS, max(_WARP, -(-work // _WARP) * _WARP))


def _pointer(x: Array | None) -> Any:
    return 0 if x is None else x
