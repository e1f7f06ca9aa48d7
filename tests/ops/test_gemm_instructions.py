"""Every level of CPU instructions: exact problems of any shape, bits that depend on the row alone, what is flushed."""

from __future__ import annotations

import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

import pymoe
from pymoe.codec.weights import WeightOperand
from pymoe.device.instructions import best_dot
from pymoe.ops import grouped_gemm
from pymoe.ops.quantize import quantize_activations
from tests.selection import selection

BF16 = ml_dtypes.bfloat16
LEVELS = ["amx", "avx512", "plain"]
WIDTHS = [1, 15, 17, 31, 32, 33, 63, 64, 65, 130, 1000]
TINY = 2.0**-130
"""Below the least normal bfloat16, 2^-126."""


@pytest.fixture(params=LEVELS)
def level(request, monkeypatch):
    """Limit the CPU to a level; one that it lacks means the next lower one."""
    monkeypatch.setenv("PYMOE_CPU_KERNELS", request.param)
    return request.param


def int8_operand(w, scale=None):
    E, N, K = w.shape
    scale = np.ones((E, N), np.float32) if scale is None else scale
    config = pymoe.FusedMoEQuantConfig.int8_w8a8(
        w1_scale=scale, w2_scale=np.ones((E, K), np.float32), per_act_token_quant=True, per_out_ch_quant=True
    )
    return WeightOperand.from_quant_config(w, config.w1, config, K), config.activation_key


def exact(a, w, offsets):
    out = np.zeros((len(a), w.shape[1]), np.float64)
    for e in range(len(w)):
        rows = slice(offsets[e], offsets[e + 1])
        out[rows] = a[rows].astype(np.float64) @ w[e].astype(np.float64).T
    return out


def dirty(P, N):
    return np.full((P, N), np.nan, np.float32)


@pytest.mark.parametrize("N", [1, 15, 16, 33, 47, 64])
def test_exact_bfloat16_of_every_width_and_number_of_rows(level, N):
    rng = np.random.default_rng(N)
    for index, K in enumerate(WIDTHS):
        counts = np.array([index * 7 % 41, 40 - 4 * index % 41, index])
        offsets = np.concatenate([[0], np.cumsum(counts)])
        w = rng.integers(-8, 9, (3, N, K)).astype(BF16)
        a = rng.integers(-8, 9, (offsets[-1], K)).astype(BF16)
        y = grouped_gemm(a, WeightOperand.unquantized(w), offsets, out=dirty(len(a), N))
        np.testing.assert_array_equal(y, exact(a, w, offsets))


@pytest.mark.parametrize("N", [1, 16, 33, 64])
def test_exact_int8_of_every_width_and_number_of_rows(level, N):
    """All 256 codes on both sides, -128 with -128 included."""
    rng = np.random.default_rng(N)
    for index, K in enumerate(WIDTHS):
        offsets = np.array([0, index * 5 % 41, index * 5 % 41 + 3])
        w = rng.integers(-128, 128, (2, N, K)).astype(np.int8)
        a = rng.integers(-128, 128, (offsets[-1], K)).astype(np.int8)
        w[0, 0], a[:1] = -128, -128
        operand, key = int8_operand(w)
        scale = np.ones((len(a), 1), np.float32)
        y = grouped_gemm(a, operand, offsets, a_scale=scale, a_key=key, out=dirty(len(a), N))
        np.testing.assert_array_equal(y, exact(a, w, offsets).astype(np.float32))


def test_int8_sums_up_to_the_last_that_fits(level):
    for K in ((1 << 17) - 1, 1 << 17):
        w = np.full((1, 2, K), -128, np.int8)
        w[0, 1] = 127
        operand, key = int8_operand(w)
        y = grouped_gemm(
            np.full((1, K), -128, np.int8), operand, [0, 1], a_scale=np.ones((1, 1), np.float32), a_key=key
        )
        np.testing.assert_array_equal(y, np.float32([[K * 16384.0, -K * 16256.0]]))


