"""Grouped GEMM on CuPy arrays: one launch, sizes from shapes, live rows and tiles on the device.

Nothing here waits for the device: a work list says which rows of which expert a block multiplies, and the grid covers
the longest list that the shapes allow.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from pymoe.activations import ActivationConfig, RegisteredActivation
from pymoe.codec.weights import WeightOperand
from pymoe.device import arch as archs
from pymoe.device.arrays import BFLOAT16, namespace
from pymoe.device.enumerators import FORMATS, NO_ACTIVATION, SCALES, activation_fields
from pymoe.device.jit import KernelId
from pymoe.device.launch import LaunchPlan
from pymoe.device.own_activation import with_activation
from pymoe.device.parameters import address
from pymoe.device.tape import current_recorder
from pymoe.errors import ArgumentError, DTypeError, ShapeError, UnsupportedError, complaint
from pymoe.ops.grouped_gemm import _cuda_arguments as arguments
from pymoe.ops.grouped_gemm import _sm90
from pymoe.ops.grouped_gemm._cuda_instances import (
    FEW_ROWS,
    SWAPPED_STAGES,
    Instance,
    Operands,
    all_instances,
    choose,
    choose_tile_rows,
    rows_of_an_expert,
    sm90_tile_rows,
)
from pymoe.quantization import QuantKey, kTf32

__all__ = [
    "Routed",
    "TileList",
    "TilesTogether",
    "choose_tile_rows",
    "grouped_gemm",
    "is_direct",
    "kernels",
    "list_tiles",
    "multiply_sorted",
    "rows_of_an_expert",
    "tile_capacity",
    "tiles_together",
]

Array = Any

_CALL = "grouped_gemm"
_FLOATS = {np.dtype("float32"): "F32", np.dtype("float16"): "FP16", BFLOAT16: "BF16"}
_CODES = {"fp8": "E4M3", "int8": "S8", "uint8b128": "U8", "uint8": "U8", "uint4b8": "U4", "uint4": "U4", "fp4": "E2M1"}
_HALVES = 1
"""`GateLayout::kHalves`."""
_LIST_TILES = KernelId("grouped_gemm/list_tiles.cu", "pymoe::list_tiles_kernel")


class TileList(NamedTuple):
    """The work list: `tiles` (capacity, 4) int32 {expert, first row, rows, 0}, `tile_count` (1,) of them live."""

    tiles: Array
    tile_count: Array
    tile_rows: int


class TilesTogether(NamedTuple):
    """What a work list for rows in one piece has: the most rows of a tile, and whether tiles are even."""

    rows: int
    even: bool


class Routed(NamedTuple):
    """What the router says of rows.

    Attributes
    ----------
    row_to_slot : (P,) int32
        The slot of each row.
    topk_weights : (M, topk) float32, optional
        What the row of each slot is multiplied by.
    adds_to_tokens : int
        0, or topk: rows are added to those of their tokens, in any order, in float32.
    """

    row_to_slot: Array
    topk_weights: Array | None = None
    adds_to_tokens: int = 0


def kernels(arch: str) -> tuple[KernelId, ...]:
    """Return every kernel this module can launch on `arch`."""
    return (_LIST_TILES, *(instance.kernel for instance in all_instances(arch)))


def tile_capacity(rows: int, experts: int, tile_rows: int) -> int:
    """Return the length of the longest work list of `rows` rows of `experts` experts."""
    return min(rows, experts) + rows // tile_rows


def tiles_together(a: Array, w: WeightOperand, expert_rows: float, direct: bool) -> TilesTogether | None:
    """Return the tiles for rows of `a` copied together first, None where they better stay apart.

    The kernels of sm_90a take rows in one piece only, and are so much faster that the copy pays.

    Parameters
    ----------
    a : cupy.ndarray
    w : WeightOperand
    expert_rows : float
        `rows_of_an_expert`.
    direct : bool
        Whether all answers are `is_direct`.
    """
    if w.key is not None or a.dtype not in _FLOATS or w.codes.dtype not in _FLOATS or expert_rows <= FEW_ROWS:
        return None
    rows = sm90_tile_rows(expert_rows, direct)
    operands = Operands(_FLOATS[a.dtype], _FLOATS[w.codes.dtype], w.K, scattered=False, direct=direct)
    return TilesTogether(rows, rows in SWAPPED_STAGES) if choose(operands, rows, archs.current_arch()).mapped else None


def is_direct(activation: ActivationConfig | None, width: int, in_dtype: Any, out_dtype: Any) -> bool:
    """Return whether a GEMM's answers of that width, activated or not, can go from registers to their rows."""
    fields = NO_ACTIVATION if activation is None else activation_fields(activation)
    formats = (_FLOATS.get(np.dtype(in_dtype), ""), _FLOATS[np.dtype(out_dtype)])
    return width % 4 == 0 and _sm90.is_direct(fields, activation is not None, *formats)


