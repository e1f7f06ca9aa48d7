"""Reliability rows F: zeros, tiny scales, extremes, and the accuracy limits of section 4."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import pymoe
from tests import oracle, tolerance

BF16 = ml_dtypes.bfloat16
SCHEMES = ["fp8_w8a8", "fp8_w8a8_tensor", "fp8_w8a8_block", "fp8_w8a8_block_ue8m0", "int8_w8a8", "int8_w8a8_tensor",
           "int8_w8a8_block", "int4_w4a16", "int4_w4a16_zp", "mxfp8", "mxfp4", "nvfp4"]  # fmt: skip


def problem(M, K, width, E, topk, seed=0, dtype=np.float32, scale=1.0):
    """Random data with outputs of order 1."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((M, K)) * scale).astype(dtype)
    w1 = (rng.standard_normal((E, 2 * width, K)) / np.sqrt(K)).astype(dtype)
    w2 = (rng.standard_normal((E, K, width)) / np.sqrt(width) * 2).astype(dtype)
    ids = np.argsort(rng.random((M, E)), axis=1)[:, :topk]
    weights = rng.random((M, topk)).astype(np.float32)
    return x, w1, w2, weights / weights.sum(axis=1, keepdims=True), ids


def fast_layer(x, w1, w2, weights, ids, round_h=lambda h: h):
    """float64 with matrix products; checked against the loops below."""
    x, w1, w2 = (a.astype(np.float64) for a in (x, w1, w2))
    y = np.zeros((len(x), w2.shape[1]))
    width = w2.shape[2]
    for e in range(len(w1)):
        rows, slots = np.nonzero(ids == e)
        z = x[rows] @ w1[e].T
        h = round_h(z[:, :width] / (1 + np.exp(-z[:, :width])) * z[:, width:])
        np.add.at(y, rows, weights[rows, slots].astype(np.float64)[:, None] * (h @ w2[e].T))
    return y


def test_the_fast_reference_is_the_loops():
    given = problem(7, 16, 12, 4, 2)
    np.testing.assert_allclose(fast_layer(*given), oracle.layer(*given), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("K, width", [(128, 64), (512, 256), (2048, 128), (1000, 333)])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16])
