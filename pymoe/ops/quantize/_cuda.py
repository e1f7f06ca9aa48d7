"""Quantize and dequantize on the GPU: the bits of ``_numpy.py`` and ``_rules.py``, without waiting for the device."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from pymoe.device.arrays import BFLOAT16, namespace
from pymoe.device.jit import KernelId
from pymoe.device.launch import LaunchPlan
from pymoe.device.parameters import address, struct
from pymoe.errors import UnsupportedError, complaint
from pymoe.ops.quantize import _rules as rules
from pymoe.ops.quantize._matrices import Quantized
from pymoe.quantization import QuantKey

Array = Any
Empty = Callable[..., Array]

_UNIT = "quantize/quantize.cu"
_DTYPES = {np.dtype("float32"): "float", np.dtype("float16"): "pymoe::fp16", BFLOAT16: "pymoe::bf16"}
_CODES = {"e4m3": "E4M3", "e2m1": "E2M1"}
_INTEGER = "RINT"
"""Stands for every rounding of integers in the names of instances; the recipe says which."""
_NUMBERS = {"e4m3": 0, "e2m1": 1, "rint": 2, "away": 3, "trunc": 4}
_GIVEN, _FP8_FLOORED, _FP8_TOKEN, _FP8_GROUP, _INT8_FLOORED, _INT8_TENSOR, _INT8_GROUP = range(7)
_MX_FP8, _MX_FP4, _NVFP4_DYNAMIC, _NVFP4_STATIC, _WEIGHT, _WEIGHT_ZERO = range(7, 13)
_STORAGE = {"float32": 0, "e8m0": 1, "fp8": 2}
_OVER_GLOBAL = 3

_COUNT = 8
_WARP, _THREADS = 32, 256
_GROUPS = (8, 16, 32, 64, 128, 256)
_VECTOR_BYTES = 16
_GRID_Y = 65535
_PARTIALS = 1024
"""Blocks that look for the largest magnitude, so that one block can join what they find."""
_LARGEST = np.iinfo(np.int32).max


def kernels(arch: str) -> tuple[KernelId, ...]:
    """Return every instance that can be asked for on `arch`."""
    found = [KernelId(_UNIT, "pymoe::global_scales_kernel")]
    for elem in _DTYPES.values():
        found += [_kernel("quantize_groups", elem, code) for code in ("E4M3", "E2M1", _INTEGER)]
        for count in (1, _COUNT):
            found += [_kernel("quantize_rows", elem, code, count) for code in ("E4M3", _INTEGER)]
            found += [_kernel("quantize_tensor", elem, code, count) for code in ("E4M3", _INTEGER)]
            found.append(_kernel("find_largest", elem, None, count))
        found += [_kernel(name, elem) for name in ("scale_blocks", "encode_blocks", "dequantize")]
    return tuple(found)


def _kernel(name: str, elem: str, code: str | None = None, count: int | None = None) -> KernelId:
    parameters = [elem, *([] if code is None else [f"pymoe::{code}"]), *([] if count is None else [str(count)])]
    return KernelId(_UNIT, f"pymoe::{name}_kernel<{', '.join(parameters)}>")


@lru_cache(maxsize=256)
def _recipe(key: QuantKey, given: bool, over_global: bool = False) -> np.void:
    """Return the kernels' ``Recipe``."""
    coder = rules.coder(key)
    storage = _OVER_GLOBAL if over_global else _STORAGE[key.scale.dtype]
    flags = (int(coder.divides), int(rules.poisons(key)), coder.low, coder.high, rules.middle(key), int(key.is_packed))
    return struct(*map(np.int32, (_GIVEN if given else _rule(key), _NUMBERS[coder.kind], storage, *flags)))


