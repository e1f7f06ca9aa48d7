"""Reliability rows E of whole calls: views, strides, alignment, chunks, every activation with every scheme."""

from __future__ import annotations

import numpy as np
import pytest

import pymoe
from pymoe import CpuExperts, FusedMoEKernel, MoELayer, SingleProcessPrepareAndFinalize
from pymoe.config import FusedMoEConfig
from pymoe.quantization import FUSED_MOE_UNQUANTIZED_CONFIG
from tests import oracle, tolerance
from tests.selection import BF16, selection


def views(array):
    """Return the same numbers in every layout NumPy can give a 2-D array."""
    wide = np.zeros((2 * array.shape[0], 3 * array.shape[1]), array.dtype)
    wide[::2, 1::3] = array
    shifted = np.zeros((array.shape[0] + 5, array.shape[1]), array.dtype)
    shifted[5:] = array
    padded = np.zeros((array.shape[0], array.shape[1] + 1), array.dtype)
    padded[:, :-1] = array
    odd = np.zeros(array.nbytes + 1, np.uint8)[1:].view(array.dtype).reshape(array.shape)
    odd[...] = array
    readonly = array.copy()
    readonly.flags.writeable = False
    return {
        "E1_steps": wide[::2, 1::3],
        "E1_transposed": np.ascontiguousarray(array.T).T,
        "E1_offset": shifted[5:],
        "E1_reversed": np.ascontiguousarray(array[::-1, ::-1])[::-1, ::-1],
        "E6_row_stride": padded[:, :-1],
        "E5_unaligned": odd,
        "H7_read_only": readonly,
    }


@pytest.mark.parametrize("dtype", [np.float32, BF16])
@pytest.mark.parametrize("name", ["hidden_states", "topk_weights", "topk_ids"])
def test_E1_E5_E6_H7_every_layout_of_the_tokens(name, dtype):
    problem = selection(11, 33, 17, 4, 2, dtype=dtype)
    for label, view in views(problem.arguments()[name]).items():
        y = pymoe.fused_experts(**problem.arguments() | {name: view})
        np.testing.assert_array_equal(y, problem.expected(), err_msg=label)


@pytest.mark.parametrize("scheme", [None, "fp8_w8a8", "fp8_w8a8_block", "int4_w4a16", "mxfp4"])
@pytest.mark.parametrize("name", ["w1", "w2"])
def test_E1_E2_every_layout_of_the_weights(name, scheme):
    problem = selection(11, 64, 32, 4, 2, dtype=np.float32)
    given = problem.arguments()
    if scheme:
        w1, w2, config = pymoe.quantize_experts(given["w1"], given["w2"], scheme)
        given |= {"w1": w1, "w2": w2, "quant_config": config}
    expected = pymoe.fused_experts(**given)
    w = given[name]
    variants = [
        np.asfortranarray(w),
        np.ascontiguousarray(w[::-1])[::-1],
        np.ascontiguousarray(w.swapaxes(1, 2)).swapaxes(1, 2),
    ]
    for variant in variants:
        np.testing.assert_array_equal(pymoe.fused_experts(**given | {name: variant}), expected)


def test_E2_broadcast_rows():
    problem = selection(9, 33, 17, 4, 2, dtype=np.float32, dead=0)
    row, one = problem.x[:1], problem.w1[:1]
    same = np.broadcast_to(row, (9, 33))
    given = problem.arguments() | {"w1": np.broadcast_to(one, problem.w1.shape)}
    y = pymoe.fused_experts(**given | {"hidden_states": same})
    expected = pymoe.fused_experts(**given | {"hidden_states": same.copy(), "w1": np.repeat(one, 4, axis=0)})
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.int64, np.uint16, np.uint32, np.uint64])
def test_E3_dtypes_of_ids_and_numpy_integers_as_sizes(dtype):
    problem = selection(11, 33, 17, 4, 2, dtype=np.float32, dead=0)
    given = problem.arguments() | {"topk_ids": problem.topk_ids.astype(dtype), "global_num_experts": np.int32(4)}
    np.testing.assert_array_equal(pymoe.fused_experts(**given), problem.expected())
    logits = np.zeros((3, 4), np.float32)
    np.testing.assert_array_equal(pymoe.select_experts(logits, np.int32(2))[1], [[0, 1]] * 3)


