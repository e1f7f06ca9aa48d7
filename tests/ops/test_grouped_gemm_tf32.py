"""TF32 products of float32: asked for by name, within their error limits, and refused by name elsewhere."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import pymoe
from pymoe import FusedMoEQuantConfig, ops
from pymoe.codec.weights import WeightOperand
from pymoe.config import FusedMoEConfig
from pymoe.contracts import FusedMoEActivationFormat
from pymoe.errors import ArgumentError, DTypeError, UnsupportedError
from pymoe.quantization import kTf32
from tests.ops.test_grouped_gemm import integers, loops, offsets_for
from tests.ops.test_grouped_gemm_cuda import TILE_ROWS, bits, device, multiply  # noqa: F401  a fixture

TF32 = FusedMoEQuantConfig.tf32()
E, N, P = 3, 72, 150


def tf32(x):
    """Return float32 rounded to 10 bits of fraction, ties away from zero."""
    return ((x.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


def operand(w):
    return WeightOperand.from_quant_config(w, TF32.w1, TF32, w.shape[2])


def problem(K):
    rng = np.random.default_rng(K)
    return rng.standard_normal((P, K), np.float32), rng.standard_normal((E, N, K), np.float32), offsets_for(E, P)


@pytest.mark.parametrize("K", [4, 96, 260])
def test_sums_are_those_of_rounded_operands(device, K):  # noqa: F811
    """Float32 sums of exact products of rounded operands; so at most 2^-10 of the sum of magnitudes off float32's."""
    a, w, offsets = problem(K)
    answers = [multiply(device, a, operand(w), offsets, tile_rows=rows) for rows in TILE_ROWS]
    magnitude = loops(np.abs(a), np.abs(w), offsets)
    error = np.abs(answers[0] - loops(tf32(a), tf32(w), offsets))
    assert (error <= magnitude * 2.0**-20).all()
    off_float32 = np.abs(answers[0] - loops(a, w, offsets))
    assert (off_float32 <= magnitude * 2.0**-10).all()
    assert off_float32.max() > magnitude.max() * 2.0**-18  # they are rounded
    for other in answers[1:]:
        np.testing.assert_array_equal(bits(other), bits(answers[0]))


def test_rows_that_are_no_pieces_of_sixteen_bytes_are_multiplied_exactly(device):  # noqa: F811
    a, w, offsets = problem(90)
    exact = multiply(device, a, WeightOperand.unquantized(w), offsets)
    np.testing.assert_array_equal(bits(multiply(device, a, operand(w), offsets)), bits(exact))


def test_small_integers_are_exact_and_nan_stays_in_its_row(device):  # noqa: F811
    w, a, offsets = integers((E, N, 64), 1), integers((P, 64), 2), offsets_for(E, P)
    expected = loops(a, w, offsets)
    a[7, 5], a[9, 63] = np.nan, np.inf
    w[:, :, 63] = 1
    expected = loops(np.where(np.isfinite(a), a, 0), w, offsets)
    y = multiply(device, a, operand(w), offsets)
    assert np.isnan(y[7]).all() and (y[9] == np.inf).all()
    keep = ~np.isin(np.arange(P), (7, 9))
    np.testing.assert_array_equal(y[keep], expected[keep])


def test_bias_and_scheme_have_the_config_s_names():
    config = FusedMoEQuantConfig.tf32(w1_bias=np.ones((E, N)), w2_bias=np.ones((E, 64)))
    assert config.weight_key == kTf32 and kTf32.name == "kTf32" and config.activation_key is None
    assert pymoe.FusedMoEQuantConfig().weight_key is None  # nobody gets it unasked
    with pytest.raises(ArgumentError, match="w1_scale must be None for tf32"):
        FusedMoEQuantConfig.tf32(w1_scale=np.ones(E), w2_scale=np.ones(E))
    with pytest.raises(ArgumentError, match="block_shape must be None for tf32"):
        FusedMoEQuantConfig.tf32(block_shape=(128, 128))
    with pytest.raises(UnsupportedError, match="for tf32 weights"):
        FusedMoEQuantConfig.make("fp8", "tf32")


def test_hosts_and_other_dtypes_refuse_it_by_name():
    w1, w2, x = np.zeros((E, 8, 4), np.float32), np.zeros((E, 4, 4), np.float32), np.zeros((2, 4), np.float32)
    ids, weights = np.zeros((2, 1), np.int32), np.ones((2, 1), np.float32)
    with pytest.raises(UnsupportedError, match="kTf32"):
        pymoe.fused_experts(x, w1, w2, weights, ids, quant_config=TF32)
    with pytest.raises(UnsupportedError, match="w.key must be another for NumPy arrays; got kTf32"):
        ops.grouped_gemm(x, operand(w1), [0, 1, 1, 2])
    half = (w.astype(np.float16) for w in (w1, w2))
    with pytest.raises(DTypeError, match="w1 must have dtype float32 for tf32 weights"):
        pymoe.fused_experts(x, *half, weights, ids, quant_config=TF32)


def test_tokens_of_another_dtype_are_refused_before_any_launch():
    from pymoe.experts.cuda_grouped import CudaGroupedExperts

    class Here(CudaGroupedExperts):
        _supports_current_device = staticmethod(lambda: True)

    for dtype, expected in ((np.float32, True), (ml_dtypes.bfloat16, False)):
        config = FusedMoEConfig(E, 1, 4, 4, E, in_dtype=np.dtype(dtype), device="cuda", routing=pymoe.RoutingConfig(1))
        found, why = Here.is_supported_config(config, kTf32, None, FusedMoEActivationFormat.Standard)
        assert found is expected and (expected or "kTf32 with tokens of dtype bfloat16" in why)


def test_the_gemm_refuses_rows_of_another_dtype(device):  # noqa: F811
    a, w, offsets = problem(4)
    with pytest.raises(DTypeError, match="a must be float32 for weights of kTf32; got float16"):
        multiply(device, a.astype(np.float16), operand(w), offsets)


@pytest.mark.gpu
def test_a_layer_of_it_stays_near_float32(cuda):
    rng = cuda.random.default_rng(0)
    w1, w2, x = ((rng.standard_normal(s, np.float32) / 8) for s in ((8, 128, 64), (8, 64, 64), (40, 64)))
    logits = rng.standard_normal((40, 8), np.float32)
    exact = pymoe.MoELayer(w1, w2, topk=2)(x, router_logits=logits).get()
    rounded = pymoe.MoELayer(w1, w2, topk=2, quant_config=TF32)(x, router_logits=logits).get()
    error = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    assert 2.0**-16 < error < 2.0**-9
    with pytest.raises(UnsupportedError, match="kTf32 with tokens of dtype"):
        pymoe.MoELayer(w1, w2, topk=2, quant_config=TF32)(x.astype(np.float16), router_logits=logits)
