"""Unpermute on the GPU: a thread a few columns of a token, slots in order, as the definition."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from pymoe.device.arrays import BFLOAT16, namespace
from pymoe.device.jit import KernelId
from pymoe.device.launch import LaunchPlan
from pymoe.device.parameters import address

Array = Any

DTYPES = {np.dtype("float32"): "float", np.dtype("float16"): "pymoe::fp16", BFLOAT16: "pymoe::bf16"}
_UNIT = "unpermute/unpermute.cu"
_VECTOR_BYTES = 16
_WARP, _THREADS = 32, 128
_FLAT, _FLAT_THREADS = 4, 256


def kernels(arch: str) -> tuple[KernelId, ...]:
    """Return every instance that can be asked for on `arch`."""
    sums = [
        _kernel(rows, out, count) for rows in DTYPES for out in DTYPES for count in (1, _VECTOR_BYTES // rows.itemsize)
    ]
    narrow = [out for out in DTYPES if out != np.float32]
    flat = [_flat_kernel(out, count) for out in (None, *narrow) for count in (1, _FLAT)]
    return (*sums, *flat)


def _kernel(rows: np.dtype, out: np.dtype, count: int) -> KernelId:
    return KernelId(_UNIT, f"pymoe::unpermute_kernel<{DTYPES[rows]}, {DTYPES[out]}, {count}>")


def _flat_kernel(out: np.dtype | None, count: int) -> KernelId:
    """Return the kernel that rounds sums to `out`, or the one that zeroes them."""
    name = "zero_sums_kernel<" if out is None else f"round_sums_kernel<{DTYPES[out]}, "
    return KernelId(_UNIT, f"pymoe::{name}{count}>")


def zero_sums(sums: Array) -> None:
    """Fill float32 `sums` with zeros, for rows to be added to."""
    if sums.size:
        _flat(None, sums, sums)(sums, np.int64(sums.size))


def round_sums(sums: Array, out: Array) -> None:
    """Round float32 `sums` to `out`, float16 or bfloat16, of the same shape."""
    if sums.size:
        _flat(out.dtype, sums, out)(out, sums, np.int64(sums.size))


def unpermute(rows: Array, slot_to_row: Array, topk_weights: Array | None, out: Array) -> None:
    """Sum `rows` (any, K) into `out` (M, K), both of `DTYPES`; weights float32, slots int32 (M, topk); C-contiguous."""
    M, K = out.shape
    if M and K:
        topk = slot_to_row.shape[1]
        aligned = address(rows) % _VECTOR_BYTES == 0 and address(out) % _VECTOR_BYTES == 0
        plan = _plan(rows.dtype, out.dtype, M, K, aligned)
        plan(out, rows, 0 if topk_weights is None else topk_weights, slot_to_row, np.int32(topk), np.int32(K))


def unpermute_any(rows: Array, slot_to_row: Array, topk_weights: Array | None, out: Array) -> None:
    """Do `unpermute` for arrays of any strides and float dtype, by copies where the kernel cannot take them."""
    xp = namespace(rows)
    rows = xp.ascontiguousarray(rows, dtype=rows.dtype if rows.dtype in DTYPES else np.float32)
    weights = None if topk_weights is None else xp.ascontiguousarray(topk_weights, dtype=np.float32)
    if out.dtype in DTYPES and out.flags.c_contiguous:
        unpermute(rows, slot_to_row, weights, out)
        return
    result = xp.empty(out.shape, out.dtype if out.dtype in DTYPES else np.float32)
    unpermute(rows, slot_to_row, weights, result)
    out[...] = result


@lru_cache(maxsize=1024)
def _plan(rows: np.dtype, out: np.dtype, M: int, K: int, aligned: bool) -> LaunchPlan:
    count = _VECTOR_BYTES // rows.itemsize
    if not aligned or K % count:
        count = 1
    pieces = K // count
    threads = min(_THREADS, -(-pieces // _WARP) * _WARP)
    return LaunchPlan(_kernel(rows, out, count), (M, -(-pieces // threads), 1), (threads, 1, 1))


def _flat(out: np.dtype | None, sums: Array, target: Array) -> LaunchPlan:
    aligned = address(sums) % _VECTOR_BYTES == 0 and address(target) % _VECTOR_BYTES == 0
    return _flat_plan(out, sums.size, _FLAT if aligned and sums.size % _FLAT == 0 else 1)


@lru_cache(maxsize=1024)
def _flat_plan(out: np.dtype | None, size: int, count: int) -> LaunchPlan:
    blocks = -(-size // (count * _FLAT_THREADS))
    return LaunchPlan(_flat_kernel(out, count), (blocks, 1, 1), (_FLAT_THREADS, 1, 1))
