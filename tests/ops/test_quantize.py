"""quantize, dequantize and quantize_activations, bit for bit against a second definition (row F4 and section 3.2)."""

from __future__ import annotations

import doctest
import importlib

import ml_dtypes
import numpy as np
import pytest

import pymoe
from pymoe.ops.quantize import _matrices
from pymoe.ops.quantize import dequantize_activations as dequantize_stage
from pymoe.ops.quantize import quantize_activations as quantize_stage
from pymoe.quantization import QUANT_KEYS, FusedMoEQuantConfig
from pymoe.quantization.keys import make_key
from tests.codec import definitions
from tests.codec.definitions import F, fp8, int8
from tests.codec.keys import FORMS, NVFP4, SEED, by_groups, expected, nibble_rows, same_bits, special_rows, unpacked
from tests.ops import devices

quantize, dequantize, quantize_activations, dequantize_activations = map(
    devices.staged, (pymoe.quantize, pymoe.dequantize, quantize_stage, dequantize_stage)
)
BF16 = ml_dtypes.bfloat16


def test_every_key_has_a_second_definition():
    assert {*FORMS, *NVFP4} == set(QUANT_KEYS)


@pytest.fixture(params=devices.BACKENDS)
def backend(request, monkeypatch):
    """Every call of the test takes this backend."""
    if request.param in devices.ON_DEVICE:
        monkeypatch.setattr(devices, "current", request.param)
    else:
        kernels = _matrices.kernels
        monkeypatch.setattr(_matrices, "kernels", lambda _: kernels(request.param))
    return request.param


def all_bf16():
    return np.arange(1 << 16, dtype=np.uint16).view(BF16).reshape(256, 256)


def finite_bf16():
    """All finite values, shuffled with neighbours in size so that many groups have their own magnitude."""
    bits = np.arange(1 << 15, dtype=np.uint16)
    bits = bits[bits < 0x7F80]
    bits = np.concatenate([bits, bits | 0x8000]).reshape(2, -1, 32)
    rows = np.concatenate([bits[0], bits[1]], axis=1)  # 64 neighbours of both signs a row
    return rows.view(BF16)


def random_bits():
    bits = np.random.default_rng(SEED).integers(0, 1 << 32, (40, 160), dtype=np.uint32)
    bits[::2] &= 0xBFFFFFFF  # in every other row nothing is NaN or above 2
    return bits.view(np.float32)


def neighbours(values):
    values = np.asarray(values, np.float32)
    return np.concatenate([values, np.nextafter(values, np.float32(np.inf)), np.nextafter(values, np.float32(0))])


def edges_of_scales():
    """Groups whose largest magnitude lies where a scale's exponent steps, and one row of exact ties for integers."""
    amax = neighbours([m * 2.0**n for n in (-130, -118, -20, -1, 0, 9, 100) for m in (1.0, 1.5, 1.75)])
    x = np.random.default_rng(SEED).uniform(-1, 1, (len(amax) + 1, 64)).astype(np.float32) * np.append(amax, 1)[:, None]
    x[:-1, ::16] = amax[:, None]
    x[-1] = np.arange(64) - 31.5
    x[-1, ::16] = 127
    return x.astype(np.float32)


def tiny():
    """So small that every floor of a scale of the whole matrix takes effect."""
    return np.random.default_rng(SEED).standard_normal((6, 64)).astype(np.float32) * np.float32(2.0**-117)


INPUTS = {
    "edges of scales": edges_of_scales,
    "tiny": tiny,
    "all bf16": all_bf16,
    "finite bf16": finite_bf16,
    "special rows": special_rows,
    "random bits": random_bits,
    "normal with tails": lambda: np.random.default_rng(SEED).standard_normal((130, 160)).astype(np.float32),
    "float16": lambda: np.random.default_rng(SEED).standard_normal((6, 96)).astype(np.float16),
}


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("name", QUANT_KEYS)
def test_F4_codes_and_scales_bit_for_bit(name, inputs, backend):
    x = INPUTS[inputs]()
    with np.errstate(all="ignore"):
        wide = x.astype(np.float32)
    codes, scale = quantize(x, name)
    want = expected(name, wide)
    same_bits(unpacked(codes, name), want[0])
    if isinstance(scale, tuple):
        scale, second = scale
        if name.endswith("Asym"):
            second = second if not name.startswith("kInt4") else nibble_rows(second)
            same_bits(second, want[2])
    same_bits(scale.reshape(want[1].shape), want[1])


@pytest.mark.parametrize("group", [16, 32, 48, 128])
@pytest.mark.parametrize("name", ["kInt8Static", "kInt8StaticAsym", "kInt4Static", "kInt4StaticAsym"])
def test_groups_of_weight_only_integers(name, group, backend):
    x = np.random.default_rng(SEED).standard_normal((6, 160)).astype(np.float32)
    codes, scale = quantize(x, name, block_shape=(0, group))
    want = expected(name, x, group)
    same_bits(unpacked(codes, name), want[0])
    same_bits(scale[0] if isinstance(scale, tuple) else scale, want[1])
    values = dequantize(codes, scale, name, block_shape=(0, group))
    step = np.repeat(want[1], group, axis=1)[:, :160]
    # Half a step, and what clamping costs a symmetric group at its end: half a step more.
    assert (np.abs(values - x) <= step * 1.0001).all()


