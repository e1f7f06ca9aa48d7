"""Every pair of experts and prepare/finalize against the plain definition and against each other, in every scheme."""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np
import pytest

import pymoe
from pymoe import (
    BatchedPrepareAndFinalize,
    CpuExperts,
    CpuMonolithicExperts,
    FusedMoEKernel,
    NaiveBatchedExperts,
    NumpyReferenceExperts,
    RoutingConfig,
    SingleProcessAsyncPrepareAndFinalize,
    SingleProcessMonolithicPrepareAndFinalize,
    SingleProcessPrepareAndFinalize,
)
from pymoe.codec.weights import WeightOperand
from pymoe.config import FusedMoEConfig, resolve_activation
from pymoe.ops import grouped_gemm
from pymoe.quantization import FUSED_MOE_UNQUANTIZED_CONFIG

BF16 = ml_dtypes.bfloat16
SCHEMES = [
    "fp32", "fp8_w8a8", "fp8_w8a8_tensor", "fp8_w8a8_tensor_token", "fp8_w8a8_block", "fp8_w8a8_block_ue8m0",
    "fp8_w8a16", "int8_w8a8", "int8_w8a8_tensor", "int8_w8a8_block", "int8_w8a16", "int8_w8a16_zp", "int4_w4a16",
    "int4_w4a16_zp", "mxfp8", "mxfp8_w8a16", "mxfp4", "mxfp4_w4a16", "mxfp4_mxfp8", "nvfp4", "nvfp4_w4a16",
]  # fmt: skip
E, K, WIDTH, TOPK, M = 5, 64, 32, 3, 11


@dataclasses.dataclass
class Problem:
    x: np.ndarray
    w1: np.ndarray
    w2: np.ndarray
    scale: np.ndarray
    ids: np.ndarray
    quant_config: object
    activation: object

    def config(self, **options):
        return FusedMoEConfig(
            num_experts=E,
            experts_per_token=self.ids.shape[1],
            hidden_dim=K,
            intermediate_size_per_partition=self.activation.width(self.w1.shape[1]),
            num_local_experts=E,
            activation=self.activation,
            in_dtype=self.x.dtype,
            max_num_tokens=16,
            **options,
        )

    def run(self, experts, prepare_finalize, **options):
        kernel = FusedMoEKernel(prepare_finalize, experts, chunk_size=options.pop("chunk_size", None))
        return kernel.apply(
            self.x, self.w1, self.w2, topk_weights=self.scale, topk_ids=self.ids, activation=self.activation, **options
        )


def problem(scheme="fp32", activation="silu", dtype=np.float32, topk=TOPK, biases=False, seed=0):
    rng = np.random.default_rng(seed)
    act = resolve_activation("test", activation, FUSED_MOE_UNQUANTIZED_CONFIG)
    N = WIDTH * (2 if act.is_gated else 1)
    w1 = (rng.standard_normal((E, N, K)) / 8).astype(np.float32)
    w2 = (rng.standard_normal((E, K, WIDTH)) / 6).astype(np.float32)
    if scheme == "fp32":
        config = FUSED_MOE_UNQUANTIZED_CONFIG
        w1, w2 = w1.astype(dtype), w2.astype(dtype)
    else:
        w1, w2, config = pymoe.quantize_experts(w1, w2, scheme)
    if biases:
        b1, b2 = rng.standard_normal((E, N)).astype(np.float32), rng.standard_normal((E, K)).astype(np.float32)
        config = dataclasses.replace(
            config, w1=dataclasses.replace(config.w1, bias=b1), w2=dataclasses.replace(config.w2, bias=b2)
        )
    x = rng.standard_normal((M, K)).astype(dtype)
    ids = rng.integers(-1, E, (M, topk)).astype(np.int32)
    return Problem(x, w1, w2, rng.random((M, topk)).astype(np.float32), ids, config, act)


def standard(p, cls=CpuExperts, **options):
    return p.run(cls(p.config(), p.quant_config), SingleProcessPrepareAndFinalize(), **options)


def close(scheme, y, expected):
    """Fused values of two backends: bf16 and fp32 accumulate alike, a code of `a2` may flip where h is on an edge."""
    spread = np.abs(expected).max()
    exact = scheme in ("fp32",) or scheme.endswith(("a16", "a16_zp"))
    np.testing.assert_allclose(y, expected, rtol=0, atol=spread * (2e-6 if exact else 3e-2))


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_cpu_experts_agree_with_the_definition(scheme, biases):
    p = problem(scheme, biases=biases)
    y = standard(p)
    assert y.shape == p.x.shape and y.dtype == p.x.dtype and np.isfinite(y).all()
    close(scheme, y, standard(p, NumpyReferenceExperts))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_batched_equals_standard_bit_for_bit(scheme):
    p = problem(scheme)
    experts = NaiveBatchedExperts(p.config(), p.quant_config, 16, 2)
    y = p.run(experts, BatchedPrepareAndFinalize(16, E, num_dispatchers=2))
    np.testing.assert_array_equal(y, standard(p))


