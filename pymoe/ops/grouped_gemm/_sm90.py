"""Launching the grouped GEMMs of sm_90a: tensor maps beside the arguments, and one block a multiprocessor."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from pymoe.device import arch as archs
from pymoe.device.enumerators import ActivationFields
from pymoe.device.launch import LaunchPlan
from pymoe.device.tensor_maps import MAP_BYTES, tensor_map
from pymoe.ops.grouped_gemm import _cuda_arguments as arguments
from pymoe.ops.grouped_gemm._cuda_instances import SM90_BOX_ROWS, SM90_DEPTH, SWAPPED_BOX_ROWS, Instance

__all__ = ["is_direct", "launch"]

_CLUSTER = 2
"""Blocks of a cluster, which bring each other weights or rows; the kernels' ``__cluster_dims__`` says so too."""
_SILU = 0
"""`Activation::kSilu`, which stands for users' own too."""
_PLAIN, _HALVES = 0, 1
"""Of `GateLayout`."""
_ARGUMENTS = -(-arguments.NBYTES // 64) * 64
_VOID = np.dtype(f"V{_ARGUMENTS + 2 * MAP_BYTES}")
"""`MappedArguments` of ``grouped_gemm/sm90.cu`` and its like: the arguments, and the maps at multiples of 64 bytes."""


def is_direct(fields: ActivationFields, activated: bool, a_format: str, out_format: str) -> bool:
    """Return whether pieces of four columns can go from registers to their rows, as ``sm90_epilogue.cuh`` says."""
    kind, layout = fields[:2]
    if not activated:
        return out_format in (a_format, "F32")
    return kind == _SILU and layout != _PLAIN and out_format == a_format


def launch(
    instance: Instance,
    pointers: arguments.Pointers,
    sizes: arguments.Sizes,
    activation: ActivationFields,
    lines: tuple[int, int],
) -> None:
    """Queue one grouped GEMM; `lines` are the rows of `a` and the experts."""
    rows, experts = lines
    shape = (experts, sizes.N, sizes.K)
    if instance.swapped:
        weights = _weights_by_parts(pointers.b, shape, instance.columns, activation[1])
    else:
        weights = tensor_map(pointers.b, 2, shape, (1, instance.columns // 2, SM90_DEPTH))
    box_rows = SWAPPED_BOX_ROWS if instance.swapped else SM90_BOX_ROWS
    mapped = tensor_map(pointers.a, 2, (rows, sizes.K), (box_rows, SM90_DEPTH))
    packed = arguments.pack(pointers, sizes, activation).tobytes().ljust(_ARGUMENTS, b"\0") + weights + mapped
    blocks = min(sizes.capacity * sizes.column_tiles, archs.current_multiprocessors())
    blocks = max(blocks // _CLUSTER, 1) * _CLUSTER
    _plan(instance, blocks)(np.frombuffer(packed, _VOID)[0])


def _weights_by_parts(address: int, shape: tuple[int, int, int], columns: int, layout: int) -> bytes:
    """Return the map of weights as (E, parts, N / parts, K): a box has gate and up of the same columns, or one part."""
    E, N, K = shape
    parts = 1 if layout == _PLAIN else 2
    pitches = (N * K, N // parts * K, K) if layout in (_PLAIN, _HALVES) else (N * K, K, 2 * K)
    return tensor_map(address, 2, (E, parts, N // parts, K), (1, parts, columns // parts, SM90_DEPTH), pitches)


@lru_cache(maxsize=1024)
def _plan(instance: Instance, blocks: int) -> LaunchPlan:
    return LaunchPlan(
        instance.kernel, (blocks, 1, 1), (instance.threads, 1, 1), instance.shared_bytes,
        leading_pointers=len(arguments.Pointers._fields),
    )  # fmt: skip
