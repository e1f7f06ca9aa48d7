"""quantize_experts: every scheme's arrays, config and errors; values against `quantize`, matrix by matrix."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import pymoe
from pymoe import checks, quantize_experts
from pymoe.errors import ArgumentError, DTypeError, ShapeError
from pymoe.ops.quantize.schemes import ALIASES, CASTS, SCHEMES
from pymoe.quantization import FUSED_MOE_UNQUANTIZED_CONFIG, QUANT_KEYS, FusedMoEQuantConfig
from tests.codec.keys import SEED

E, N, K, WIDTH = 3, 192, 160, 96
# Scheme: (weight key, activation key, shape and dtype of w1_scale), E, N, K as above.
TABLE = {
    "fp8_w8a8": ("kFp8StaticChannelSym", "kFp8DynamicTokenSym", (E, N), "float32"),
    "fp8_w8a8_tensor": ("kFp8StaticTensorSym", "kFp8DynamicTensorSym", (E,), "float32"),
    "fp8_w8a8_tensor_token": ("kFp8StaticTensorSym", "kFp8DynamicTokenSym", (E,), "float32"),
    "fp8_w8a8_block": ("kFp8Static128BlockSym", "kFp8Dynamic128Sym", (E, 2, 2), "float32"),
    "fp8_w8a8_block_ue8m0": ("kFp8Static128BlockE8M0Sym", "kFp8Dynamic128E8M0Sym", (E, 2, 2), "uint8"),
    "fp8_w8a16": ("kFp8StaticChannelSym", None, (E, N), "float32"),
    "int8_w8a8": ("kInt8StaticChannelSym", "kInt8DynamicTokenSym", (E, N), "float32"),
    "int8_w8a8_tensor": ("kInt8StaticTensorSym", "kInt8DynamicTensorSym", (E,), "float32"),
    "int8_w8a8_block": ("kInt8Static128BlockSym", "kInt8Dynamic128Sym", (E, 2, 2), "float32"),
    "int8_w8a16": ("kInt8Static", None, (E, N, 1), "float32"),
    "int8_w8a16_zp": ("kInt8StaticAsym", None, (E, N, 1), "float32"),
    "int4_w4a16": ("kInt4Static", None, (E, N, 2), "float32"),
    "int4_w4a16_zp": ("kInt4StaticAsym", None, (E, N, 2), "float32"),
    "mxfp8": ("kMxfp8Static", "kMxfp8Dynamic", (E, N, 5), "uint8"),
    "mxfp8_w8a16": ("kMxfp8Static", None, (E, N, 5), "uint8"),
    "mxfp4": ("kMxfp4Static", "kMxfp4Dynamic", (E, N, 5), "uint8"),
    "mxfp4_w4a16": ("kMxfp4Static", None, (E, N, 5), "uint8"),
    "mxfp4_mxfp8": ("kMxfp4Static", "kMxfp8Dynamic", (E, N, 5), "uint8"),
    "nvfp4": ("kNvfp4Static", "kNvfp4Dynamic", (E, N, 10), "uint8"),
    "nvfp4_w4a16": ("kNvfp4Static", None, (E, N, 10), "uint8"),
}
GROUPED = [name for name, scheme in SCHEMES.items() if scheme.group is not None]


def weights(dtype=np.float32):
    rng = np.random.default_rng(SEED)
    w1, w2 = rng.standard_normal((E, N, K)), rng.standard_normal((E, K, WIDTH)) * 0.1
    return w1.astype(dtype), w2.astype(dtype)


def name_of(key):
    return None if key is None else key.name


def test_the_table_is_whole():
    methods = {"fp8_w8a8", "fp8_w8a16", "int8_w8a8", "int8_w8a16", "int4_w4a16", "mxfp8", "mxfp4_w4a16", "mxfp4",
               "mxfp4_mxfp8", "nvfp4", "nvfp4_w4a16"}  # fmt: skip
    assert set(TABLE) == set(SCHEMES) >= methods
    assert all(hasattr(FusedMoEQuantConfig, name) for name in methods)


@pytest.mark.parametrize("scheme", TABLE)
def test_keys_shapes_and_dtypes(scheme):
    weight_key, activation_key, scale_shape, scale_dtype = TABLE[scheme]
    w1, w2 = weights()
    w1q, w2q, config = quantize_experts(w1, w2, scheme)
    if "int4" in scheme:  # this key carries the group length, which the constant leaves open
        assert (config.weight_key.dtype, config.w1.shape) == (QUANT_KEYS[weight_key].dtype, (1, 128))
    else:
        assert config.weight_key.name == weight_key
    per_byte = 2 if config.weight_key.is_packed else 1
    assert (w1q.shape, w2q.shape) == ((E, N, K // per_byte), (E, K, WIDTH // per_byte))
    assert w1q.dtype == w2q.dtype == ("int8" if scheme.startswith("int8_w8a8") else "uint8")
    assert config.w1.scale.shape == scale_shape and config.w1.scale.dtype == config.w2.scale.dtype == scale_dtype
    assert name_of(config.activation_key) == activation_key
    assert not config.is_static and config.w1.bias is None
    # The checks of a call accept every array as it is.
    checked = checks.quant_config("fused_experts", config, w1, N, K, WIDTH)
    for name in ("w1", "w2"):
        for part in ("scale", "scale_2", "zp"):
            given, taken = getattr(getattr(config, name), part), getattr(getattr(checked, name), part)
            assert (given is None) == (taken is None)
            assert given is None or (given.dtype == taken.dtype and (given == taken).all())


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("scheme", TABLE)
def test_arrays_are_those_of_the_key(scheme, dtype):
    w1, w2 = weights(dtype)
    w1q, w2q, config = quantize_experts(w1, w2, scheme)
    key = TABLE[scheme][0]
    block = (0, 128) if "int4" in scheme else None
    for w, q, desc in ((w1, w1q, config.w1), (w2, w2q, config.w2)):
        codes, scale = pymoe.quantize(w, key, block_shape=block)
        np.testing.assert_array_equal(q, codes)
        if isinstance(scale, tuple):
            scale, second = scale
            np.testing.assert_array_equal(desc.zp if desc.zp is not None else desc.scale_2, second)
        np.testing.assert_array_equal(desc.scale, scale)


# Largest error of an element over its expert's largest magnitude, from the format: half a step of the widest gap
# (fp8: 32 of 448, e2m1: 2 of 6, halved), a whole step where a symmetric code clips at its end, twice that for a
# power-of-two scale, and 1/16 of a step for an e4m3 scale.
LIMITS = {
    "fp8": 16 / 448, "int8": 0.5 / 127, "int8_w8a16": 1 / 127, "int4": 1 / 7, "mxfp8": 2 * 16 / 448,
    "mxfp4": 1 / 4, "nvfp4": 1 / 6 * 17 / 16,
}  # fmt: skip


@pytest.mark.parametrize("scheme", TABLE)
def test_values_are_near_the_weights(scheme):
    w1, w2 = weights()
    w1q, w2q, config = quantize_experts(w1, w2, scheme)
    limit = next(value for name, value in sorted(LIMITS.items(), reverse=True) if scheme.startswith(name))
    limit *= 2 if "ue8m0" in scheme else 1
    for w, q, desc in ((w1, w1q, config.w1), (w2, w2q, config.w2)):
        scale = desc.scale if desc.scale_2 is None else (desc.scale, desc.scale_2)
        block = (0, 128) if "int4" in scheme else None
        values = pymoe.dequantize(q, scale, TABLE[scheme][0], zp=desc.zp, block_shape=block)
        assert np.abs(values - w).max() <= limit * np.abs(w).max() * 1.0001


@pytest.mark.parametrize("group", [32, 64, 128, -1])
@pytest.mark.parametrize("scheme", ["int4_w4a16", "int4_w4a16_zp", "int8_w8a16", "int8_w8a16_zp"])
def test_groups_of_weight_only_integers(scheme, group):
    w1, w2 = weights()
    _, _, config = quantize_experts(w1, w2, scheme, group_size=group)
    groups = [1 if group == -1 else -(-columns // group) for columns in (K, WIDTH)]
    assert config.w1.scale.shape == (E, N, groups[0]) and config.w2.scale.shape == (E, K, groups[1])
    assert config.block_shape == (None if group == -1 else (0, group))
    if scheme.endswith("zp"):
        halves = 2 if scheme.startswith("int4") else 1
        assert config.w1.zp.shape == (E, N // halves, groups[0]) and config.w2.zp.dtype == np.uint8
    checks.quant_config("fused_experts", config, w1, N, K, WIDTH)


def test_zero_points_are_packed_along_n():
    w = np.zeros((1, 4, 2), np.float32)
    w[0, :, 0], w[0, :, 1] = [0, -3, -15, -7.5], [15, 12, 0, 7.5]
    _, _, config = quantize_experts(w, np.zeros((1, 2, 4), np.float32), "int4_w4a16_zp", group_size=-1)
    # Zero points 0, 3, 15 and 8 (7.5 to the even neighbour), the even row in the low nibble.
    assert config.w1.zp.tolist() == [[[0x30], [0x8F]]]


@pytest.mark.parametrize("scheme", ["fp8_w8a8_block", "fp8_w8a8_block_ue8m0", "int8_w8a8_block"])
def test_size_of_square_blocks(scheme):
    w1, w2 = weights()
    _, _, config = quantize_experts(w1, w2, scheme, group_size=64)
    assert config.block_shape == (64, 64) and config.w1.scale.shape == (E, 3, 3)
    assert config.a1.shape == (1, 64)


@pytest.mark.parametrize("alias", ALIASES)
def test_aliases(alias):
    w1, w2 = weights()
    for got, want in zip(
        quantize_experts(w1, w2, alias)[:2], quantize_experts(w1, w2, ALIASES[alias])[:2], strict=True
    ):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("name", CASTS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_casts_are_copies(name, dtype):
    w1, w2 = weights(dtype)
    w1q, w2q, config = quantize_experts(w1, w2, name)
    assert w1q.dtype == w2q.dtype == CASTS[name] and config == FUSED_MOE_UNQUANTIZED_CONFIG
    assert not np.shares_memory(w1q, w1) and not np.shares_memory(w2q, w2)
    np.testing.assert_array_equal(w1q, w1.astype(CASTS[name]))


@pytest.mark.parametrize("scheme", TABLE)
def test_zero_weights_and_no_experts(scheme):
    w1, w2 = np.zeros((2, 4, 32), np.float32), np.zeros((2, 32, 32), np.float32)
    w1q, w2q, config = quantize_experts(w1, w2, scheme)
    zero = {"uint8b128": 128, "uint4b8": 0x88}.get(config.weight_key.dtype, 0)
    assert (w1q == zero).all() and (w2q == zero).all()
    if config.w1.scale.dtype == np.float32:
        assert (config.w1.scale > 0).all() and np.isfinite(config.w1.scale).all()
    w1q, w2q, config = quantize_experts(w1[:0], w2[:0], scheme)
    assert w1q.shape[0] == 0 and config.w1.scale.shape[0] == 0
    checks.quant_config("fused_experts", config, w1[:0], 4, 32, 32)


def test_inputs_are_left_alone():
    w1, w2 = weights()
    kept = w1.copy(), w2.copy()
    w1.setflags(write=False)
    for scheme in TABLE:
        quantize_experts(w1, w2, scheme)
    np.testing.assert_array_equal(w1, kept[0])
    np.testing.assert_array_equal(w2, kept[1])


def test_nan_and_infinity_stay_in_their_group():
    w1, w2 = weights()
    bad = w1.copy()
    bad[1, 5, 40] = np.nan
    for scheme, (key, *_) in TABLE.items():
        good_q, _, good = quantize_experts(w1, w2, scheme)
        bad_q, _, config = quantize_experts(bad, w2, scheme)
        for e in (0, 2):
            np.testing.assert_array_equal(bad_q[e], good_q[e], err_msg=f"{scheme} {key}")
            np.testing.assert_array_equal(config.w1.scale[e], good.w1.scale[e])
    bad[1, 5, 40] = np.inf
    for scheme in ("fp8_w8a8", "int8_w8a8_tensor", "int4_w4a16_zp"):
        assert np.isfinite(quantize_experts(bad, w2, scheme)[2].w1.scale).all()


ERRORS = {
    "scheme": ((N, K, WIDTH), "fp7", {}, ArgumentError, "scheme must be one of fp8_w8a8, .*got 'fp7'"),
    "scheme of no kind": ((N, K, WIDTH), 8, {}, ArgumentError, "scheme must be one of .*got 8"),
    "group of a channel": ((N, K, WIDTH), "fp8_w8a8", {"group_size": 32}, ArgumentError, "group_size must be None for"),
    "group of a cast": ((N, K, WIDTH), "bf16", {"group_size": 32}, ArgumentError, "group_size must be None for bf16"),
    "group of 0": (
        (N, K, WIDTH),
        "int4",
        {"group_size": 0},
        ArgumentError,
        "group_size must be -1 or .*; got 0",
    ),
    "whole blocks": (
        (N, K, WIDTH),
        "fp8_w8a8_block",
        {"group_size": -1},
        ArgumentError,
        "group_size must be at least 1",
    ),
    "group of a float": ((N, K, WIDTH), "int4", {"group_size": 32.0}, DTypeError, "group_size must be an integer"),
    "mx columns": ((N, 48, WIDTH), "mxfp8", {}, ShapeError, "w1 must have a multiple of 32 columns.*got 48"),
    "mx columns of w2": ((N, K, 48), "mxfp4", {}, ShapeError, "w2 must have a multiple of 32 columns.*got 48"),
    "nvfp4 columns": ((N, 40, WIDTH), "nvfp4", {}, ShapeError, "w1 must have a multiple of 16 columns.*got 40"),
    "odd columns": ((N, 7, WIDTH), "int4", {}, ShapeError, "w1 must have a multiple of 2 columns.*got 7"),
    "odd rows of zero points": ((5, K, WIDTH), "int4_w4a16_zp", {}, ShapeError, "w1 must have an even number of rows"),
    "no columns": ((N, K, 0), "fp8", {}, ShapeError, "w2 must have rows and columns"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_argument_rule_and_value(case):
    (rows, columns, width), scheme, options, kind, text = ERRORS[case]
    w1, w2 = np.ones((1, rows, columns), np.float32), np.ones((1, columns, width), np.float32)
    with pytest.raises(kind, match=f"^quantize_experts: {text}"):
        quantize_experts(w1, w2, scheme, **options)


def test_weights_that_do_not_belong_together():
    w1, w2 = weights()
    for bad, kind, text in (
        ((w1[0], w2), ShapeError, "w1 must have shape"),
        ((w1, w2[:2]), ShapeError, "w2 must have shape"),
        ((w1, w2.astype(np.float16)), DTypeError, "w2 must have the dtype of w1"),
        ((w1.astype(np.int8), w2), DTypeError, "w1 must have a floating dtype"),
        ((w1.tolist(), w2), DTypeError, "w1 must be a NumPy, CuPy or DLPack array; got list"),
    ):
        with pytest.raises(kind, match=text):
            quantize_experts(*bad, "fp8")


def test_the_numerics_page_knows_every_scheme_and_key():
    page = (Path(__file__).parents[2] / "docs" / "numerics.md").read_text()
    missing = [name for name in (*SCHEMES, *ALIASES, *CASTS, *QUANT_KEYS) if f"`{name}`" not in page]
    assert not missing
