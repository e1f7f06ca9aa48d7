"""Which kernel multiplies which pair of formats, in which tiles: decided by formats, shapes and the architecture alone.

`choose` is the one place that picks a strategy; a path for one architecture is one more candidate there.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from pymoe.device.arch import limits
from pymoe.device.jit import KernelId

__all__ = [
    "BITS",
    "FEW_ROWS",
    "SM90_BOX_ROWS",
    "SM90_DEPTH",
    "SWAPPED_BOX_ROWS",
    "SWAPPED_STAGES",
    "TILE_ROWS",
    "Instance",
    "Operands",
    "all_instances",
    "choose",
    "choose_tile_rows",
    "rows_of_an_expert",
    "sm90_tile_rows",
]

FEW_ROWS = 24
"""Of an expert, up to which tiles of 16 rows are best."""

TILE_ROWS = (16, 64, 128)
"""Rows of a tile, one of which a work list is made for."""

BITS = {"F32": 32, "TF32": 32, "BF16": 16, "FP16": 16, "E4M3": 8, "S8": 8, "U8": 8, "U4": 4, "E2M1": 4}
"""Formats by their names in `cuda_src/common/convert.cuh`, with the bits of an element."""

_SHARED_BYTES = 103 * 1024
"""Of a block at most: two of them fit the 228 KB of an sm_90."""
_FOUR_STAGES = 84 * 1024
"""Of a block that has four stages; larger ones have three, so that more blocks fit."""
SM90_DEPTH = 64
"""Columns of a stage of the kernel for sm_90a, 128 bytes."""
SM90_BOX_ROWS, SWAPPED_BOX_ROWS = 64, 32
"""Rows of activations that one tensor copy brings, to the kernel for sm_90a and to the one of swapped operands."""
_SM90_TILE_ROWS, _SM90_STAGES = 128, 4
_SM90_LONG = 8192
"""K from which the end of a tile is short beside its sums, so that the wider tile of two warpgroups pays."""
SWAPPED_STAGES = {96: 7, 192: 5}
"""Stages of the kernels for sm_90a with swapped operands, by the most rows of a tile; such lists are theirs."""
_MOST_COLUMNS = 1 << 22
"""K up to which the tensor-core kernels find the group of a column by a float32 product."""


class Operands(NamedTuple):
    """What decides which kernel can multiply: formats, K, and where scales change along k.

    `group` is 0 where no scale does; `a_groups` says whether activations have such scales too; `scale` is their format
    (F32, E8M0 or E4M3) on the weights' side; `uniform` whether any 64 neighbouring columns of a tile share them;
    `scattered` whether rows of `a` may lie apart; `activated` whether the sums are; `direct` whether answers can go
    from registers to their rows (`pymoe.ops.grouped_gemm._sm90.is_direct`).
    """

    a: str
    b: str
    K: int
    group: int = 0
    a_groups: bool = False
    scale: str = "F32"
    uniform: bool = False
    scattered: bool = True
    activated: bool = False
    direct: bool = True


class Instance(NamedTuple):
    """A compiled kernel and what launching it takes; `rows` of a block, of which a tile of the list may hold two."""

    kernel: KernelId
    rows: int
    columns: int
    threads: int
    shared_bytes: int
    native: bool
    """Whether tensor cores multiply the codes themselves, or floats as they are."""
    mapped: bool = False
    """Whether it walks all tiles with one block a multiprocessor, and takes tensor maps of both operands."""
    swapped: bool = False
    """Whether its columns are weight rows that both parts of a gate share."""


class _Pair(NamedTuple):
    """Template arguments that formats and scales decide."""

    a: str
    b: str
    scaling: str
    span: int


_FLOATS = ("BF16", "FP16")
_PAIRS = (
    *(_Pair(a, a, "None", 32) for a in (*_FLOATS, "TF32")),
    *(_Pair(a, "E4M3", "None", 32) for a in _FLOATS),
    *(_Pair(a, b, "Sums", 32) for a in _FLOATS for b in ("E4M3", "U8", "U4")),
    *(_Pair("BF16", b, "Fold", 32) for b in ("E4M3", "E2M1")),
    _Pair("FP16", "E2M1", "Sums", 32),
    *(_Pair(a, "E2M1", "Fold", 16) for a in _FLOATS),
    *(_Pair(a, a, scaling, span) for a in ("E4M3", "S8") for scaling, span in (("None", 32), ("Blocks", 128))),
    *(_Pair(a, b, "Blocks", 32) for a, b in (("E4M3", "E4M3"), ("S8", "S8"), ("E4M3", "E2M1"), ("E2M1", "E2M1"))),
    _Pair("E2M1", "E2M1", "Blocks", 16),
)


def choose_tile_rows(M: int, topk: int, E_local: int, num_experts: int | None = None) -> int:
    """Return the rows of a tile for M tokens with `topk` slots each, from shapes only.

    Parameters
    ----------
    M, topk : int
    E_local : int
        Experts here.
    num_experts : int, optional
        Experts everywhere, over which the slots are spread; default `E_local`.
    """
    rows = rows_of_an_expert(M, topk, E_local, num_experts)
    # Weights are read once a tile: small tiles while they all fit one expert's rows, large ones for reuse.
    return 16 if rows <= FEW_ROWS else 64 if rows <= 96 else 128


def rows_of_an_expert(M: int, topk: int, E_local: int, num_experts: int | None = None) -> float:
    """Return the rows of an expert that has some, where slots are spread evenly; arguments as of `choose_tile_rows`."""
    experts = max(E_local if num_experts is None else num_experts, 1)
    return M * topk / min(experts, max(M * topk, 1))


def sm90_tile_rows(expert_rows: float, direct: bool) -> int:
    """Return the most rows of a tile on sm_90a, for experts of about so many.

    Up to two tiles of swapped operands, as far as they store answers: beyond, half a tile of 128 rows that stays empty
    costs less than what wider tiles of weights save.
    """
    # Rows of an expert differ by their square root where slots are spread at random.
    most = expert_rows + 2 * expert_rows**0.5
    if not direct or most > 2 * max(SWAPPED_STAGES):
        return _SM90_TILE_ROWS
    return min(SWAPPED_STAGES) if most <= min(SWAPPED_STAGES) else max(SWAPPED_STAGES)


def choose(operands: Operands, tile_rows: int, arch: str) -> Instance:
    """Return the kernel for these operands.

    Tensor cores where rows of both operands are whole pieces of 16 bytes and groups whole steps; else float32
    multiply-adds, which take everything.
    """
    pair = _pair(operands)
    block_rows = next((rows for rows in TILE_ROWS if tile_rows <= rows), TILE_ROWS[-1])
    whole = all(operands.K * BITS[side] % 128 == 0 for side in (operands.a, operands.b))
    if pair is None or not whole or operands.K > _MOST_COLUMNS:
        return _simt(operands.a == operands.b and operands.a in ("F32", "TF32"), block_rows)
    if arch == "sm_90a" and tile_rows > 16 and not operands.scattered and _is_16_bit(pair) and operands.K:
        if tile_rows in SWAPPED_STAGES and operands.direct:
            return _swapped(pair.a, operands.activated, tile_rows)
        if tile_rows <= _SM90_TILE_ROWS:
            turns = operands.direct and operands.K < _SM90_LONG
            return _sm90(pair.a, turns, turns and operands.activated)
    return _tensor(pair, block_rows, limits(arch).shared_bytes, arch)


def all_instances(arch: str) -> tuple[Instance, ...]:
    """Return every instance that `choose` can answer for `arch`."""
    shared = limits(arch).shared_bytes
    tensor = [_tensor(pair, rows, shared, arch) for pair in _PAIRS for rows in TILE_ROWS]
    simt = [_simt(plain, rows) for plain in (False, True) for rows in TILE_ROWS]
    kinds = ((False, False), (True, False), (True, True)) if arch == "sm_90a" else ()
    sm90 = [_sm90(a, *kind) for a in _FLOATS for kind in kinds]
    if arch == "sm_90a":
        sm90 += [_swapped(a, gated, rows) for a in _FLOATS for gated in (False, True) for rows in SWAPPED_STAGES]
    return tuple(dict.fromkeys((*tensor, *simt, *sm90)))


def _pair(operands: Operands) -> _Pair | None:
    """Return the pair of `_PAIRS` that computes these operands, None where none does."""
    a, b, group = operands.a, operands.b, operands.group
    if a in _FLOATS and b in ("U8", "U4"):
        pair = _Pair(a, b, "Sums", 32) if group % 32 == 0 or group >= operands.K else None
    elif not group:
        pair = _Pair(a, b, "None", 32)
    elif operands.a_groups:
        whole = a == b and group % 128 == 0 and (a == "S8" or (a == "E4M3" and operands.uniform))
        span = 128 if whole else min(group, 32)
        pair = _Pair(a, b, "Blocks", span) if group % span == 0 else None
    elif operands.scale == "E4M3":
        pair = _Pair(a, b, "Fold", 16) if group == 16 else None
    elif operands.scale == "E8M0" and a == "BF16" and group == 32:
        pair = _Pair(a, b, "Fold", 32)  # powers of two change the exponent only
    else:
        pair = _Pair(a, b, "Sums", 32) if group % 32 == 0 else None
    return pair if pair in _PAIRS else None


@lru_cache(maxsize=16)
def _simt(plain: bool, rows: int) -> Instance:
    kernel = KernelId("grouped_gemm/simt.cu", f"pymoe::grouped_gemm_simt_kernel<{str(not plain).lower()}, {rows}>")
    return Instance(kernel, rows, 64, 256, 0, plain)


@lru_cache(maxsize=16)
def _sm90(a: str, turns: bool, activated: bool) -> Instance:
    """Return the kernel of ``grouped_gemm/sm90.cu`` whose warpgroups take turns, or multiply one tile together.

    Those that take turns are compiled with or without an activation; the other does both.
    """
    columns, spare = (192, 2064) if turns else (256, 4 * 16 * (32 + 8) + 16)
    flags = ", ".join(str(flag).lower() for flag in (turns, activated))
    kernel = f"pymoe::grouped_gemm_sm90_kernel<pymoe::Format::k{a}, {flags}>"
    stage = (_SM90_TILE_ROWS + columns) * 2 * SM90_DEPTH + 16
    shared = _SM90_STAGES * stage + 8 * spare
    return Instance(KernelId("grouped_gemm/sm90.cu", kernel), _SM90_TILE_ROWS, columns, 384, shared, True, True)


@lru_cache(maxsize=16)
def _swapped(a: str, gated: bool, rows: int) -> Instance:
    """Return the kernel of ``grouped_gemm/sm90_swapped.cu`` for tiles of at most `rows` rows."""
    weight_rows, spare = 128, 4 * ((512 if gated else 192) + 36)
    kernel = f"pymoe::grouped_gemm_sm90_swapped_kernel<pymoe::Format::k{a}, {str(gated).lower()}, {rows}>"
    shared = SWAPPED_STAGES[rows] * ((weight_rows + rows) * 2 * SM90_DEPTH + 16) + 8 * spare
    return Instance(KernelId("grouped_gemm/sm90_swapped.cu", kernel), rows, weight_rows, 384, shared, True, True, True)


@lru_cache(maxsize=256)
def _tensor(pair: _Pair, rows: int, shared_limit: int, arch: str) -> Instance:
    native = _is_native(pair, arch)
    if _is_uniform(pair) and not native:
        rows = min(rows, 64)  # totals and partial sums of more rows would leave room for one block only
    wide = BITS[pair.a] >= 16
    columns = 64 if rows == 16 and BITS[pair.b] > 4 else 128
    # A stage holds 64 to 128 bytes of a weight row, and fewer where two-byte activations would fill it.
    depth = 64 if wide and rows > 16 else 128
    if BITS[pair.a] == 32:
        depth //= 2
    warps = _warps(pair, rows, native, arch)
    limit = min(_SHARED_BYTES, shared_limit)
    if _shared_bytes(pair, rows, columns, depth, 3) > limit:
        columns = 64
    stages = 4 if _shared_bytes(pair, rows, columns, depth, 4) <= _FOUR_STAGES else 3
    numbers = (pair.span, rows, columns, depth, stages, *warps)
    formats = f"pymoe::Format::k{pair.a}, pymoe::Format::k{pair.b}, pymoe::Scaling::k{pair.scaling}"
    expression = f"pymoe::grouped_gemm_kernel<{formats}, {', '.join(map(str, numbers))}>"
    return Instance(
        KernelId("grouped_gemm/grouped_gemm.cu", expression), rows, columns, 32 * warps[0] * warps[1],
        _shared_bytes(pair, rows, columns, depth, stages), native,
    )  # fmt: skip


def _is_16_bit(pair: _Pair) -> bool:
    """Whether both sides are the same 16-bit floats."""
    return pair.a == pair.b and pair.a in _FLOATS


def _is_native(pair: _Pair, arch: str) -> bool:
    """Whether the tensor cores of `arch` multiply the codes of this pair as they are."""
    if pair.a == pair.b == "E4M3":
        return arch in ("sm_89", "sm_120")
    return pair.a == pair.b and pair.a in (*_FLOATS, "TF32", "S8")


def _warps(pair: _Pair, rows: int, native: bool, arch: str) -> tuple[int, int]:
    """Return the warps of a block along rows and columns.

    Warps of 64 by 64 decode least.  Where nothing is decoded, or partial sums lie beside the totals, twice as many
    smaller ones hide more of the memory's latency; those of int4 just fit the registers of sm_90a.
    """
    if rows < 128:
        return (1, 4) if rows == 16 or (_is_uniform(pair) and not native) else (2, 2)
    if pair.scaling == "Sums" and pair.b == "U4" and arch == "sm_90a":
        return (2, 2)
    return (2, 4) if native or pair.scaling in ("Sums", "Blocks") else (2, 2)


def _is_uniform(pair: _Pair) -> bool:
    """Whether all weights of a warp share the scale of a partial sum."""
    return pair.a == "E4M3" and pair.scaling == "Blocks" and pair.span == 128


def _shared_bytes(pair: _Pair, rows: int, columns: int, depth: int, stages: int) -> int:
    """Return `Instance::kSharedBytes` of `grouped_gemm.cu`."""
    units = 1 if pair.scaling == "None" else depth // pair.span
    arrays = (pair.b in ("U8", "U4") or pair.scaling == "Fold") + (pair.scaling in ("Sums", "Blocks"))
    words = units * ((columns // 16 if _is_uniform(pair) else columns) + 8) * arrays
    words += units * (rows + 8) * (pair.scaling == "Blocks")
    stage = (rows * BITS[pair.a] + columns * BITS[pair.b]) * depth // 8 + 4 * words
    return max(stages * stage, 4 * rows * (columns + 8)) + 4 * (rows + 2 * columns + 4)