def list_tiles(expert_offsets: Array, rows: int, tile_rows: int, even: bool = False) -> TileList:
    """Return the work list of rows sorted by expert: those of expert e are ``expert_offsets[e]:expert_offsets[e + 1]``.

    Parameters
    ----------
    expert_offsets : cupy.ndarray, (E + 1,), int32
    rows : int
        At least ``expert_offsets[-1]``, which stays on the device.
    tile_rows : int
    even : bool
        Whether tiles of an expert are about equally long, and the longest come first.
    """
    cupy, experts = namespace(expert_offsets), expert_offsets.shape[0] - 1
    tiles = cupy.empty((tile_capacity(rows, experts, tile_rows), 4), np.int32)
    tile_count = cupy.empty(1, np.int32)
    numbers = (np.int32(number) for number in (experts, tile_rows, tiles.shape[0], even))
    _list_plan(8 * experts if even else 0)(expert_offsets, *numbers, tiles, tile_count)
    return TileList(tiles, tile_count, tile_rows)


def multiply_sorted(
    a: Array,
    w: WeightOperand,
    expert_offsets: Any,
    gather: Array | None,
    a_scale: Array | None,
    a_key: QuantKey | None,
    out: Array | None,
    backend: str | None,
) -> Array:
    """Do what `pymoe.ops.grouped_gemm` says on CuPy arrays of any strides; `expert_offsets` may be on the host."""
    if backend not in (None, "cuda"):
        raise ArgumentError(complaint(_CALL, "backend", "be cuda or None for CuPy arrays", repr(backend)))
    cupy, (E, N) = namespace(a), w.codes.shape[:2]
    offsets = cupy.ascontiguousarray(cupy.asarray(expert_offsets), np.int32)
    if offsets.shape != (E + 1,):
        raise ShapeError(complaint(_CALL, "expert_offsets", f"have shape {(E + 1,)}", offsets.shape))
    P = a.shape[0] if gather is None else gather.shape[0]
    if out is None:
        out = cupy.empty((P, N), np.float32)
    elif out.shape != (P, N) or out.dtype != np.float32 or not out.flags.c_contiguous:
        got = f"{out.dtype} {out.shape}"
        raise ShapeError(complaint(_CALL, "out", f"be C-contiguous float32 of shape {(P, N)}", got))
    tiles = list_tiles(offsets, P, choose_tile_rows(P, 1, E))
    gather = None if gather is None else cupy.ascontiguousarray(gather, np.int32)
    w = replace(w, codes=cupy.ascontiguousarray(w.codes))
    scale = None if a_scale is None else cupy.ascontiguousarray(a_scale)
    return grouped_gemm(cupy.ascontiguousarray(a), w, tiles, gather=gather, a_scale=scale, a_key=a_key, out=out)


