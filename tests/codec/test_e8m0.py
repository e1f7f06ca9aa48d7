"""e8m0 against exact powers of two."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest

from pymoe.codec.e8m0 import E8M0_VALUES, decode_e8m0, encode_e8m0_ceil, inverse_power
from tests.codec import definitions


def test_decode_of_all_256_codes():
    codes = np.arange(256, dtype=np.uint8)
    expected = np.array([2.0 ** (b - 127) for b in range(255)] + [math.nan])
    np.testing.assert_array_equal(decode_e8m0(codes), expected)
    np.testing.assert_array_equal(decode_e8m0(codes.view(ml_dtypes.float8_e8m0fnu)), expected)
    assert decode_e8m0(codes).dtype == np.float32
    with pytest.raises(ValueError, match="read-only"):
        E8M0_VALUES[0] = 1


def positive_floats():
    powers = np.array([2.0**n for n in range(-149, 128)], np.float32)
    near = [powers, np.nextafter(powers, np.float32(np.inf)), np.nextafter(powers, np.float32(0))]
    bits = np.random.default_rng(1).integers(1, 0x7F800000, 1 << 12, dtype=np.uint32)
    x = np.concatenate([*near, bits.view(np.float32)])
    return x[x > 0]


def test_ceil_is_the_smallest_power_that_is_at_least_x():
    x = positive_floats()
    expected = [min(max(definitions.power_at_least(v), -127), 127) + 127 for v in x]
    np.testing.assert_array_equal(encode_e8m0_ceil(x), expected)


def test_specials():
    assert encode_e8m0_ceil(np.array([0.0, np.inf, np.nan, -np.nan], np.float32)).tolist() == [0, 254, 255, 255]


def test_inverse_powers_are_exact():
    codes = np.arange(254, dtype=np.uint8)
    np.testing.assert_array_equal(inverse_power(codes).astype(np.float64) * decode_e8m0(codes), 1.0)
    assert np.isnan(inverse_power(np.array([255], np.uint8))).all()
