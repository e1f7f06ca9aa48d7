"""Pieces of a workspace: apart from each other, aligned, the same ones again, and gone with the memory."""

from __future__ import annotations

import gc
import weakref

import ml_dtypes
import numpy as np
import pytest

from pymoe.device.arena import Arena, Arenas, padded
from pymoe.errors import ArgumentError

REQUESTS = [
    ((3, 5), np.float32),
    ((0,), np.int32),
    ((1,), np.int32),
    ((7, 2), np.dtype(ml_dtypes.bfloat16)),
    ((), "i8"),
]


def memory(nbytes):
    whole = np.empty(nbytes + 256, np.uint8)
    start = -whole.ctypes.data % 256
    return whole[start : start + nbytes]


def test_pieces_are_apart_aligned_and_the_same_after_rewinding():
    arena = Arena(memory(sum(padded(*request) for request in REQUESTS)))
    pieces = [arena.empty(*request) for request in REQUESTS]
    for piece, (shape, dtype) in zip(pieces, REQUESTS, strict=True):
        assert piece.shape == shape and piece.dtype == np.dtype(dtype) and piece.ctypes.data % 256 == 0
    for i, piece in enumerate(pieces):
        assert not any(np.shares_memory(piece, other) for other in pieces[:i])
    arena.rewind()
    assert all(arena.empty(*request) is piece for request, piece in zip(REQUESTS, pieces, strict=True))


def test_other_requests_after_rewinding_get_other_views():
    arena = Arena(memory(1024))
    first = arena.empty((4,), np.float32)
    arena.rewind()
    second = arena.empty((2, 2), np.int32)
    assert second is not first and second.shape == (2, 2) and np.shares_memory(first, second)


def test_memory_that_is_too_small_is_refused_with_sizes():
    arena = Arena(memory(512))
    arena.empty((64,), np.float32)
    with pytest.raises(ArgumentError, match=r"hold 516 bytes for \(65,\) float32; got 512"):
        arena.empty((65,), np.float32)


def test_an_arena_goes_with_its_memory():
    arenas, block = Arenas(), memory(512)
    arena = arenas.of(block)
    assert arenas.of(block) is arena
    piece, alive = arena.empty((4,), np.int8), weakref.ref(arena)
    del arena, block
    gc.collect()
    assert alive() is None and not arenas._arenas
    piece[...] = 1


def test_another_array_at_the_same_address_has_its_own_arena():
    block = memory(512)
    arenas, one, other = Arenas(), block[:], block[:]
    assert arenas.of(one) is not arenas.of(other)
