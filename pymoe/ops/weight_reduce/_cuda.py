"""Weight and reduce on the GPU: a thread a few columns of a token, slots in order, as the definition."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from pymoe.device.arrays import BFLOAT16, namespace
from pymoe.device.jit import KernelId
from pymoe.device.launch import LaunchPlan
from pymoe.device.parameters import address, integer_kind

Array = Any

DTYPES = {np.dtype("float32"): "float", np.dtype("float16"): "pymoe::fp16", BFLOAT16: "pymoe::bf16"}
_UNIT = "weight_reduce/weight_reduce.cu"
_VECTOR_BYTES = 16
_WARP, _THREADS = 32, 128


def kernels(arch: str) -> tuple[KernelId, ...]:
    """Return every instance that can be asked for on `arch`."""
    return tuple(
        _kernel(slots, out, count)
        for slots in DTYPES
        for out in DTYPES
        for count in (1, _VECTOR_BYTES // slots.itemsize)
    )


def _kernel(slots: np.dtype, out: np.dtype, count: int) -> KernelId:
    return KernelId(_UNIT, f"pymoe::weight_reduce_kernel<{DTYPES[slots]}, {DTYPES[out]}, {count}>")


def weight_reduce(slots: Array, topk_weights: Array | None, topk_ids: Array | None, out: Array) -> None:
    """Sum `slots` (M, topk, K) into `out` (M, K), both of `DTYPES`; weights float32, ids any integer; C-contiguous."""
    M, topk, K = slots.shape
    if M and K:
        aligned = address(slots) % _VECTOR_BYTES == 0 and address(out) % _VECTOR_BYTES == 0
        plan = _plan(slots.dtype, out.dtype, M, K, aligned)
        weights = 0 if topk_weights is None else topk_weights
        ids, kind = (0, 0) if topk_ids is None else (topk_ids, integer_kind(topk_ids.dtype))
        plan(out, slots, weights, ids, np.int32(kind), np.int32(topk), np.int32(K))


def weight_reduce_any(slots: Array, topk_weights: Array | None, topk_ids: Array | None, out: Array) -> None:
    """Do `weight_reduce` for arrays of any strides and float dtype, by copies where the kernel cannot take them."""
    xp = namespace(slots)
    slots = xp.ascontiguousarray(slots, dtype=slots.dtype if slots.dtype in DTYPES else np.float32)
    weights = None if topk_weights is None else xp.ascontiguousarray(topk_weights, dtype=np.float32)
    ids = None if topk_ids is None else xp.ascontiguousarray(topk_ids)
    if out.dtype in DTYPES and out.flags.c_contiguous:
        weight_reduce(slots, weights, ids, out)
        return
    result = xp.empty(out.shape, out.dtype if out.dtype in DTYPES else np.float32)
    weight_reduce(slots, weights, ids, result)
    out[...] = result


@lru_cache(maxsize=1024)
def _plan(slots: np.dtype, out: np.dtype, M: int, K: int, aligned: bool) -> LaunchPlan:
    count = _VECTOR_BYTES // slots.itemsize
    if not aligned or K % count:
        count = 1
    pieces = K // count
    threads = min(_THREADS, -(-pieces // _WARP) * _WARP)
    return LaunchPlan(_kernel(slots, out, count), (M, -(-pieces // threads), 1), (threads, 1, 1))