@pytest.mark.parametrize("rows", range(1, 41))
def test_rows_of_one_expert(rows):
    rng = np.random.default_rng(rows)
    a, w = rng.integers(-8, 9, (rows, 64)).astype(BF16), rng.integers(-8, 9, (1, 64, 64)).astype(BF16)
    y = grouped_gemm(a, WeightOperand.unquantized(w), [0, rows], out=dirty(rows, 64))
    np.testing.assert_array_equal(y, exact(a, w, [0, rows]))


def test_memory_at_odd_addresses(level):
    rng = np.random.default_rng(0)

    def shifted(values, dtype):
        memory = np.empty(values.nbytes + 1, np.uint8)[1:]
        array = memory.view(dtype) if np.dtype(dtype).itemsize == 1 else np.empty(values.size + 1, dtype)[1:]
        array = array[: values.size].reshape(values.shape)
        array[...] = values
        return array

    offsets = [0, 2, 9]
    w, a = rng.integers(-8, 9, (2, 33, 64)), rng.integers(-8, 9, (9, 64))
    y = grouped_gemm(shifted(a, BF16), WeightOperand.unquantized(shifted(w, BF16)), offsets)
    np.testing.assert_array_equal(y, exact(a, w, offsets))
    operand, key = int8_operand(shifted(w, np.int8))
    y = grouped_gemm(shifted(a, np.int8), operand, offsets, a_scale=np.ones((9, 1), np.float32), a_key=key)
    np.testing.assert_array_equal(y, exact(a, w, offsets))


def random_problem(scheme):
    """Return (a, keywords, operand) of 50 rows and one expert."""
    rng = np.random.default_rng(7)
    w, x = rng.standard_normal((1, 66, 256)).astype(np.float32), rng.standard_normal((50, 256)).astype(BF16)
    if scheme == "bf16":
        return x, {}, WeightOperand.unquantized(w.astype(BF16))
    q, _, config = pymoe.quantize_experts(w, np.zeros((1, 256, 32), np.float32), scheme)
    operand = WeightOperand.from_quant_config(q, config.w1, config, 256)
    if config.activation_key is None:
        return x, {}, operand
    codes, scale = quantize_activations(x, config, "a1")
    return codes, {"a_scale": scale, "a_key": config.activation_key}, operand


NARROW = ["bf16", "fp8_w8a8", "fp8_w8a8_block", "fp8_w8a16", "int8_w8a8", "int8_w8a8_block", "int8_w8a16_zp",
          "int4_w4a16", "int4_w4a16_zp", "mxfp8", "mxfp4_w4a16", "mxfp4_mxfp8", "nvfp4_w4a16"]  # fmt: skip


@pytest.mark.parametrize("scheme", NARROW)
def test_bits_depend_on_the_row_alone(level, scheme, monkeypatch):
    a, keywords, operand = random_problem(scheme)

    def run(rows):
        part = dict(keywords)
        if part:
            part["a_scale"] = part["a_scale"][rows]
        return grouped_gemm(a[rows], operand, [0, len(rows)], **part).view(np.uint32)

    whole = run(list(range(50)))
    monkeypatch.setenv("PYMOE_NUM_THREADS", "3")
    for rows in ([0], [49], [31, 32], list(range(16, 33)), list(range(49, -1, -1))):
        np.testing.assert_array_equal(run(rows), whole[rows])


@pytest.mark.parametrize("scheme", NARROW)
def test_levels_agree_with_the_definition(level, scheme):
    """K = 256 float32 sums: 2^-24 * (4 + sqrt(256)) of the largest absolute sum, rounded up to 2^-18."""
    a, keywords, operand = random_problem(scheme)
    expected = grouped_gemm(a, operand, [0, 50], backend="numpy", **keywords)
    y = grouped_gemm(a, operand, [0, 50], **keywords)
    np.testing.assert_allclose(y, expected, rtol=0, atol=16 * np.abs(expected).max() * 2.0**-18)