def _rule(key: QuantKey) -> int:
    kind = rules.layout(key)
    if rules.is_weight_only(key):
        return _WEIGHT if key.symmetric else _WEIGHT_ZERO
    if key.dtype == "fp4":
        return _MX_FP4 if rules.is_mx(key) else _NVFP4_STATIC if key.scale.static else _NVFP4_DYNAMIC
    if key.dtype == "fp8":
        if rules.is_mx(key):
            return _MX_FP8
        if key.scale.static or kind == "tensor":
            return _FP8_FLOORED
        return _FP8_TOKEN if kind == "row" else _FP8_GROUP
    return _INT8_FLOORED if key.scale.static else _INT8_TENSOR if kind == "tensor" else _INT8_GROUP


def quantize_matrices(
    x: Array,
    key: QuantKey,
    block: tuple[int, int],
    *,
    scale: Array | None = None,
    global_scale: Array | None = None,
    live: Array | None = None,
    over_global: bool = False,
    empty: Empty | None = None,
) -> Quantized:
    """Return codes and scales of every matrix of `x` (B, R, K), C-contiguous, as ``_matrices.quantize_matrices``.

    Parameters
    ----------
    scale : (B, row blocks, column blocks), float32 or uint8; global_scale : (B,) float32
        Replace those that the elements would give.
    live : (R,), bool or uint8; or (n,), int32
        Rows that take part in a scale of the whole matrix; or how many: of n equal slabs of the rows the first
        ``live[i]`` each, and no other row is read or written.
    over_global : bool
        nvfp4: return the float32 quotient of the block scales and the global scale.
    empty : callable
        ``empty(shape, dtype)`` gives every array; default CuPy's.
    """
    xp = namespace(x)
    empty = empty or xp.empty
    x = _readable(xp, x)
    scale, global_scale, live = (_on_device(xp, array) for array in (scale, global_scale, live))
    mask, counts = (None, live) if live is not None and live.dtype == np.int32 else (live, None)
    B, R, K = x.shape
    codes = empty((B, R, K // 2 if key.is_packed else K), np.int8 if key.dtype == "int8" else np.uint8)
    rows = 1 if rules.layout(key) == "tensor" else -(-R // block[0])
    stored = np.uint8 if key.scale.dtype != "float32" and not over_global else np.float32
    grid = empty((B, rows, -(-K // block[1])), stored)
    if rules.layout(key) == "tensor" and B == 1:
        _tensor(codes, grid, x, key, scale, mask, counts, empty)
        return Quantized(codes, grid, None, None)
    recipe = _recipe(key, scale is not None, over_global)
    if key.scale2 is not None and key.scale.static and global_scale is None:
        global_scale = _global_scales(x, key, block, grid, empty)
    along_rows = block[0] == 1 and scale is None and not rules.is_weight_only(key)
    if along_rows and (global_scale is None or B == 1):
        _along_rows(codes, grid, x, key, block[1], global_scale, counts, recipe)
        return Quantized(codes, grid, global_scale, None)
    zp = _blocks(codes, grid, x, block, scale, global_scale, recipe, empty)
    return Quantized(codes, grid, global_scale, None if key.symmetric else zp.astype(np.uint8))


def dequantize_matrices(
    codes: Array,
    key: QuantKey,
    block: tuple[int, int],
    scale: Array,
    global_scale: Array | None,
    zp: Array | None,
    dtype: np.dtype,
) -> Array:
    """Return the values (B, R, K), `dtype`, of codes; `scale` and `zp` are grids of blocks, `global_scale` (B,)."""
    xp = namespace(codes)
    B, R, columns = codes.shape
    K = 2 * columns if key.is_packed else columns
    out = xp.empty((B, R, K), dtype if dtype in _DTYPES else np.float32)
    codes, scale, global_scale, zp = (_on_device(xp, array) for array in (codes, scale, global_scale, zp))
    if out.size:
        recipe = _recipe(key, False, scale.dtype == np.float32 and key.scale.dtype != "float32")
        plan = LaunchPlan(_kernel("dequantize", _DTYPES[out.dtype]), _elementwise(out.size), (_THREADS, 1, 1))
        sizes = _grid_sizes(out.shape, block, scale.shape)
        plan(out, codes, scale, _pointer(zp), _pointer(global_scale), sizes, recipe)
    return out if out.dtype == dtype else out.astype(dtype)


def _tensor(
    codes: Array,
    grid: Array,
    x: Array,
    key: QuantKey,
    scale: Array | None,
    mask: Array | None,
    counts: Array | None,
    empty: Empty,
) -> None:
    _, R, K = x.shape
    partial: Any = 0
    slabs = 0 if counts is None else counts.shape[0]
    finding, coding, matrix = _tensor_plans(_DTYPES[x.dtype], _code(key), R, K, slabs)
    partials = finding.grid[0] * finding.grid[1]
    if scale is None:
        partial = empty((partials,), np.uint32)
        finding(partial, x, _pointer(mask), _pointer(counts), matrix)
    recipe = _recipe(key, scale is not None)
    coding(codes, grid, x, _pointer(scale), partial, np.int32(partials), _pointer(counts), matrix, recipe)


@lru_cache(maxsize=1024)
def _tensor_plans(elem: str, code: str, R: int, K: int, slabs: int) -> tuple[LaunchPlan, LaunchPlan, np.void]:
    count = _COUNT if K % _COUNT == 0 else 1
    block, grid = _rows_grid(-(-K // count), R, 1)
    finding = LaunchPlan(
        _kernel("find_largest", elem, None, count),
        (grid[0], max(1, min(grid[1], _PARTIALS // grid[0])), 1), block,
    )  # fmt: skip
    return finding, LaunchPlan(_kernel("quantize_tensor", elem, code, count), grid, block), _matrix(R, K, K, 1, slabs)


def _along_rows(
    codes: Array,
    grid: Array,
    x: Array,
    key: QuantKey,
    group: int,
    global_scale: Array | None,
    counts: Array | None,
    recipe: np.void,
) -> None:
    B, R, K = x.shape
    if B * R == 0:
        return
    slabs = 0 if counts is None else counts.shape[0]
    elem, code = _DTYPES[x.dtype], _code(key)
    if group in _GROUPS and K % _COUNT == 0:
        plan, matrix = _groups_plan(elem, code, B * R, K, group, slabs)
        plan(codes, grid, x, _pointer(counts), _pointer(global_scale), matrix, recipe)
        return
    assert not key.is_packed, "4-bit groups have 16 or 32 columns and divide K"
    plan, matrix = _rows_plan(elem, code, B * R, K, group, slabs)
    plan(codes, grid, x, _pointer(counts), matrix, recipe)


@lru_cache(maxsize=1024)
def _groups_plan(elem: str, code: str, rows: int, K: int, group: int, slabs: int) -> tuple[LaunchPlan, np.void]:
    groups, team = -(-K // group), group // _COUNT
    block, grid = _rows_grid(groups * team, rows, team)
    return LaunchPlan(_kernel("quantize_groups", elem, code), grid, block), _matrix(rows, K, group, groups, slabs)


@lru_cache(maxsize=1024)
def _rows_plan(elem: str, code: str, rows: int, K: int, group: int, slabs: int) -> tuple[LaunchPlan, np.void]:
    groups, count = -(-K // group), _COUNT if K % _COUNT == 0 and group % _COUNT == 0 else 1
    if groups > _GRID_Y:
        rule = f"have at most {_GRID_Y} groups a row"
        raise UnsupportedError(complaint("quantize", "x", rule, f"{groups} groups of {group} columns"))
    threads = min(_THREADS, -(-min(group, K) // (count * _WARP)) * _WARP)
    plan = LaunchPlan(_kernel("quantize_rows", elem, code, count), (rows, groups, 1), (threads, 1, 1))
    return plan, _matrix(rows, K, group, groups, slabs)


def _rows_grid(pieces: int, rows: int, team: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Return (block, grid) for `pieces` threads along each of `rows` rows; a team of a power of two stays in a warp."""
    # The power of two that leaves the fewest threads without a piece; of several the largest.
    widths = [n for n in (256, 128, 64, 32, 16, 8, 4, 2, 1) if n >= team]
    along = min(widths, key=lambda n: (-(-pieces // n) * n, -n))
    along = max(along, min(_WARP, 1 << (pieces - 1).bit_length()))  # no warp of many short rows
    step = max(1, _WARP // along)
    high = min(_THREADS // along, -(-max(rows, 1) // step) * step)
    return (along, high, 1), (-(-pieces // along), min(-(-max(rows, 1) // high), _GRID_Y), 1)


def _matrix(rows: int, K: int, group: int, groups: int, slabs: int) -> np.void:
    """Return the kernels' ``Matrix``."""
    slab_rows = rows // slabs if slabs else max(rows, 1)
    return struct(np.int64(rows), np.int32(K), np.int32(group), np.int64(slab_rows), np.int32(groups))


def _global_scales(x: Array, key: QuantKey, block: tuple[int, int], grid: Array, empty: Empty) -> Array:
    """Return nvfp4's global scale of each matrix, (B,) float32, from its elements."""
    B = x.shape[0]
    amaxes, found = empty(grid.shape, np.float32), empty((B,), np.float32)
    if grid.size:
        sizes, recipe = _grid_sizes(x.shape, block, grid.shape), _recipe(key, False)
        _scaling(x, block, grid.size)(0, 0, 0, amaxes, x, 0, 0, sizes, recipe)
    if B:
        join = LaunchPlan(KernelId(_UNIT, "pymoe::global_scales_kernel"), (B, 1, 1), (_THREADS, 1, 1))
        join(found, amaxes, np.int64(grid.size // B))
    return found


def _blocks(
    codes: Array,
    grid: Array,
    x: Array,
    block: tuple[int, int],
    scale: Array | None,
    global_scale: Array | None,
    recipe: np.void,
    empty: Empty,
) -> Array:
    """Quantize by any blocks, scales first and then codes; return the code of zero in each block, float32."""
    factors, offsets = empty(grid.shape, np.float32), empty(grid.shape, np.float32)
    sizes = _grid_sizes(x.shape, block, grid.shape)
    if grid.size:
        scaling = _scaling(x, block, grid.size)
        scaling(grid, factors, offsets, 0, x, _pointer(scale), _pointer(global_scale), sizes, recipe)
    if codes.size:
        encoding = LaunchPlan(_kernel("encode_blocks", _DTYPES[x.dtype]), _elementwise(x.size), (_THREADS, 1, 1))
        encoding(codes, x, factors, offsets, sizes, recipe)
    return offsets


def _scaling(x: Array, block: tuple[int, int], cells: int) -> LaunchPlan:
    if cells > _LARGEST:
        raise UnsupportedError(complaint("quantize", "x", f"have at most {_LARGEST} groups", cells))
    threads = min(_THREADS, -(-block[0] * min(block[1], x.shape[2]) // _WARP) * _WARP)
    return LaunchPlan(_kernel("scale_blocks", _DTYPES[x.dtype]), (cells, 1, 1), (threads, 1, 1))


def _grid_sizes(shape: tuple[int, int, int], block: tuple[int, int], grid: tuple[int, ...]) -> np.void:
    """Return the kernels' ``Grid``."""
    B, R, K = shape
    return struct(np.int64(B), *map(np.int32, (R, K, min(block[0], max(R, 1)), min(block[1], K), grid[1], grid[2])))


def _elementwise(size: int) -> tuple[int, int, int]:
    return min(-(-size // _THREADS), 1 << 20), 1, 1


def _code(key: QuantKey) -> str:
    return _CODES.get(rules.coder(key).kind, _INTEGER)


def _readable(xp: Any, x: Array) -> Array:
    """Return `x` in a dtype, order and place that kernels read 16 bytes at a time."""
    if x.dtype not in _DTYPES:
        with np.errstate(all="ignore"):
            x = x.astype(np.float32)
    x = xp.ascontiguousarray(x)
    return x if address(x) % _VECTOR_BYTES == 0 else x.copy()


def _on_device(xp: Any, x: Array | None) -> Array | None:
    """Return `x` contiguous on the current device; what is there already stays as it is."""
    return None if x is None else xp.ascontiguousarray(xp.asarray(x))


def _pointer(x: Array | None) -> Any:
    return 0 if x is None else x
