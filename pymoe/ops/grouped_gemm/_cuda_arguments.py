"""The one parameter of the grouped GEMM kernels, `GemmArguments` of ``grouped_gemm/arguments.cuh``, as bytes."""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import numpy as np

from pymoe.device.enumerators import ActivationFields

__all__ = ["NBYTES", "ROW_SCALES", "Pointers", "Sizes", "pack"]

ROW_SCALES = {"none": 0, "one": 1, "row": 2, "group": 3}
"""`RowScale` of ``grouped_gemm/arguments.cuh``."""


class Pointers(NamedTuple):
    """Device addresses, 0 where there is none."""

    a: int
    b: int
    out: int
    tiles: int
    tile_count: int
    gather: int
    a_scale: int
    group_scale: int
    row_scale: int
    bias: int
    zero_points: int
    row_to_slot: int
    topk_weights: int


class Sizes(NamedTuple):
    """Sizes, flags and enumerators; see the fields of `GemmArguments`."""

    K: int
    N: int
    width: int
    capacity: int
    column_tiles: int
    gather_div: int
    slots_of_token: int
    group: int
    groups: int
    scale_rows: int
    scale_lines: int
    inverse_group: float
    scales_before_sum: int
    vector_store: int
    activated: int
    parts: int
    a_scale_kind: int
    a_scale_format: int
    group_scale_format: int
    a_format: int
    b_format: int
    out_format: int


_LAYOUT = struct.Struct("<13Q11if12i5f4x")  # as long as a multiple of a pointer
NBYTES = _LAYOUT.size
_VOID = np.dtype(f"V{NBYTES}")


def pack(pointers: Pointers, sizes: Sizes, activation: ActivationFields) -> Any:
    """Return the structure as one NumPy scalar, which CuPy hands over by value."""
    return np.frombuffer(_LAYOUT.pack(*pointers, *sizes, *activation), _VOID)[0]
