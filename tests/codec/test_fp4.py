"""e2m1 against a table of exact midpoints, and the packing of nibbles."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from pymoe.codec.fp4 import E2M1_VALUES, decode_e2m1, encode_e2m1, pack_nibbles, unpack_nibbles
from tests.codec import definitions


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_F4_all_16_bit_inputs(dtype):
    x = np.arange(1 << 16, dtype=np.uint16).view(dtype).astype(np.float32)
    np.testing.assert_array_equal(encode_e2m1(x), definitions.e2m1(x))


def test_midpoints_and_their_neighbours():
    edges = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], np.float32)
    assert encode_e2m1(edges).tolist() == [0, 2, 2, 4, 4, 6, 6]
    below, above = np.nextafter(edges, np.float32(0)), np.nextafter(edges, np.float32(9))
    assert encode_e2m1(below).tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert encode_e2m1(-above).tolist() == [8 | code for code in (1, 2, 3, 4, 5, 6, 7)]


def test_F4_specials():
    x = np.array([np.inf, -np.inf, 1e30, np.nan, -np.nan, -0.0, -1e-30], np.float32)
    assert encode_e2m1(x).tolist() == [7, 15, 7, 0, 0, 8, 8]


def test_decode_of_all_16_codes():
    expected = np.array([*definitions.E2M1, *(-v for v in definitions.E2M1)], np.float32)
    codes = np.arange(16, dtype=np.uint8)
    np.testing.assert_array_equal(decode_e2m1(codes).view(np.uint32), expected.view(np.uint32))
    np.testing.assert_array_equal(encode_e2m1(decode_e2m1(codes)), codes)
    with pytest.raises(ValueError, match="read-only"):
        E2M1_VALUES[0] = 1


def test_low_nibble_is_even_k():
    assert pack_nibbles(np.array([[1, 2, 15, 0]], np.uint8)).tolist() == [[0x21, 0x0F]]
    assert unpack_nibbles(np.array([[0x21, 0x0F]], np.uint8)).tolist() == [[1, 2, 15, 0]]


@pytest.mark.parametrize("shape", [(256,), (0, 3), (2, 0), (2, 3, 5)])
def test_packing_round_trip(shape):
    packed = (np.arange(np.prod(shape)) % 256).astype(np.uint8).reshape(shape)
    codes = unpack_nibbles(packed)
    assert codes.shape == (*shape[:-1], 2 * shape[-1]) and codes.dtype == np.uint8
    np.testing.assert_array_equal(pack_nibbles(codes), packed)