@pytest.mark.parametrize("block", [(128, 64), (32, 32), (1, 48)])
def test_block_shape_replaces_that_of_the_key(block, backend):
    x = np.random.default_rng(SEED).standard_normal((70, 160)).astype(np.float32)
    codes, scale = quantize(x, "kFp8Static128BlockSym", block_shape=block)
    want = by_groups(x, *block, lambda g: fp8(g, "block", static=True))
    same_bits(codes, want[0])
    same_bits(scale, want[1])
    tokens, scale = quantize(x, "kInt8Dynamic128Sym", block_shape=block)
    want = by_groups(x, 1, block[1], lambda g: int8(g, "block"))
    same_bits(tokens, want[0])
    same_bits(scale, want[1])
    np.testing.assert_array_equal(
        dequantize(tokens, scale, "kInt8Dynamic128Sym", block_shape=block),
        tokens * np.repeat(want[1], block[1], axis=1)[:, :160],
    )


@pytest.mark.parametrize("name", QUANT_KEYS)
def test_each_matrix_of_three_axes_is_quantized_for_itself(name, backend):
    x = np.random.default_rng(SEED).standard_normal((3, 130, 160)).astype(np.float32)
    x *= np.array([1, 10, 0.1], np.float32)[:, None, None]
    codes, scale = quantize(x, name)
    scales = scale if isinstance(scale, tuple) else (scale,)
    for e in range(3):
        one_codes, one_scale = quantize(x[e], name)
        np.testing.assert_array_equal(codes[e], one_codes)
        for all_of_them, one in zip(scales, one_scale if isinstance(one_scale, tuple) else (one_scale,), strict=True):
            np.testing.assert_array_equal(all_of_them[e], one if one.shape != (1,) else one[0])
    np.testing.assert_array_equal(dequantize(codes, scale, name)[1], dequantize(codes[1], one_of(scale, 1), name))


def one_of(scale, e):
    if isinstance(scale, tuple):
        return tuple(s[e : e + 1] if s.ndim == 1 else s[e] for s in scale)
    return scale[e : e + 1] if scale.ndim == 1 else scale[e]