def test_nan_and_infinity_stay_in_their_row_and_feature(level):
    rng = np.random.default_rng(1)
    a, w = rng.integers(-8, 9, (40, 96)).astype(BF16), rng.integers(1, 9, (1, 40, 96)).astype(BF16)
    clean = exact(a, w, [0, 40])
    a[3, 5], a[20, 95], w[0, 7, 64] = np.nan, np.inf, np.nan
    y = grouped_gemm(a, WeightOperand.unquantized(w), [0, 40], out=dirty(40, 40))
    assert np.isnan(y[3]).all() and np.isnan(y[:, 7]).all()
    assert (y[20, np.arange(40) != 7] == np.inf).all()
    rows, features = np.arange(40), np.arange(40)
    keep = np.ix_(rows[(rows != 3) & (rows != 20)], features[features != 7])
    np.testing.assert_array_equal(y[keep], clean[keep])


def test_numbers_below_the_least_normal_one_count_as_zero_only_in_bfloat16_products(level):
    """A subnormal operand, and a product of normal ones that is subnormal; scaled so that float32 shows them."""
    a, w = np.zeros((2, 64), BF16), np.zeros((1, 2, 64), BF16)
    a[0, 0], w[0, 0, 0] = TINY, 2.0**100
    a[1, 0], w[0, 1, 0] = 2.0**-100, 2.0**-30
    y = grouped_gemm(a, WeightOperand.unquantized(w), [0, 2])
    kept = best_dot("bfloat16") is None
    np.testing.assert_array_equal(y, [[TINY * 2.0**100 * kept, 0], [1, TINY * kept]])
    y = grouped_gemm(a.astype(np.float32), WeightOperand.unquantized(w.astype(np.float32)), [0, 2])
    np.testing.assert_array_equal(y, [[TINY * 2.0**100, 0], [1, TINY]])


def test_a_whole_layer_selects_exactly(level):
    for M, K, width in ((1, 64, 32), (37, 130, 47), (90, 33, 65)):
        problem = selection(M, K, width, 5, 3, dtype=BF16, mapped=True)
        np.testing.assert_array_equal(pymoe.fused_experts(**problem.arguments()), problem.expected())


INSTRUCTIONS = """
import sys

import ml_dtypes
import numba
import numpy as np

from pymoe.codec.weights import WeightOperand
from pymoe.device.instructions import best_dot
from pymoe.ops import grouped_gemm
from pymoe.ops.grouped_gemm import _numba_dots, _numba_tiles

wanted = {"tiles": (_numba_tiles.multiply_tiles, "tdpbf16ps"), "vectors": (_numba_dots._rows, "vdpbf16ps")}
form = best_dot("bfloat16")
if form is None:
    sys.exit(5)
x, w = np.zeros((9, 64), ml_dtypes.bfloat16), np.zeros((1, 64, 64), ml_dtypes.bfloat16)
grouped_gemm(x, WeightOperand.unquantized(w), [0, 9])
kernel, instruction = wanted[form]
compiled = numba.njit(nogil=True, error_model="numpy")(kernel.py_func)
for signature in kernel.signatures:
    compiled.compile(signature)
texts = [text for text in compiled.inspect_asm().values() if instruction in text]
assert texts and all("zmm" in text for text in texts)
"""


def test_kernels_hold_the_instructions(level, tmp_path):
    """Loops that LLVM took apart would be correct and slow; in a process with an empty cache, which has no texts."""
    environment = {**os.environ, "PYMOE_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", INSTRUCTIONS], env=environment, capture_output=True, text=True)
    if done.returncode == 5:
        pytest.skip("bfloat16 is multiplied as float32 here")
    assert done.returncode == 0, done.stderr
