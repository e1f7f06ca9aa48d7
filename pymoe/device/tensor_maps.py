"""Tensor maps: what a tensor copy of sm_90 and later has to know of an array, encoded once and passed by value."""

from __future__ import annotations

from functools import lru_cache

from pymoe.errors import UnsupportedError, complaint

__all__ = ["MAP_BYTES", "tensor_map"]

MAP_BYTES = 128
"""Of `TensorMap` of ``common/types.cuh``; it lies at a multiple of 64."""


@lru_cache(maxsize=1024)
def tensor_map(
    address: int, itemsize: int, shape: tuple[int, ...], box: tuple[int, ...], pitches: tuple[int, ...] | None = None
) -> bytes:
    """Return the map of an array whose boxes go to shared memory in swizzled rows of 128 bytes.

    A map follows from its arguments alone, so that keeping it is safe whatever comes to lie at the address.  What a box
    names outside the array arrives as zeros.

    Parameters
    ----------
    address : int
        Of the first element, a multiple of 16.
    itemsize : int
        1 or 2 bytes; the copy does not look at the elements.
    shape, box : tuple of int
        Extents of the array and of a box, the last one along the rows; a row of a box has 128 bytes.
    pitches : tuple of int, optional
        Elements from one index to the next along every axis but the last, in any order of size; default C order.

    Raises
    ------
    UnsupportedError
        The driver refuses the map, and says why not.
    """
    import numpy as np
    from cuda.bindings import driver

    kinds = driver.CUtensorMapDataType
    kind = {1: kinds.CU_TENSOR_MAP_DATA_TYPE_UINT8, 2: kinds.CU_TENSOR_MAP_DATA_TYPE_UINT16}[itemsize]
    if pitches is None:
        pitches = tuple(int(np.prod(shape[i:], dtype=np.int64)) for i in range(1, len(shape)))
    status, encoded = driver.cuTensorMapEncodeTiled(
        kind,
        len(shape),
        address,
        [driver.cuuint64_t(extent) for extent in reversed(shape)],
        [driver.cuuint64_t(itemsize * pitch) for pitch in reversed(pitches)],
        [driver.cuuint32_t(extent) for extent in reversed(box)],
        [driver.cuuint32_t(1)] * len(shape),
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    if status != driver.CUresult.CUDA_SUCCESS:
        got = f"{status.name} for shape {shape}, box {box}, {itemsize}-byte elements at {address:#x}"
        raise UnsupportedError(complaint("tensor_map", "the array", "have a tensor map", got))
    words = [int(word) for word in encoded.opaque]
    return np.array(words, np.uint64).tobytes()