SHAPES = {
    "kFp8DynamicTensorSym": ((1,), (2,)),
    "kFp8DynamicTokenSym": ((130, 1), (2, 130, 1)),
    "kFp8StaticChannelSym": ((130,), (2, 130)),
    "kFp8Dynamic128Sym": ((130, 2), (2, 130, 2)),
    "kFp8Static128BlockSym": ((2, 2), (2, 2, 2)),
    "kMxfp4Dynamic": ((130, 5), (2, 130, 5)),
    "kInt4Static": ((130, 1), (2, 130, 1)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_of_scales(name):
    x = np.ones((2, 130, 160), np.float32)
    assert (quantize(x[0], name)[1].shape, quantize(x, name)[1].shape) == SHAPES[name]


# -- given scales --


@pytest.mark.parametrize("scale", [0.37, 1e-3, 2.0**-126, 1e30])
def test_F4_static_scales_over_all_bf16(scale, backend):
    x = all_bf16()
    with np.errstate(all="ignore"):
        wide = x.astype(np.float32)
        y8 = wide * (F(1) / F(scale))
        y = np.rint(wide / F(scale))
    codes, back = quantize(x, "kFp8StaticTensorSym", scale=scale)
    same_bits(codes, definitions.e4m3(y8))
    assert back.tolist() == [F(scale)]
    codes, _ = quantize(x, "kInt8StaticTensorSym", scale=np.array([scale], np.float32))
    same_bits(codes, definitions.clamp_int(y, -128, 127))


def test_given_channel_and_block_scales(backend):
    rng = np.random.default_rng(SEED)
    x, channel = rng.standard_normal((2, 6, 160)).astype(np.float32), rng.random((2, 6)).astype(np.float32) + 0.1
    codes, back = quantize(x, "kFp8StaticChannelSym", scale=channel)
    same_bits(codes, definitions.e4m3(x / channel[..., None]))
    np.testing.assert_array_equal(back, channel)
    np.testing.assert_array_equal(quantize(x, "kFp8StaticChannelSym", scale=channel[..., None])[0], codes)
    block = rng.random((2, 1, 2)).astype(np.float32) + 0.1
    wide = np.repeat(block, 128, axis=2)[..., :160]
    codes, _ = quantize(x, "kInt8Static128BlockSym", scale=block)
    same_bits(codes, np.clip(np.rint(x / wide), -128, 127))
    powers = np.array([[[120, 130]], [[127, 90]]], np.uint8)
    codes, _ = quantize(x, "kFp8Static128BlockE8M0Sym", scale=powers)
    wide = np.repeat(2.0 ** (powers.astype(int) - 127), 128, axis=2)[..., :160]
    same_bits(codes, definitions.e4m3(x / wide))


@pytest.mark.parametrize("gscale", [1.0, 17.25, 1e-3])
def test_nvfp4_global_scale(gscale, backend):
    # Largest magnitudes around the midpoints of e4m3, where the order of the product and the division shows.
    middles = np.arange(8.5, 16) * np.array([[0.5], [1], [2], [4]])
    amax = neighbours(middles.ravel().astype(np.float32) * F(6) / F(gscale)).reshape(-1, 4)
    x = np.random.default_rng(SEED).uniform(-1, 1, (len(amax), 64)).astype(np.float32) * np.repeat(amax, 16, axis=1)
    x[:, ::16] = amax
    codes, (block, back) = quantize(x, "kNvfp4Dynamic", scale=gscale)
    want = expected("kNvfp4Dynamic", x, global_scale=F(gscale))
    same_bits(unpacked(codes, "kNvfp4Dynamic"), want[0])
    same_bits(block, want[1])
    assert back.tolist() == [F(gscale)]
    sf = np.array([definitions.e4m3_value(c) for c in block.ravel()], np.float32).reshape(block.shape)
    signed = np.array([*definitions.E2M1, *(-v for v in definitions.E2M1)], np.float32)
    exact = signed[want[0]] * np.repeat(sf, 16, axis=1)
    np.testing.assert_array_equal(dequantize(codes, (block, back), "kNvfp4Dynamic"), exact / F(gscale))
    np.testing.assert_array_equal(dequantize(codes, (block, back), "kNvfp4Static"), exact * F(gscale))
    np.testing.assert_array_equal(dequantize(codes, block, "kNvfp4Static"), exact)
    config = FusedMoEQuantConfig.nvfp4(
        w1_scale=block[None], w2_scale=block[None], w1_scale_2=back, w2_scale_2=back, a1_gscale=back, a2_gscale=back
    )
    a_codes, a_scale = quantize_activations(x, config)
    np.testing.assert_array_equal(a_codes, codes)
    np.testing.assert_array_equal(a_scale, sf / F(gscale))
    values = signed[want[0]] * np.repeat(sf / F(gscale), 16, axis=1)
    np.testing.assert_array_equal(dequantize_activations(a_codes, a_scale, config), values)
    codes, (block, back) = quantize(x, "kNvfp4Static", scale=gscale)
    want = expected("kNvfp4Static", x, global_scale=F(gscale))
    same_bits(unpacked(codes, "kNvfp4Static"), want[0])
    same_bits(block, want[1])


def test_a_key_of_ones_own_group():
    key = make_key("fp8", "float32", False, (1, 48))
    x = np.random.default_rng(SEED).standard_normal((3, 100)).astype(np.float32)
    codes, scale = quantize(x, key)
    want = by_groups(x, 1, 48, lambda g: fp8(g, "block"))
    same_bits(codes, want[0])
    same_bits(scale, want[1])


# -- codes to values --


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_dequantize_rounds_once(dtype):
    codes = np.arange(256, dtype=np.uint8).reshape(2, 128)
    scale = np.array([[0.3], [7.7]], np.float32)
    exact = np.array([definitions.e4m3_value(c) for c in range(256)], np.float32).reshape(2, 128) * scale
    values = dequantize(codes, scale, "kFp8DynamicTokenSym", dtype=dtype)
    assert values.dtype.name == dtype
    same_bits(values.astype(np.float64), exact.astype(values.dtype).astype(np.float64))


def test_dequantize_takes_float8_codes_and_e8m0_scales():
    x = np.random.default_rng(SEED).standard_normal((3, 64)).astype(np.float32)
    codes, scale = quantize(x, "kMxfp8Dynamic")
    narrow = dequantize(codes.view(ml_dtypes.float8_e4m3fn), scale.view(ml_dtypes.float8_e8m0fnu), "kMxfp8Dynamic")
    np.testing.assert_array_equal(narrow, dequantize(codes, scale, "kMxfp8Dynamic"))


@pytest.mark.parametrize("name", ["kInt4StaticAsym", "kInt8StaticAsym"])
def test_zero_points_as_keyword_or_second_of_a_pair(name):
    x = np.random.default_rng(SEED).random((2, 4, 64)).astype(np.float32)
    codes, (scale, zp) = quantize(x, name, block_shape=(0, 32))
    values = dequantize(codes, (scale, zp), name)
    np.testing.assert_array_equal(dequantize(codes, scale, name, zp=zp), values)
    # One step of 1 / 15 or 1 / 255 of a range below 1, rounded to nearest in codes and zero point.
    assert np.abs(values - x).max() <= 1.0001 / (15 if "Int4" in name else 255)


@pytest.mark.parametrize("module", ["pymoe.ops.quantize", "pymoe.ops.quantize.schemes"])
def test_examples_in_the_docstrings(module):
    found = doctest.testmod(importlib.import_module(module))
    assert found.attempted and not found.failed
