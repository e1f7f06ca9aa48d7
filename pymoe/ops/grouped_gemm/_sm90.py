"""Launching the grouped GEMM of sm_90a: tensor maps beside the arguments, and one block a multiprocessor."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from pymoe.device import arch as archs
from pymoe.device.enumerators import ActivationFields
from pymoe.device.launch import LaunchPlan
from pymoe.device.tensor_maps import MAP_BYTES, tensor_map
from pymoe.ops.grouped_gemm import _cuda_arguments as arguments
from pymoe.ops.grouped_gemm._cuda_instances import SM90_BOX_ROWS, SM90_DEPTH, Instance

__all__ = ["launch"]

_ARGUMENTS = -(-arguments.NBYTES // 64) * 64
_VOID = np.dtype(f"V{_ARGUMENTS + 2 * MAP_BYTES}")
"""`MappedArguments` of ``grouped_gemm/sm90.cu``: the arguments, and the maps at multiples of 64 bytes."""


def launch(
    instance: Instance,
    pointers: arguments.Pointers,
    sizes: arguments.Sizes,
    activation: ActivationFields,
    lines: tuple[int, int],
) -> None:
    """Queue one grouped GEMM; `lines` are the rows of `a` and the experts."""
    rows, experts = lines
    weights = tensor_map(pointers.b, 2, (experts, sizes.N, sizes.K), (1, instance.columns // 2, SM90_DEPTH))
    mapped = tensor_map(pointers.a, 2, (rows, sizes.K), (SM90_BOX_ROWS, SM90_DEPTH))
    packed = arguments.pack(pointers, sizes, activation).tobytes().ljust(_ARGUMENTS, b"\0") + weights + mapped
    blocks = min(sizes.capacity * sizes.column_tiles, archs.current_multiprocessors())
    _plan(instance, blocks)(np.frombuffer(packed, _VOID)[0])


@lru_cache(maxsize=1024)
def _plan(instance: Instance, blocks: int) -> LaunchPlan:
    return LaunchPlan(
        instance.kernel, (blocks, 1, 1), (instance.threads, 1, 1), instance.shared_bytes,
        leading_pointers=len(arguments.Pointers._fields),
    )  # fmt: skip
