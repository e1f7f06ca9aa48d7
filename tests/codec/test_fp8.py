"""e4m3fn against a table of exact midpoints (rows F4 and O-series of the quantizers: all inputs, bit for bit)."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from pymoe.codec.fp8 import E4M3_VALUES, decode_e4m3, encode_e4m3
from tests.codec import definitions


def float32_inputs(kind):
    if kind in ("bfloat16", "float16"):
        every = np.arange(1 << 16, dtype=np.uint16)
        return every.view(ml_dtypes.bfloat16 if kind == "bfloat16" else np.float16).astype(np.float32)
    if kind == "random bits":
        return np.random.default_rng(0).integers(0, 1 << 32, 1 << 18, dtype=np.uint32).view(np.float32)
    values = np.array(definitions.E4M3)
    edges = np.concatenate([values, (values[1:] + values[:-1]) / 2, [464.0, 480.0]]).astype(np.float32)
    edges = np.concatenate([edges, np.nextafter(edges, np.float32(np.inf)), np.nextafter(edges, np.float32(-1))])
    return np.concatenate([edges, -edges])


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "random bits", "edges"])
def test_F4_encode_is_nearest_even_and_saturates(kind):
    x = float32_inputs(kind)
    np.testing.assert_array_equal(encode_e4m3(x), definitions.e4m3(x))


def test_F4_decode_of_all_256_codes():
    codes = np.arange(256, dtype=np.uint8)
    expected = np.array([definitions.e4m3_value(code) for code in range(256)], np.float32)
    np.testing.assert_array_equal(decode_e4m3(codes), expected)
    np.testing.assert_array_equal(np.signbit(decode_e4m3(codes[[0x80, 0]])), [True, False])
    np.testing.assert_array_equal(decode_e4m3(codes.view(ml_dtypes.float8_e4m3fn)), expected)


def test_codes_survive_a_round_trip():
    codes = np.arange(256, dtype=np.uint8)
    numbers = (codes & 0x7F) != 0x7F
    np.testing.assert_array_equal(encode_e4m3(decode_e4m3(codes))[numbers], codes[numbers])


def test_F4_specials():
    x = np.array([np.nan, -np.nan, np.inf, -np.inf, 449, 1e30, -0.0, -1e-30], np.float32)
    assert encode_e4m3(x).tolist() == [0x7F, 0x7F, 0x7E, 0xFE, 0x7E, 0x7E, 0x80, 0x80]


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (3, 4)])
def test_shapes(shape):
    x = np.ones(shape, np.float32)
    codes = encode_e4m3(x)
    assert codes.shape == shape and codes.dtype == np.uint8
    assert decode_e4m3(codes).shape == shape


def test_inputs_are_left_alone_and_the_table_is_read_only():
    x = np.array([1e9, np.nan], np.float32)
    kept = x.copy()
    encode_e4m3(x)
    np.testing.assert_array_equal(x, kept)
    with pytest.raises(ValueError, match="read-only"):
        E4M3_VALUES[0] = 1
