"""O4: memory that held something before.  The heap's free blocks are filled, and fresh ones come filled."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np


@contextlib.contextmanager
def dirty(fill: int) -> Iterator[None]:
    """Fill what `numpy.empty` hands out with a byte: 0xFF is NaN and -1, 0x7F a large float, 0x00 what hides bugs.

    Filling and freeing blocks leaves it to the allocator which of them come back; so `numpy.empty` itself is replaced
    as well, which no allocator can undo.  Numba cannot compile while it is: call once before.
    """
    blocks = [np.full(1 << size, fill, np.uint8) for size in range(4, 24) for _ in range(4)]
    del blocks
    real, real_like = np.empty, np.empty_like

    def empty(shape, dtype=float, *args, **kwargs):
        return _fill(real(shape, dtype, *args, **kwargs), fill)

    def empty_like(prototype, *args, **kwargs):
        return _fill(real_like(prototype, *args, **kwargs), fill)

    np.empty, np.empty_like = empty, empty_like
    try:
        yield
    finally:
        np.empty, np.empty_like = real, real_like


def _fill(array: np.ndarray, fill: int) -> np.ndarray:
    if array.size and not array.dtype.hasobject and array.flags.c_contiguous:
        array.reshape(-1).view(np.uint8)[:] = fill
    return array