def test_unquantized_layers_are_within_the_fused_limits(dtype, K, width):
    """The limits do not grow with K (finding 2)."""
    M = -(-100_000 // K)
    given = problem(M, K, width, 4, 2, dtype=dtype)
    y = pymoe.fused_experts(*given)
    expected = fast_layer(*given)
    tolerance.assert_fused(y, expected, K, width)
    if dtype != np.float32:
        ideal = fast_layer(*given, round_h=lambda h: h.astype(dtype).astype(np.float64)).astype(dtype)
        found = np.linalg.norm(y.astype(np.float64) - expected)
        assert found <= 1.2 * np.linalg.norm(ideal.astype(np.float64) - expected)


@pytest.mark.parametrize("kind", ["outliers", "student_t", "all_positive"])
def test_other_distributions_are_within_the_fused_limits(kind):
    x, w1, w2, weights, ids = problem(200, 512, 128, 4, 2, dtype=BF16)
    rng = np.random.default_rng(5)
    if kind == "outliers":
        x = x.copy()
        x[:, 17] *= 100
        w1 = (w1 / 8).astype(BF16)
    elif kind == "student_t":
        x = rng.standard_t(2, x.shape).astype(BF16)
    else:
        x, w1, w2 = np.abs(x), np.abs(w1) / np.asarray(16, BF16), np.abs(w2)
    given = (x, w1.astype(BF16), w2, weights, ids)
    limits = tolerance.fused("bfloat16", 512, 128)
    found = tolerance.errors(pymoe.fused_experts(*given), fast_layer(*given), "bfloat16")
    assert found.frobenius <= limits.frobenius and found.row <= limits.row and found.element <= limits.element


def test_a_zero_output_a_dropped_slot_and_a_short_sum_fail_the_limits():
    """Finding 1: what the field's own tolerance lets through."""
    given = problem(200, 512, 128, 4, 2, dtype=BF16)
    expected = fast_layer(*given)
    x, w1, w2, weights, ids = given
    lowest = weights.argmin(axis=1)[:, None]
    dropped = ids.copy()
    np.put_along_axis(dropped, lowest, -1, axis=1)
    short = w1.copy()
    short[:, :, -1] = 0
    for y in (
        np.zeros_like(x),
        pymoe.fused_experts(x, w1, w2, weights, dropped),
        pymoe.fused_experts(x, short, w2, weights, ids),
    ):
        with pytest.raises(AssertionError):
            tolerance.assert_fused(y, expected, 512, 128)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("zero", ["F1_a_row", "F1_a_group", "F1_everything", "F1_a_weight_row"])
def test_F1_F2_zero_blocks_give_zeros_not_nan(scheme, zero):
    x, w1, w2, weights, ids = problem(6, 256, 128, 3, 2)
    x, w1 = x.copy(), w1.copy()
    if zero == "F1_a_row":
        x[2] = 0
    elif zero == "F1_a_group":
        x[:, :128] = 0
    elif zero == "F1_everything":
        x[:] = 0
    else:
        w1[1, 5] = 0
    q1, q2, config = pymoe.quantize_experts(w1, w2, scheme)
    y = pymoe.fused_experts(x, q1, q2, weights, ids, quant_config=config)
    assert np.isfinite(y).all()
    assert not y[(x == 0).all(axis=1)].any()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_F3_dead_experts_with_tiny_scales_stay_finite(scheme):
    x, w1, w2, weights, ids = problem(6, 256, 128, 3, 2)
    q1, q2, config = pymoe.quantize_experts(w1 * np.float32(1e-23), w2, scheme)
    y = pymoe.fused_experts(x, q1, q2, weights, ids, quant_config=config)
    assert np.isfinite(y).all() and np.abs(y).max() < 1e-15


def test_F4_every_bf16_through_the_layers_own_quantizer_is_finite_or_nan_where_the_input_is():
    bits = np.arange(65536, dtype=np.uint16).view(BF16).reshape(512, 128)
    for key in ("kFp8DynamicTokenSym", "kFp8Dynamic128Sym", "kMxfp8Dynamic"):
        codes, scale = pymoe.quantize(bits, key)
        values = pymoe.dequantize(codes, scale, key)
        # mx poisons the group, token scales the row's own elements; nothing else may become NaN.
        nan_rows = np.isnan(bits.astype(np.float32)).any(axis=1)
        assert not np.isnan(values[~nan_rows]).any()
        # Within a rounding of the largest float32 a code may stand for 2^128, which float32 calls infinite.
        small = np.abs(bits.astype(np.float32)) < 2.0**127
        assert np.isfinite(values[~nan_rows][small[~nan_rows]]).all()


def test_F5_same_sign_operands_show_no_bias():
    """An accumulator of 14 bits would be off by 3.8e-3 at K = 4096."""
    rng = np.random.default_rng(0)
    K = 4096
    x = rng.random((24, K)).astype(np.float32) + 0.1
    w1 = rng.random((2, 2, K)).astype(np.float32) + 0.1
    q1, q2, config = pymoe.quantize_experts(w1, np.ones((2, K, 1), np.float32), "fp8_w8a8")
    from pymoe.codec.weights import WeightOperand
    from pymoe.ops import grouped_gemm
    from pymoe.ops.quantize import dequantize_activations, quantize_activations

    codes, scale = quantize_activations(x, config, "a1")
    operand = WeightOperand.from_quant_config(q1, config.w1, config, K)
    y = grouped_gemm(codes, operand, [0, 12, 24], a_scale=scale, a_key=config.activation_key).astype(np.float64)
    values = dequantize_activations(codes, scale, config).astype(np.float64)
    w = pymoe.dequantize(q1, config.w1.scale, config.weight_key).astype(np.float64)
    expected = np.concatenate([values[:12] @ w[0].T, values[12:] @ w[1].T])
    assert abs(((y - expected) / expected).mean()) <= 2.0**-20


@pytest.mark.parametrize("value", [1e-20, 1e-38, 1e-45])
def test_inputs_down_to_subnormals_give_no_nan(value):
    x, w1, w2, weights, ids = problem(6, 64, 32, 3, 2, dtype=BF16)
    y = pymoe.fused_experts((x.astype(np.float32) * np.float32(value)).astype(BF16), w1, w2, weights, ids)
    assert np.isfinite(y.astype(np.float32)).all()