def grouped_gemm(
    a: Array,
    w: WeightOperand,
    rows: Any,
    *,
    gather: Array | None = None,
    gather_div: int = 1,
    a_scale: Array | None = None,
    a_key: QuantKey | None = None,
    activation: ActivationConfig | None = None,
    routed: Routed | None = None,
    out: Array,
) -> Array:
    """Multiply rows grouped by expert with that expert's weights; optionally apply GEMM1's activation.

    Parameters
    ----------
    a : cupy.ndarray, (rows, K)
        float32, float16 or bfloat16, or one-byte codes under `a_key` with `a_scale`.
    w : WeightOperand
        Of CuPy arrays, C-contiguous.
    rows : TileList or DeviceRowMap
        `tiles`, `tile_count` and `tile_rows` of the work list.
    gather : cupy.ndarray, (P,), int32, optional
        Row r of the answer reads row ``gather[r] // gather_div`` of `a`; None: row r.
    a_scale : cupy.ndarray, optional
        (1,) for all rows, (rows, 1) a row, or (rows, groups) along k.
    activation : ActivationConfig, optional
        Applied to sums with their scales and bias; halves the width if gated.
    routed : Routed, optional
        Multiply each row by its router weight, after scales and bias; not together with `activation`.
    out : cupy.ndarray, (P, width), float32, float16 or bfloat16
        Written in the rows that the work list names, and returned; one rounding.  (M, width) float32 where rows are
        added to their tokens'.

    Raises
    ------
    ShapeError, DTypeError, ArgumentError, UnsupportedError
        Arguments that do not fit each other; nothing has been launched.
    """
    E, N = w.codes.shape[:2]
    if routed is not None and activation is not None:
        raise ArgumentError(complaint(_CALL, "routed", "be None where an activation follows", "router weights"))
    if routed is not None and routed.adds_to_tokens and out.dtype != np.float32:
        raise DTypeError(complaint(_CALL, "out", "be float32 where rows are added to their tokens'", out.dtype))
    width = N if activation is None else activation.width(N)
    operands, a_fields = _operands(a, w, a_key, a_scale)
    _check_output(out, width, w, (E, N))
    if out.shape[0] == 0 or width == 0 or rows.tiles.shape[0] == 0 or E == 0:
        return out
    fields = NO_ACTIVATION if activation is None else activation_fields(activation)
    halves = activation is not None and fields[1] == _HALVES
    uniform = w.block[0] % 64 == 0 and (not halves or width % 64 == 0)
    a, codes = _aligned(a), _aligned(w.codes)
    four = _stores_four(out, width)
    adds = 0 if routed is None else routed.adds_to_tokens
    direct = bool(four) and not adds and _sm90.is_direct(fields, activation is not None, operands.a, _FLOATS[out.dtype])
    found = operands._replace(
        uniform=uniform, scattered=_is_scattered(a, gather), activated=activation is not None, direct=direct
    )
    instance = choose(found, rows.tile_rows, archs.current_arch())
    # A tile of gate and up halves has half as many columns of the answer.
    column_tiles = -(-(2 * width if halves else N) // instance.columns)
    parts = 1 if instance.mapped else -(-rows.tile_rows // instance.rows)
    sizes = arguments.Sizes(
        operands.K, N, width, rows.tiles.shape[0], column_tiles, gather_div,
        adds, *_group_sizes(w, operands, a_key), four, int(activation is not None), parts, *a_fields,
        SCALES[operands.scale], FORMATS[operands.a], FORMATS[operands.b],
        FORMATS[_FLOATS[out.dtype]],
    )  # fmt: skip
    pointers = arguments.Pointers(
        address(a), address(codes), address(out), address(rows.tiles), address(rows.tile_count), _pointer(gather),
        _pointer(a_scale), _pointer(w.group_scale), _pointer(w.row_scale), _pointer(w.bias), _pointer(w.zp),
        *((0, 0) if routed is None else (address(routed.row_to_slot), _pointer(routed.topk_weights))),
    )  # fmt: skip
    blocks = sizes.capacity * parts * column_tiles
    if blocks >= 2**30:
        raise UnsupportedError(complaint(_CALL, "a", "need fewer than 2^30 tiles", blocks, "Use a smaller chunk_size"))
    if activation is not None and isinstance(activation.activation, RegisteredActivation):
        instance = instance._replace(kernel=with_activation(instance.kernel, activation))
    if instance.mapped:
        _sm90.launch(instance, pointers, sizes, fields, (a.shape[0], E))
    else:
        _plan(instance, blocks)(arguments.pack(pointers, sizes, fields))
    return out


@lru_cache(maxsize=64)
def _list_plan(shared_bytes: int) -> LaunchPlan:
    return LaunchPlan(_LIST_TILES, (1, 1, 1), (1024, 1, 1), shared_bytes)


def _is_scattered(a: Array, gather: Array | None) -> bool:
    """Return whether rows of `a` are to be found one by one: they lie apart, or a tape will find them elsewhere."""
    recorder = current_recorder()
    return gather is not None or (recorder is not None and recorder.holds(address(a)))


@lru_cache(maxsize=1024)
def _plan(instance: Instance, blocks: int) -> LaunchPlan:
    grid, block = (blocks, 1, 1), (instance.threads, 1, 1)
    pointers = len(arguments.Pointers._fields)
    return LaunchPlan(instance.kernel, grid, block, instance.shared_bytes, leading_pointers=pointers)


def _operands(
    a: Array, w: WeightOperand, key: QuantKey | None, scale: Array | None
) -> tuple[Operands, tuple[int, int]]:
    """Return what decides the kernel, and the kind and format of the activations' scales; checks both operands."""
    per_byte = 2 if key is not None and key.is_packed else 1
    if a.ndim != 2 or a.shape[1] * per_byte != w.K:
        raise ShapeError(complaint(_CALL, "a", f"have shape (any, {w.K // per_byte})", a.shape))
    b = _format("w.codes", w.codes, w.key)
    group = 0 if w.group_scale is None else w.block[1]
    weight_scale = "F32" if w.group_scale is None else _scale_format("w.group_scale", w.group_scale, w.key)
    kind, scale_format, a_groups = "none", "F32", False
    if key is not None:
        if scale is None:
            raise ArgumentError(complaint(_CALL, "a_scale", f"be given for {key.name}", None))
        kind, scale_format = _row_scale(a, w, key, scale)
        a_groups = kind == "group"
    a_format = _format("a", a, key)
    if b == "TF32":
        if a_format != "F32":
            raise DTypeError(complaint(_CALL, "a", "be float32 for weights of kTf32", a.dtype))
        a_format = b
    found = Operands(a_format, b, w.K, group, a_groups, weight_scale)
    return found, (arguments.ROW_SCALES[kind], SCALES[scale_format])


def _format(argument: str, x: Array, key: QuantKey | None) -> str:
    """Return the name of the operand's format, checked against its dtype."""
    if not x.flags.c_contiguous:
        raise ArgumentError(complaint(_CALL, argument, "be C-contiguous", f"strides {x.strides}"))
    if key is None:
        if x.dtype not in _FLOATS:
            raise DTypeError(complaint(_CALL, argument, "be float32, float16 or bfloat16 without a key", x.dtype))
        return _FLOATS[x.dtype]
    if key == kTf32:
        if x.dtype != np.float32:
            raise DTypeError(complaint(_CALL, argument, "be float32 for kTf32", x.dtype))
        return "TF32"
    if x.dtype not in (np.uint8, np.int8):
        raise DTypeError(complaint(_CALL, argument, f"hold one-byte codes of {key.name}", x.dtype))
    return _CODES[key.dtype]


def _scale_format(argument: str, scale: Array, key: QuantKey | None) -> str:
    if scale.dtype == np.float32:
        return "F32"
    if scale.dtype != np.uint8 or key is None:
        raise DTypeError(complaint(_CALL, argument, "be float32 or uint8", scale.dtype))
    return "E4M3" if key.scale.dtype == "fp8" else "E8M0"


def _row_scale(a: Array, w: WeightOperand, key: QuantKey, scale: Array) -> tuple[str, str]:
    """Return the kind and the format of the activations' scales."""
    extent = key.scale.group_shape.col
    if extent > 1:
        groups = -(-w.K // extent)
        if scale.shape != (a.shape[0], groups):
            raise ShapeError(complaint(_CALL, "a_scale", f"have shape {(a.shape[0], groups)}", scale.shape))
        if w.group_scale is None or w.block[1] != extent:
            rule = f"share groups of {extent} columns with the weights"
            raise ArgumentError(complaint(_CALL, "a_key", rule, key.name))
        return "group", _scale_format("a_scale", scale, key)
    if scale.dtype != np.float32:
        raise DTypeError(complaint(_CALL, "a_scale", "be float32", scale.dtype))
    if scale.size not in (1, a.shape[0]):
        raise ShapeError(complaint(_CALL, "a_scale", f"hold 1 or {a.shape[0]} scales", scale.shape))
    return ("one" if scale.size == 1 else "row"), "F32"


def _check_output(out: Array, width: int, w: WeightOperand, lines: tuple[int, int]) -> None:
    if out.ndim != 2 or out.shape[1] != width or not out.flags.c_contiguous or out.dtype not in _FLOATS:
        rule = f"be C-contiguous float32, float16 or bfloat16 of shape (any, {width})"
        raise ShapeError(complaint(_CALL, "out", rule, f"{out.dtype} {out.shape}"))
    for name, x in (("w.bias", w.bias), ("w.row_scale", w.row_scale)):
        if x is not None and (x.shape != lines or x.dtype != np.float32 or not x.flags.c_contiguous):
            raise ShapeError(
                complaint(_CALL, name, f"be C-contiguous float32 of shape {lines}", f"{x.dtype} {x.shape}")
            )


def _group_sizes(w: WeightOperand, operands: Operands, key: QuantKey | None) -> tuple[int, int, int, int, float, int]:
    """Return group, groups, rows that share a scale, lines of scales, 1 / group, whether they enter before the sum."""
    if w.group_scale is None:
        return operands.K or 1, 1, 1, 1, 1.0, 0
    blocks = operands.a_groups and key is not None and key.dtype in ("fp8", "int8")
    blocks = blocks and operands.a == operands.b and w.block[0] > 1
    lines, groups = w.group_scale.shape[1:]
    return w.block[1], groups, w.block[0], lines, 1 / w.block[1], int(not blocks)


def _stores_four(out: Array, width: int) -> int:
    return int(width % 4 == 0 and address(out) % 16 == 0)


def _aligned(x: Array) -> Array:
    """Return `x`, or a copy of it where its first element does not lie at a multiple of 16 bytes."""
    return x if address(x) % 16 == 0 else x.copy()


def _pointer(x: Array | None) -> int:
    return 0 if x is None else address(x)
