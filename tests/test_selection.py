"""Wide sweeps of whole layers against the exact selection oracle, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest

import pymoe
from pymoe import (
    BatchedPrepareAndFinalize,
    CpuMonolithicExperts,
    FusedMoEKernel,
    NaiveBatchedExperts,
    NumpyReferenceExperts,
    SingleProcessPrepareAndFinalize,
)
from pymoe.activations import ActivationConfig
from pymoe.config import FusedMoEConfig
from pymoe.quantization import FUSED_MOE_UNQUANTIZED_CONFIG
from tests.selection import ACTIVATIONS, BF16, selection

# Powers of two stay themselves: exact in every hidden dtype.
EXACT = ["mxfp8", "mxfp8_w8a16", "mxfp4", "mxfp4_w4a16", "mxfp4_mxfp8", "fp8_w8a8_block_ue8m0"]
# A scale that is no power of two is a float32 rounding off: exact once the output is rounded to bf16.
NEARLY = [
    "fp8_w8a8", "fp8_w8a8_tensor", "fp8_w8a8_tensor_token", "fp8_w8a8_block", "fp8_w8a16", "int8_w8a8",
    "int8_w8a8_block", "int8_w8a16", "int8_w8a16_zp", "int4_w4a16", "int4_w4a16_zp",
]  # fmt: skip
# Not among them: per-tensor int8 (1 and 32 share a grid of 32/127) and nvfp4 (32/6 has no e4m3 scale).


def check(problem, **options):
    y = pymoe.fused_experts(**problem.arguments(), **options)
    np.testing.assert_array_equal(y, problem.expected())
    return y


def sizes(count, seed):
    """Deterministic random sizes; every axis crosses the lane, tile and thread limits."""
    rng = np.random.default_rng(seed)
    for index in range(count):
        E = int(rng.choice([1, 2, 5, 8, 64, 257]))
        limit = 40 if E > 8 else 150
        yield {
            "M": int(rng.integers(1, 261)),
            "K": int(rng.integers(1, limit)),
            "width": int(rng.integers(1, limit)),
            "E": E,
            "topk": int(rng.integers(1, min(E, 8) + 1)),
            "dtype": [np.float32, np.float16, BF16][index % 3],
            "activation": list(ACTIVATIONS)[index % len(ACTIVATIONS)],
            "mapped": bool(rng.integers(0, 2)) and E > 1,
            "ids_dtype": [np.int32, np.int64][index % 2],
            "seed": seed,
        }


@pytest.mark.parametrize("block", range(8))
def test_E11_random_sizes_unquantized(block):
    for size in sizes(25, 100 + block):
        check(selection(**size))


@pytest.mark.stress
@pytest.mark.parametrize("block", range(100))
def test_random_sizes_unquantized_stress(block):
    for size in sizes(100, 1000 + block):
        check(selection(**size))


@pytest.mark.parametrize("E, topk", [(1, 1), (5, 3), (64, 8), (257, 3)])
def test_A14_every_number_of_tokens(E, topk):
    """From 1 to 260 rows, past every row tile; one problem, of which each call takes the first M rows."""
    problem = selection(260, 24, 17, E, topk, dtype=BF16)
    expected = problem.expected()
    given = problem.arguments()
    for M in range(1, 261):
        part = {name: given[name][:M] for name in ("hidden_states", "topk_weights", "topk_ids")}
        np.testing.assert_array_equal(pymoe.fused_experts(**given | part), expected[:M])


@pytest.mark.parametrize("N", [1, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129])
def test_C9_E10_every_edge_of_the_tile_of_output_features(N):
    for K in (1, 15, 16, 17, 33, 130, 300):
        check(selection(9, K, N, 3, 2, dtype=BF16))


@pytest.mark.parametrize("K", [2880, 3584, 130, 65])
def test_E4_widths_of_real_models(K):
    check(selection(5, K, 64, 3, 2, dtype=BF16))


@pytest.mark.parametrize("scheme", EXACT + NEARLY)
def test_every_exact_pair(scheme):
    """K and I that every scheme takes, one with a tail where blocks may have one."""
    exact = scheme in EXACT
    tails = not scheme.startswith("mx")
    for seed, (M, K, width, E, topk) in enumerate(
        [(1, 128, 128, 1, 1), (33, 256, 128, 5, 3), (7, 320 if tails else 288, 128, 4, 4), (130, 128, 256, 8, 2)]
    ):
        problem = selection(M, K, width, E, topk, seed=seed, dtype=np.float32 if exact and seed % 2 else BF16)
        w1, w2, config = pymoe.quantize_experts(problem.w1.astype(np.float32), problem.w2.astype(np.float32), scheme)
        y = pymoe.fused_experts(**problem.arguments() | {"w1": w1, "w2": w2, "quant_config": config})
        expected = problem.expected()
        if not exact:
            # Terms that cancel leave their float32 roundings: topk * 32 * 2^-22 at most.
            assert np.abs(y[expected == 0].astype(np.float64)).max(initial=0) <= topk * 32 * 2.0**-22
            y[expected == 0] = 0
        np.testing.assert_array_equal(y, expected)


def kernel_for(problem, cls, prepare_finalize, *limits):
    E, N, K = problem.w1.shape
    number = E if problem.expert_map is None else len(problem.expert_map)
    config = FusedMoEConfig(
        num_experts=number,
        experts_per_token=problem.topk_ids.shape[1],
        hidden_dim=K,
        intermediate_size_per_partition=N // 2,
        num_local_experts=E,
        activation=ActivationConfig(problem.activation),
        in_dtype=problem.x.dtype,
    )
    return FusedMoEKernel(prepare_finalize, cls(config, FUSED_MOE_UNQUANTIZED_CONFIG, *limits))


def apply(kernel, problem):
    given = problem.arguments()
    rest = {name: given.pop(name) for name in ("topk_weights", "topk_ids", "activation", "expert_map")}
    return kernel.apply(given["hidden_states"], given["w1"], given["w2"], **rest)


@pytest.mark.parametrize("block", range(3))
def test_G18_reference_and_batched_experts(block):
    for size in sizes(6, 500 + block):
        problem = selection(**size | {"M": size["M"] % 40 + 1})
        reference = kernel_for(problem, NumpyReferenceExperts, SingleProcessPrepareAndFinalize())
        np.testing.assert_array_equal(apply(reference, problem), problem.expected())
        E_local = problem.w1.shape[0]
        pair = BatchedPrepareAndFinalize(41, E_local)
        np.testing.assert_array_equal(
            apply(kernel_for(problem, NaiveBatchedExperts, pair, 41, 1), problem), problem.expected()
        )


def test_the_oracle_sees_the_smallest_faults():
    """One element of K, one row of N, one wrong row, one slot: each must break the equality."""
    problem = selection(16, 33, 21, 3, 2, dtype=BF16, dead=0)
    faults = {
        "one k of GEMM1": lambda p: p.w1.__setitem__((slice(None), slice(None), 32), 0),
        "one n of GEMM1": lambda p: p.w1.__setitem__((slice(None), 21), 0),
        "one k of GEMM2": lambda p: p.w2.__setitem__((slice(None), slice(None), 20), 0),
        "one slot": lambda p: p.topk_ids.__setitem__((7, 1), -1),
        "one weight": lambda p: p.topk_weights.__setitem__((7, 1), p.topk_weights[7, 1] * 2),
        "one expert": lambda p: p.topk_ids.__setitem__((7, 1), (p.topk_ids[7, 1] + 1) % 3),
    }
    expected = problem.expected()
    for name, fault in faults.items():
        broken = selection(16, 33, 21, 3, 2, dtype=BF16, dead=0)
        fault(broken)
        assert not np.array_equal(pymoe.fused_experts(**broken.arguments()), expected), name


def test_monolithic_routes_itself():
    problem = selection(40, 33, 21, 5, 1, dtype=BF16, dead=0)
    logits = np.full((40, 5), -np.inf, np.float32)
    np.put_along_axis(logits, problem.topk_ids, 0, axis=1)
    problem.topk_weights[:] = 1
    routing = pymoe.RoutingConfig(1)
    config = FusedMoEConfig(5, 1, 33, 21, 5, ActivationConfig("silu"), BF16, routing=routing)
    experts = CpuMonolithicExperts(config, FUSED_MOE_UNQUANTIZED_CONFIG)
    kernel = FusedMoEKernel(pymoe.SingleProcessMonolithicPrepareAndFinalize(), experts)
    y = kernel.apply_monolithic(problem.x, problem.w1, problem.w2, router_logits=logits)
    np.testing.assert_array_equal(y, problem.expected())