@pytest.mark.parametrize("hook", [True, False])
@pytest.mark.parametrize("scheme", ["fp32", "fp8_w8a8", "int8_w8a8_tensor"])
def test_async_equals_sync_bit_for_bit(scheme, hook):
    p = problem(scheme)
    y = p.run(CpuExperts(p.config(), p.quant_config), SingleProcessAsyncPrepareAndFinalize(hook))
    np.testing.assert_array_equal(y, standard(p))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("on_input", [False, True])
def test_monolithic_equals_modular_bit_for_bit(scheme, on_input):
    routing = RoutingConfig(1 if on_input else TOPK, routing_method="Sigmoid")
    p = problem(scheme, topk=routing.topk)
    logits = np.random.default_rng(5).standard_normal((M, E)).astype(np.float32)
    p.scale, p.ids = pymoe.select_experts(logits, routing.topk, routing_method="Sigmoid")
    experts = CpuMonolithicExperts(p.config(routing=routing), p.quant_config)
    kernel = FusedMoEKernel(SingleProcessMonolithicPrepareAndFinalize(), experts)
    y = kernel.apply_monolithic(
        p.x, p.w1, p.w2, router_logits=logits, activation=p.activation, apply_router_weight_on_input=on_input
    )
    np.testing.assert_array_equal(y, standard(p, apply_router_weight_on_input=on_input))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("chunk_size", [1, 4, 10])
def test_chunked_equals_unchunked_bit_for_bit(scheme, chunk_size):
    p = problem(scheme)
    np.testing.assert_array_equal(standard(p, chunk_size=chunk_size), standard(p))


@pytest.mark.parametrize("dtype", [np.float16, BF16])
@pytest.mark.parametrize("scheme", ["fp32", "fp8_w8a8_block", "int4_w4a16", "mxfp4"])
def test_hidden_dtypes(scheme, dtype):
    p = problem(scheme, dtype=dtype)
    y = standard(p)
    assert y.dtype == dtype
    wide = dataclasses.replace(p, x=p.x.astype(np.float32))
    exact = standard(wide)
    ulp = 2.0**-10 if dtype is np.float16 else 2.0**-7
    np.testing.assert_allclose(y.astype(np.float32), exact, rtol=0, atol=np.abs(exact).max() * (ulp * 2 + 0.03))


@pytest.mark.parametrize(
    "activation", ["silu", "gelu", "gelu_tanh", "swigluoai", "swiglustep", "silu_no_mul", "gelu_no_mul", "relu2_no_mul"]
)
@pytest.mark.parametrize("scheme", ["fp32", "fp8_w8a8_tensor", "mxfp4_mxfp8"])
def test_activations(scheme, activation):
    p = problem(scheme, activation=activation)
    close(scheme, standard(p), standard(p, NumpyReferenceExperts))


@pytest.mark.parametrize("cls", [CpuExperts, NumpyReferenceExperts])
def test_unquantized_values_against_float64(cls):
    p = problem(biases=True)
    y = standard(p, cls)
    expected = np.zeros((M, K))
    w1, w2 = p.w1.astype(np.float64), p.w2.astype(np.float64)
    for m in range(M):
        for j in range(TOPK):
            e = p.ids[m, j]
            if e >= 0:
                z = w1[e] @ p.x[m].astype(np.float64) + p.quant_config.w1.bias[e]
                gate, up = z[:WIDTH], z[WIDTH:]
                h = gate / (1 + np.exp(-gate)) * up
                expected[m] += p.scale[m, j] * (w2[e] @ h + p.quant_config.w2.bias[e])
    np.testing.assert_allclose(y, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def test_expert_map_equals_dropping_the_absent_experts():
    p = problem("fp8_w8a8")
    mapping = np.full(E, -1, np.int32)
    here = [3, 0]
    mapping[here] = [0, 1]
    config = p.quant_config
    part = dataclasses.replace(
        config,
        w1=dataclasses.replace(config.w1, scale=config.w1.scale[here]),
        w2=dataclasses.replace(config.w2, scale=config.w2.scale[here]),
    )
    y = pymoe.fused_experts(p.x, p.w1[here], p.w2[here], p.scale, p.ids, quant_config=part, expert_map=mapping)
    kept = np.where(np.isin(p.ids, here), p.ids, -1)
    expected = pymoe.fused_experts(p.x, p.w1, p.w2, p.scale, kept, quant_config=config)
    np.testing.assert_array_equal(y, expected)


def test_expert_map_in_the_batched_format():
    p = problem()
    mapping = np.array([1, -1, 0, -1, 2], np.int32)
    here = [2, 0, 4]
    config = dataclasses.replace(p.config(), num_local_experts=3)
    experts = NaiveBatchedExperts(config, p.quant_config, 16, 1)
    kernel = FusedMoEKernel(BatchedPrepareAndFinalize(16, 3), experts)
    y = kernel.apply(
        p.x, p.w1[here], p.w2[here], topk_weights=p.scale, topk_ids=p.ids, expert_map=mapping, activation=p.activation
    )
    kept = dataclasses.replace(p, ids=np.where(np.isin(p.ids, here), p.ids, -1))
    np.testing.assert_array_equal(y, standard(kept))


def test_dead_tokens_stay_out_of_a_scale_that_all_tokens_share():
    p = problem("fp8_w8a8_tensor")
    p.ids[0] = -1
    y = standard(p)
    loud = dataclasses.replace(p, x=p.x.copy())
    loud.x[0] = 1e6
    np.testing.assert_array_equal(standard(loud), y)
    assert not y[0].any()


def test_batched_limit_on_tokens():
    p = problem()
    experts = NaiveBatchedExperts(p.config(), p.quant_config, 4, 1)
    with pytest.raises(pymoe.ArgumentError, match="a1 must have at most max_num_tokens = 4 rows; got 11"):
        p.run(experts, BatchedPrepareAndFinalize(4, E))


def test_deferred_quantization_gives_the_bits_of_prepares():
    class Deferring(CpuExperts):
        @property
        def expects_unquantized_inputs(self):
            return True

        def apply(self, output, hidden_states, *args):
            from pymoe.ops.quantize import quantize_activations

            codes, scale = quantize_activations(hidden_states, self.quant_config, "a1")
            args = list(args)
            args[7] = scale
            super().apply(output, codes, *args)

    p = problem("fp8_w8a8")
    np.testing.assert_array_equal(standard(p, Deferring), standard(p))


def test_repeated_ids_count_twice():
    p = problem()
    p.ids[:] = 2
    p.scale[:] = 1
    once = dataclasses.replace(p, ids=np.array([[2, -1, -1]] * M, np.int32))
    np.testing.assert_allclose(standard(p), 3 * standard(once), rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float16, BF16])
