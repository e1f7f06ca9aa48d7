"""Reliability rows D of the stages that hold large arrays: offsets past 2^31 elements, on sparse files.

Widths are shrunk or extents chosen so that only the offset is large; holes of a sparse file take no memory until they
are written.  Marked `large`: at most 8 GB of page cache and memory.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import pymoe
from pymoe.activations import ActivationConfig
from pymoe.codec.weights import WeightOperand
from pymoe.ops import activation, grouped_gemm, route
from tests.selection import selection

pytestmark = [pytest.mark.large, pytest.mark.timeout(600)]
LIMIT = 2**31


@pytest.fixture
def sparse(tmp_path):
    """Return a maker of sparse arrays."""
    count = iter(range(100))
    return lambda shape, dtype: np.memmap(tmp_path / f"{next(count)}.bin", dtype, "w+", shape=shape)


@pytest.mark.parametrize("M", [65535, 65536, 65537, 131073])
def test_D1_numbers_of_tokens_around_two_to_the_sixteen(M):
    problem = selection(M, 5, 3, 3, 2, dtype=ml_dtypes.bfloat16)
    np.testing.assert_array_equal(pymoe.fused_experts(**problem.arguments()), problem.expected())


def test_D2_activation_rows_past_two_to_the_thirty_one(sparse):
    rows, N = LIMIT // 1024 + 3, 1024
    x = sparse((rows, N), np.float32)
    marked = [0, LIMIT // N - 1, LIMIT // N, rows - 1]
    for i, r in enumerate(marked):
        x[r, :] = i + 1
    y = activation(x, ActivationConfig("silu"), out_dtype=np.float16)
    h = np.float32(np.arange(1, 5))
    expected = (h / (1 + np.exp(-h)) * h).astype(np.float16)
    np.testing.assert_array_equal(y[marked], np.repeat(expected[:, None], N // 2, axis=1))
    assert not y[1 : LIMIT // N - 1 : 1009].any()


def test_D2_D5_gemm_reads_rows_whose_offset_is_past_two_to_the_thirty_one(sparse):
    K = 32768
    rows = LIMIT // K + 3
    a = sparse((rows, K), np.float32)
    w = np.zeros((2, 5, K), np.float32)
    w[:, np.arange(5), K - 1 - np.arange(5)] = 1
    picked = np.array([rows - 1, 0, LIMIT // K, LIMIT // K - 1, rows - 2])
    for i, r in enumerate(picked):
        a[r, K - 5 :] = 10 * i + np.arange(5)
    y = grouped_gemm(a, WeightOperand.unquantized(w), [0, 2, 5], gather=picked)
    np.testing.assert_array_equal(y, 10 * np.arange(5)[:, None] + np.arange(5)[::-1])


@pytest.mark.parametrize("E, N, K", [(513, 64, 65536), (3, 16400, 65536)])
def test_D6_D8_D9_experts_whose_weights_start_past_two_to_the_thirty_one(sparse, E, N, K):
    codes = sparse((E, N, K), np.uint8)
    last = E - 1
    assert last * N * K + (N - 1) * K > LIMIT
    codes[last, N - 2 :, K - 1] = 0x38  # 1.0
    codes[last, 0, 0] = 0x40  # 2.0
    config = pymoe.FusedMoEQuantConfig.fp8_w8a16(w1_scale=np.ones(E, np.float32), w2_scale=np.ones(E, np.float32))
    operand = WeightOperand.from_quant_config(codes, config.w1, config, K)
    x = np.zeros((1, K), np.float32)
    x[0, 0], x[0, -1] = 3, 5
    offsets = np.zeros(E + 1, np.int64)
    offsets[last + 1 :] = 1
    y = grouped_gemm(x, operand, offsets)
    expected = np.zeros(N)
    expected[0], expected[-2:] = 6, 5
    np.testing.assert_array_equal(y[0], expected)


def test_D10_D11_millions_of_tokens():
    M = 4_200_000
    problem = selection(1000, 64, 3, 2, 1, dtype=np.float16, dead=0.1)
    repeat = -(-M // 1000)
    given = problem.arguments()
    for name in ("hidden_states", "topk_weights", "topk_ids"):
        given[name] = np.tile(given[name], (repeat, 1))[:M]
    y = pymoe.fused_experts(**given)
    expected = problem.expected()
    for start in (0, M // 2, M - 1000):
        np.testing.assert_array_equal(y[start : start + 1000], expected)


def test_D12_router_logits_past_two_to_the_thirty_one(sparse):
    E = 2048
    M = LIMIT // E + 5
    logits = sparse((M, E), np.float32)
    marked = {0: 7, LIMIT // E - 1: 2047, LIMIT // E: 0, M - 1: 1000}
    for row, expert in marked.items():
        logits[row, expert] = 9
    weights, ids = route(logits, pymoe.RoutingConfig(1))
    assert ids.shape == (M, 1) and (weights == 1).all()
    for row, expert in marked.items():
        assert ids[row, 0] == expert
    assert np.flatnonzero(ids[:, 0]).tolist() == sorted(row for row, e in marked.items() if e)


def test_D14_widths_around_4096():
    for width in (4095, 4096, 4097):
        problem = selection(3, 9, width, 2, 2, dtype=ml_dtypes.bfloat16)
        np.testing.assert_array_equal(pymoe.fused_experts(**problem.arguments()), problem.expected())
