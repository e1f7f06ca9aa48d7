"""Whole layers on the GPU: the exact oracle at every size and pair, and the CPU's answers on random data."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import pymoe
from pymoe import CudaBatchedExperts, CudaGroupedExperts, CudaMonolithicExperts, FusedMoEKernel
from tests import gpu
from tests.cuda.transfer import to_device, to_host
from tests.experts import test_pairs
from tests.experts.test_pairs import SCHEMES, problem
from tests.selection import BF16, selection
from tests.test_selection import EXACT, NEARLY, kernel_for, sizes
from tests.test_selection import apply as apply_kernel

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cuda")]


def run(arguments, **options):
    """Run `fused_experts` on the GPU into NaN, and bring the answer back."""
    given = to_device(arguments)
    out = gpu.filled(given["hidden_states"].shape, given["hidden_states"].dtype)
    return to_host(pymoe.fused_experts(**given, **to_device(options), out=out))


def on_device(problem):
    """Return a selection problem whose arrays are CuPy's; `expected` still takes NumPy's."""
    arrays = {f.name: to_device(getattr(problem, f.name)) for f in dataclasses.fields(problem)}
    return dataclasses.replace(problem, **arrays)


@pytest.mark.parametrize("block", range(4))
def test_E11_random_sizes_unquantized(block):
    for size in sizes(20, 100 + block):
        given = selection(**size)
        np.testing.assert_array_equal(run(given.arguments()), given.expected(), err_msg=str(size))


@pytest.mark.parametrize("E, topk", [(1, 1), (5, 3), (64, 8), (257, 3)])
def test_A14_every_number_of_tokens(E, topk):
    given = selection(260, 32, 16, E, topk, dtype=BF16)
    expected, arguments = given.expected(), to_device(given.arguments())
    for M in range(1, 261):
        part = {name: arguments[name][:M] for name in ("hidden_states", "topk_weights", "topk_ids")}
        y = pymoe.fused_experts(**arguments | part)
        np.testing.assert_array_equal(to_host(y), expected[:M], err_msg=f"M {M}")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16])
def test_C9_E10_every_edge_of_a_tile(dtype):
    for width in (1, 3, 8, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129):
        for K in (1, 7, 8, 16, 33, 64, 130, 320):
            given = selection(9, K, width, 3, 2, dtype=dtype)
            np.testing.assert_array_equal(run(given.arguments()), given.expected(), err_msg=f"K {K} I {width}")


@pytest.mark.parametrize("M, E, topk", [(1, 8, 2), (40, 8, 2), (400, 8, 2), (3000, 8, 2), (700, 64, 6)])
def test_every_tile_class_on_aligned_sizes(M, E, topk):
    given = selection(M, 256, 192, E, topk, dtype=BF16)
    np.testing.assert_array_equal(run(given.arguments()), given.expected())


@pytest.mark.parametrize("scheme", EXACT + NEARLY)
def test_every_exact_pair(scheme):
    tails = not scheme.startswith("mx")
    for seed, (M, K, width, E, topk) in enumerate(
        [(1, 128, 128, 1, 1), (33, 256, 128, 5, 3), (7, 320 if tails else 288, 128, 4, 4), (130, 128, 256, 8, 2)]
    ):
        given = selection(M, K, width, E, topk, seed=seed, dtype=BF16)
        w1, w2, config = pymoe.quantize_experts(given.w1.astype(np.float32), given.w2.astype(np.float32), scheme)
        y = run(given.arguments() | {"w1": w1, "w2": w2, "quant_config": config})
        expected = given.expected()
        if scheme in NEARLY:
            assert np.abs(y[expected == 0].astype(np.float64)).max(initial=0) <= topk * 32 * 2.0**-22
            y[expected == 0] = 0
        np.testing.assert_array_equal(y, expected, err_msg=f"{scheme} {M}")


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, BF16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_random_data_agrees_with_the_cpu(scheme, dtype, biases):
    p = problem(scheme, dtype=dtype, biases=biases)
    arguments = {
        "hidden_states": p.x, "w1": p.w1, "w2": p.w2, "topk_weights": p.scale, "topk_ids": p.ids,
        "quant_config": p.quant_config, "activation": p.activation,
    }  # fmt: skip
    expected = pymoe.fused_experts(**arguments).astype(np.float64)
    y = run(arguments).astype(np.float64)
    exact = scheme == "fp32" or scheme.endswith(("a16", "a16_zp"))
    limit = 3e-2 if not exact else 2e-2 if dtype == BF16 else 1e-5
    assert np.isfinite(y).all()
    assert np.abs(y - expected).max() <= limit * np.abs(expected).max()


PARAMETERS = {"swigluoai_uninterleave": {"clamp_limit": 1.5}, "situ": {"situ_beta": 1.25, "situ_linear_beta": 2.0}}


@pytest.mark.parametrize("activation", [a for a in pymoe.MoEActivation if a.value != "relu2"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16])
def test_every_activation_agrees_with_the_cpu(activation, dtype):
    config = pymoe.ActivationConfig(activation, **PARAMETERS.get(activation.value, {}))
    p = problem(activation=config, dtype=dtype, biases=True)
    arguments = {
        "hidden_states": p.x, "w1": p.w1, "w2": p.w2, "topk_weights": p.scale, "topk_ids": p.ids,
        "quant_config": p.quant_config, "activation": p.activation,
    }  # fmt: skip
    expected = pymoe.fused_experts(**arguments).astype(np.float64)
    limit = {np.float32: 1e-5, np.float16: 2e-3}.get(dtype, 2e-2)
    assert np.abs(run(arguments).astype(np.float64) - expected).max() <= limit * np.abs(expected).max()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_batched_and_monolithic_equal_standard_bit_for_bit(scheme, activation="silu"):
    p = problem(scheme, activation, dtype=BF16)
    given = to_device({"x": p.x, "w1": p.w1, "w2": p.w2, "scale": p.scale, "ids": p.ids, "config": p.quant_config})
    q = dataclasses.replace(
        p, x=given["x"], w1=given["w1"], w2=given["w2"], scale=given["scale"], ids=given["ids"],
        quant_config=given["config"],
    )  # fmt: skip
    options = {"device": "cuda", "routed_dtype": "float32"}  # what the batched format's finalize sums
    standard = q.run(CudaGroupedExperts(q.config(**options), q.quant_config), pymoe.SingleProcessPrepareAndFinalize())
    batched = CudaBatchedExperts(q.config(**options), q.quant_config, 16, 2)
    y = q.run(batched, pymoe.CudaBatchedPrepareAndFinalize(16, test_pairs.E, num_dispatchers=2))
    np.testing.assert_array_equal(to_host(y), to_host(standard))
    routing = pymoe.RoutingConfig(3)
    logits = to_device(np.random.default_rng(0).standard_normal((p.x.shape[0], test_pairs.E)).astype(np.float32))
    weights, ids = pymoe.select_experts(logits, 3)
    experts = CudaMonolithicExperts(q.config(routing=routing, **options), q.quant_config)
    kernel = FusedMoEKernel(pymoe.SingleProcessMonolithicPrepareAndFinalize(), experts)
    alone = kernel.apply_monolithic(q.x, q.w1, q.w2, router_logits=logits, activation=q.activation)
    together = dataclasses.replace(q, scale=weights, ids=ids)
    expected = together.run(
        CudaGroupedExperts(q.config(**options), q.quant_config), pymoe.SingleProcessPrepareAndFinalize()
    )
    np.testing.assert_array_equal(to_host(alone), to_host(expected))


@pytest.mark.parametrize("block", range(2))
def test_G18_batched_experts_on_the_oracle(block):
    for size in sizes(6, 500 + block):
        given = selection(**size | {"M": size["M"] % 40 + 1})
        q = on_device(given)
        pair = pymoe.CudaBatchedPrepareAndFinalize(41, given.w1.shape[0])
        y = apply_kernel(kernel_for(q, CudaBatchedExperts, pair, 41, 1), q)
        np.testing.assert_array_equal(to_host(y), given.expected())


def test_the_oracle_sees_the_smallest_faults():
    expected = selection(16, 32, 24, 3, 2, dtype=BF16, dead=0).expected()
    for fault in (
        lambda p: p.w1.__setitem__((slice(None), slice(None), 31), 0),
        lambda p: p.w1.__setitem__((slice(None), 24), 0),
        lambda p: p.w2.__setitem__((slice(None), slice(None), 23), 0),
        lambda p: p.topk_ids.__setitem__((7, 1), -1),
    ):
        broken = selection(16, 32, 24, 3, 2, dtype=BF16, dead=0)
        fault(broken)
        assert not np.array_equal(run(broken.arguments()), expected)


def test_chunks_change_no_bit():
    given = selection(300, 64, 64, 5, 2, dtype=BF16)
    q = on_device(given)
    layer = pymoe.MoELayer(q.w1, q.w2, topk=2, chunk_size=64)
    np.testing.assert_array_equal(to_host(layer(q.x, None, q.topk_weights, q.topk_ids)), given.expected())


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16])
@pytest.mark.parametrize("scheme", [None, "fp8_w8a8_block", "int8_w8a8", "int4_w4a16", "mxfp4_w4a16"])
def test_a_rows_bits_depend_on_no_other_row(scheme, dtype):
    """The same tokens alone, in a crowd, and in crowds that put their experts into every class of tiles."""
    rng = np.random.default_rng(0)
    w1 = (rng.standard_normal((4, 256, 128)) / 11).astype(dtype)
    w2 = (rng.standard_normal((4, 128, 128)) / 11).astype(dtype)
    options = {}
    if scheme is not None:
        w1, w2, config = pymoe.quantize_experts(w1.astype(np.float32), w2.astype(np.float32), scheme)
        options = {"quant_config": to_device(config)}
    layer = pymoe.MoELayer(to_device(w1), to_device(w2), topk=2, batch_invariant=True, **options)
    x = rng.standard_normal((2048, 128)).astype(dtype)
    ids, weights = rng.integers(0, 4, (2048, 2)), rng.random((2048, 2)).astype(np.float32)
    whole = to_host(layer(to_device(x), None, to_device(weights), to_device(ids)))
    for M in (1, 3, 17, 64, 129, 700, 2047):
        y = to_host(layer(to_device(x[:M]), None, to_device(weights[:M]), to_device(ids[:M])))
        np.testing.assert_array_equal(y.view(np.uint8), whole[:M].view(np.uint8), err_msg=f"M {M}")


@pytest.mark.parametrize("scheme", ["fp32", "fp8_w8a8", "fp8_w8a8_block", "int8_w8a8", "mxfp4"])
def test_a_nan_stays_in_its_row(scheme):
    p = problem(scheme, dtype=BF16)
    arguments = {
        "hidden_states": p.x.copy(), "w1": p.w1, "w2": p.w2, "topk_weights": p.scale,
        "topk_ids": np.abs(p.ids), "quant_config": p.quant_config,
    }  # fmt: skip
    clean = run(arguments)
    arguments["hidden_states"][4, 7] = np.nan
    y = run(arguments)
    rest = np.arange(p.x.shape[0]) != 4
    np.testing.assert_array_equal(y[rest].view(np.uint16), clean[rest].view(np.uint16))
    if scheme in ("fp32", "fp8_w8a8", "fp8_w8a8_block"):
        assert np.isnan(y[4].astype(np.float32)).all()


def test_no_tokens_and_no_live_slot():
    given = selection(6, 32, 32, 3, 2, dtype=BF16)
    arguments = given.arguments() | {"topk_ids": np.full((6, 2), -1)}
    assert (run(arguments) == 0).all()
    empty = {name: given.arguments()[name][:0] for name in ("hidden_states", "topk_weights", "topk_ids")}
    assert run(given.arguments() | empty).shape == (0, 32)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64])
def test_every_integer_dtype_of_ids(dtype):
    given = selection(20, 32, 32, 5, 3, dtype=BF16, dead=0, ids_dtype=dtype)
    arguments = given.arguments()
    limits = np.iinfo(dtype)
    for bad in {limits.max, limits.min if limits.min < 0 else limits.max, 5}:
        ids = given.topk_ids.copy()
        ids[3, 1] = bad
        skipped = np.array(given.topk_ids, np.int64)
        skipped[3, 1] = -1
        given_skipped = dataclasses.replace(given, topk_ids=skipped)
        np.testing.assert_array_equal(run(arguments | {"topk_ids": ids}), given_skipped.expected())


def test_mixed_hidden_and_weight_dtypes():
    for hidden in (np.float32, np.float16, BF16):
        for weight in (np.float32, np.float16, BF16):
            given = selection(19, 64, 48, 3, 2, dtype=hidden)
            arguments = given.arguments() | {"w1": given.w1.astype(weight), "w2": given.w2.astype(weight)}
            np.testing.assert_array_equal(run(arguments), given.expected(), err_msg=f"{hidden} {weight}")


def test_select_says_why():
    given = to_device(selection(3, 32, 32, 3, 2, dtype=BF16).arguments())
    plan = pymoe.MoELayer(given["w1"], given["w2"], topk=2).plan(3)
    assert plan.experts == "CudaGroupedExperts" and plan.workspace_bytes > 0
    assert {name for name, _ in plan.refused} == {
        "CudaBatchedExperts", "CudaMonolithicExperts", "NumbaCudaExperts",
    }  # fmt: skip