def test_the_intermediate_is_rounded_once_to_the_hidden_dtype(dtype):
    """w2 multiplies h by 3, so that rounding h first shows in the last bit."""
    rng = np.random.default_rng(0)
    x, w1 = rng.standard_normal((50, K)).astype(dtype), (rng.standard_normal((1, 2 * WIDTH, K)) / 8).astype(dtype)
    w2 = np.zeros((1, K, WIDTH), dtype)
    w2[0, np.arange(WIDTH), np.arange(WIDTH)] = 3
    y = pymoe.fused_experts(x, w1, w2, np.ones((50, 1), np.float32), np.zeros((50, 1), int))
    z = grouped_gemm(x, WeightOperand.unquantized(w1), [0, 50])
    h = pymoe.ops.activation(z, pymoe.ActivationConfig("silu"))
    once = (3 * h.astype(dtype).astype(np.float32)).astype(dtype)
    np.testing.assert_array_equal(y[:, :WIDTH], once)
    assert (once != (3 * h).astype(dtype)).any()


@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_nvfp4_global_scales_of_activations(dtype):
    """They divide: values near gscale * amax / 6 use the block scales' whole range; numbers stay those of float64."""
    p = problem("nvfp4", dtype=dtype)
    exact = standard(problem("nvfp4"), NumpyReferenceExperts)
    gscale = np.array([448 * 6 / 4.0], np.float32)
    config = dataclasses.replace(
        p.quant_config,
        a1=dataclasses.replace(p.quant_config.a1, gscale=gscale),
        a2=dataclasses.replace(p.quant_config.a2, gscale=gscale),
    )
    scaled = dataclasses.replace(p, quant_config=config)
    y = standard(scaled)
    np.testing.assert_array_equal(
        y, scaled.run(NaiveBatchedExperts(p.config(), config, 16, 1), BatchedPrepareAndFinalize(16, E))
    )
    close("nvfp4", y, standard(scaled, NumpyReferenceExperts))
    norm = np.linalg.norm
    assert norm(y.astype(np.float32) - exact) <= 0.2 * norm(exact)  # two quantizations to 1 mantissa bit


@pytest.mark.parametrize(
    "kind", [float, np.float32, lambda v: np.array(v, np.float64), lambda v: np.array([[v]], BF16)]
)
def test_static_scales_may_come_as_numbers_or_arrays_of_any_float(kind):
    p = problem("fp8_w8a8_tensor")
    config = pymoe.FusedMoEQuantConfig.fp8_w8a8(
        w1_scale=p.quant_config.w1.scale.astype(np.float64),
        w2_scale=p.quant_config.w2.scale.astype(np.float64),
        a1_scale=kind(0.0625),
        a2_scale=kind(0.03125),
    )
    static = dataclasses.replace(p, quant_config=config)
    y = standard(static)
    np.testing.assert_array_equal(y, pymoe.fused_experts(p.x, p.w1, p.w2, p.scale, p.ids, quant_config=config))
    np.testing.assert_array_equal(y, standard(static, chunk_size=4))
    close("fp8", y, standard(static, NumpyReferenceExperts))