@pytest.mark.parametrize("topk", [1, 3, 8])
def test_E7_every_residue_of_the_rows_modulo_the_tiles(topk):
    problem = selection(260, 16, 5, 8, topk, dtype=BF16, dead=0)
    expected, given = problem.expected(), problem.arguments()
    for M in [*range(1, 20), *range(124, 132), *range(250, 261)]:
        part = {name: given[name][:M] for name in ("hidden_states", "topk_weights", "topk_ids")}
        np.testing.assert_array_equal(pymoe.fused_experts(**given | part), expected[:M])


def kernel(problem, chunk_size, shared=None):
    config = FusedMoEConfig(4, 2, 33, 17, 4, in_dtype=problem.x.dtype)
    return FusedMoEKernel(
        SingleProcessPrepareAndFinalize(),
        CpuExperts(config, FUSED_MOE_UNQUANTIZED_CONFIG),
        shared,
        chunk_size=chunk_size,
    )


@pytest.mark.parametrize("M", [7, 8, 9, 10, 15, 16, 17])
def test_E8_last_chunks_of_every_length(M):
    problem = selection(M, 33, 17, 4, 2, dtype=BF16)
    given = problem.arguments()
    del given["expert_map"], given["activation"]
    x, w1, w2 = (given.pop(name) for name in ("hidden_states", "w1", "w2"))
    np.testing.assert_array_equal(kernel(problem, 8).apply(x, w1, w2, **given), problem.expected())


def test_E9_shared_experts_see_all_tokens_however_they_are_chunked():
    problem = selection(21, 33, 17, 4, 2, dtype=np.float32)
    given = problem.arguments()
    del given["expert_map"], given["activation"]
    x, w1, w2 = (given.pop(name) for name in ("hidden_states", "w1", "w2"))
    shared, y = kernel(problem, 8, lambda t: t * 3).apply(x, w1, w2, **given)
    np.testing.assert_array_equal(shared, x * 3)
    np.testing.assert_array_equal(y, problem.expected())
    layer = MoELayer(w1, w2, topk=2, shared_experts=lambda t: t * 3, chunk_size=8)
    np.testing.assert_array_equal(layer(x, **given), problem.expected() + 3 * x)


@pytest.mark.parametrize("topk", range(1, 9))
def test_E12_router_weights_for_every_topk(topk):
    problem = selection(30, 20, 11, 9, topk, dtype=BF16)
    np.testing.assert_array_equal(pymoe.fused_experts(**problem.arguments()), problem.expected())


ALL_ACTIVATIONS = ["silu", "gelu", "gelu_tanh", "swigluoai", "swiglustep", "silu_no_mul", "gelu_no_mul",
                   "gelu_tanh_no_mul", "relu2_no_mul"]  # fmt: skip


@pytest.mark.parametrize("scheme", [None, "fp8_w8a8_tensor", "fp8_w8a8_block", "int8_w8a8", "int4_w4a16", "mxfp8"])
@pytest.mark.parametrize("activation", ALL_ACTIVATIONS)
def test_E13_every_activation_with_every_kind_of_scheme(activation, scheme):
    """Against float64 loops on the dequantized weights; requantized activations get their own, wider limit."""
    rng = np.random.default_rng(7)
    E, K, width, M = 3, 128, 64, 12
    N = width if activation.endswith("no_mul") else 2 * width
    w1 = (rng.standard_normal((E, N, K)) / 8).astype(np.float32)
    w2 = (rng.standard_normal((E, K, width)) / 6).astype(np.float32)
    x = rng.standard_normal((M, K)).astype(np.float32)
    ids, weights = rng.integers(0, E, (M, 2)), rng.random((M, 2)).astype(np.float32)
    options = {}
    d1, d2 = w1, w2
    if scheme:
        q1, q2, config = pymoe.quantize_experts(w1, w2, scheme)
        options = {"quant_config": config}
        block = {"block_shape": (0, 128)} if scheme == "int4_w4a16" else {}
        d1 = pymoe.dequantize(q1, config.w1.scale, config.weight_key, **block)
        d2 = pymoe.dequantize(q2, config.w2.scale, config.weight_key, **({"block_shape": (0, 128)} if block else {}))
        w1, w2 = q1, q2
    y = pymoe.fused_experts(x, w1, w2, weights, ids, activation=activation, **options)
    expected = oracle.layer(x, d1, d2, weights, ids, activation=activation)
    if scheme in (None, "int4_w4a16"):
        tolerance.assert_fused(y, expected, K, width)
    else:
        # Two quantizations with 3 mantissa bits (fp8, mxfp8): 2 * 2.6e-2 rms; int8 well below.
        tolerance.assert_frobenius(y, expected, 6e-2)
