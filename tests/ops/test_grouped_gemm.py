"""Grouped GEMM against float64 loops and exact integers; bits that depend on the row alone; odd shapes; errors."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import pymoe
from pymoe import ArgumentError, DTypeError, ShapeError, UnsupportedError, ops
from pymoe.codec.weights import WeightOperand
from tests.ops import devices

grouped_gemm = devices.staged(ops.grouped_gemm)
BACKENDS, PORTABLE = devices.BACKENDS, devices.PORTABLE
BF16 = ml_dtypes.bfloat16
SCHEMES = [
    "fp8_w8a8", "fp8_w8a8_tensor", "fp8_w8a8_tensor_token", "fp8_w8a8_block", "fp8_w8a8_block_ue8m0", "fp8_w8a16",
    "int8_w8a8", "int8_w8a8_tensor", "int8_w8a8_block", "int8_w8a16", "int8_w8a16_zp", "int4_w4a16", "int4_w4a16_zp",
    "mxfp8", "mxfp8_w8a16", "mxfp4", "mxfp4_w4a16", "mxfp4_mxfp8", "nvfp4", "nvfp4_w4a16",
]  # fmt: skip


def offsets_for(E, P, seed=0):
    """Random counts that sum to P, some experts idle."""
    cuts = np.sort(np.random.default_rng(seed).integers(0, P + 1, E - 1))
    return np.concatenate([[0], cuts, [P]])


def integers(shape, seed, low=-3, high=4, dtype=np.float32):
    return np.random.default_rng(seed).integers(low, high, shape).astype(dtype)


def loops(a, w, offsets, gather=None):
    """Plain sums in float64; exact for small integers."""
    out = np.zeros((int(offsets[-1]), w.shape[1]))
    for e in range(len(offsets) - 1):
        for r in range(offsets[e], offsets[e + 1]):
            out[r] = w[e].astype(np.float64) @ a[r if gather is None else gather[r]].astype(np.float64)
    return out


@pytest.mark.parametrize("backend", PORTABLE)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16])
@pytest.mark.parametrize(
    "E, N, K, P",
    [(1, 1, 1, 1), (3, 5, 7, 4), (2, 33, 15, 9), (5, 64, 16, 65),
     (4, 31, 130, 3), (7, 4, 65, 300), (1, 3, 5, 1000), (2, 3, 17, 0)],
)  # fmt: skip
def test_exact_integers_bit_for_bit(backend, dtype, E, N, K, P):
    w, a, offsets = integers((E, N, K), 1, dtype=dtype), integers((P, K), 2, dtype=dtype), offsets_for(E, P)
    # Memory that a freed answer of the same problem lay in would hide rows that nobody wrote.
    y = np.full((P, N), np.nan, np.float32)
    assert grouped_gemm(a, WeightOperand.unquantized(w), offsets, out=y, backend=backend) is y
    np.testing.assert_array_equal(y, loops(a, w, offsets))


@pytest.mark.parametrize("backend", PORTABLE)
def test_gather_reads_the_named_rows(backend):
    w, a, offsets = integers((3, 6, 20), 1), integers((4, 20), 2), offsets_for(3, 11)
    gather = np.random.default_rng(5).integers(0, 4, 11)
    y = grouped_gemm(a, WeightOperand.unquantized(w), offsets, gather=gather, backend=backend)
    np.testing.assert_array_equal(y, loops(a, w, offsets, gather))


@pytest.mark.parametrize("backend", PORTABLE)
def test_A9_every_position_of_idle_experts(backend):
    w, a = integers((4, 6, 20), 1), integers((3, 20), 2)
    for busy in range(16):
        counts = [(busy >> e) & 1 for e in range(4)]
        offsets = np.concatenate([[0], np.cumsum(counts)])
        rows = a[: offsets[-1]] if offsets[-1] <= 3 else np.concatenate([a, a])[: offsets[-1]]
        y = grouped_gemm(rows, WeightOperand.unquantized(w), offsets, backend=backend)
        np.testing.assert_array_equal(y, loops(rows, w, offsets))


def quantized(scheme, E=3, N=64, K=256, P=23, seed=0):
    """Return (codes, scale, key) of activations, the operand and the float64 values of both sides."""
    rng = np.random.default_rng(seed)
    w1 = rng.standard_normal((E, 2 * N, K)).astype(np.float32) / 4
    w2 = rng.standard_normal((E, K, N)).astype(np.float32) / 4
    q1, _, config = pymoe.quantize_experts(w1, w2, scheme)
    operand = WeightOperand.from_quant_config(q1, config.w1, config, K)
    values = np.stack([operand.decode(e) for e in range(E)]).astype(np.float64)
    if operand.row_scale is not None:
        values *= operand.row_scale[:, :, None]
    x = rng.standard_normal((P, K)).astype(np.float32)
    if config.activation_key is None:
        return x, None, None, operand, x.astype(np.float64), values
    from pymoe.ops.quantize import dequantize_activations, quantize_activations

    codes, scale = quantize_activations(x, config, "a1")
    exact = dequantize_activations(codes, scale, config).astype(np.float64)
    return codes, scale, config.activation_key, operand, exact, values


@pytest.mark.parametrize("backend", PORTABLE)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_pair_against_float64_on_the_dequantized_operands(backend, scheme):
    codes, scale, key, operand, x, w = quantized(scheme)
    offsets = offsets_for(3, 23)
    if backend == "numba_cuda" and not scheme.startswith(("fp8", "int8_w8a8")):
        with pytest.raises(UnsupportedError, match="backend must be another for this pair; got numba_cuda for"):
            grouped_gemm(codes, operand, offsets, a_scale=scale, a_key=key, backend=backend)
        return
    y = grouped_gemm(codes, operand, offsets, a_scale=scale, a_key=key, backend=backend)
    expected = loops(x, w, offsets)
    # Each product is rounded at most four times in float32 and K = 256 sums follow: 2^-24 * (4 + sqrt(256)) of the
    # largest absolute sum, rounded up to 2^-18.
    magnitude = loops(np.abs(x), np.abs(w), offsets).max()
    np.testing.assert_allclose(y, expected, rtol=0, atol=magnitude * 2.0**-18)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_decoded_weights_are_what_dequantize_says(scheme):
    rng = np.random.default_rng(3)
    w1 = rng.standard_normal((2, 128, 256)).astype(np.float32)
    q1, _, config = pymoe.quantize_experts(w1, rng.standard_normal((2, 256, 64)).astype(np.float32), scheme)
    operand = WeightOperand.from_quant_config(q1, config.w1, config, 256)
    desc = config.w1
    scale = desc.scale if desc.scale_2 is None else (desc.scale, desc.scale_2)
    block = None
    if config.weight_key.dtype in ("uint8b128", "uint8", "uint4b8", "uint4"):
        block = (0, operand.block[1])
    expected = pymoe.dequantize(
        q1, scale, config.weight_key, zp=desc.zp, **({} if block is None else {"block_shape": block})
    )
    for e in range(2):
        w = operand.decode(e)
        if operand.row_scale is not None:
            w = w * operand.row_scale[e][:, None]
        # nvfp4's expert scale leaves the sum as a factor: two roundings in the other order, at most 2 ulp.
        np.testing.assert_allclose(w, expected[e], rtol=2.0**-22 if scheme.startswith("nvfp4") else 0)


@pytest.mark.parametrize("backend", PORTABLE)
def test_int8_sums_are_exact_integers(backend):
    """4,999 products of about 127 by 127 pass 2^26, where float32 sums would round to multiples of 8."""
    K = 4999
    w = np.random.default_rng(0).integers(120, 128, (1, 3, K)).astype(np.int8)
    w[0, 1, ::2] *= -1
    config = pymoe.FusedMoEQuantConfig.int8_w8a8(
        w1_scale=np.ones((1, 3), np.float32),
        w2_scale=np.ones((1, K), np.float32),
        per_act_token_quant=True,
        per_out_ch_quant=True,
    )
    operand = WeightOperand.from_quant_config(w, config.w1, config, K)
    a = np.full((2, K), 127, np.int8)
    a[1, 7] = 1
    scale = np.array([[1], [0.5]], np.float32)
    y = grouped_gemm(a, operand, [0, 2], a_scale=scale, a_key=config.activation_key, backend=backend)
    exact = (a.astype(np.int64) @ w[0].astype(np.int64).T).astype(np.float32) * scale
    np.testing.assert_array_equal(y, exact)
    assert (a.astype(np.int64) @ w[0].astype(np.int64).T).max() > 2**26


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("backend", PORTABLE)
def test_two_tensor_scales_of_gate_and_up(backend, interleaved):
    E, N, K = 2, 6, 8
    codes = pymoe.quantize(integers((E, N, K), 1), "kFp8StaticTensorSym", scale=np.ones(E, np.float32))[0]
    pair = np.array([[2, 8], [4, 0.5]], np.float32)
    config = pymoe.FusedMoEQuantConfig.fp8_w8a16(w1_scale=pair, w2_scale=np.ones(E, np.float32))
    operand = WeightOperand.from_quant_config(codes, config.w1, config, K, interleaved=interleaved)
    factor = np.tile(pair, (1, N // 2)) if interleaved else np.repeat(pair, N // 2, axis=1)
    a, offsets = integers((5, K), 2), [0, 2, 5]
    y = grouped_gemm(a, operand, offsets, backend=backend)
    np.testing.assert_array_equal(y, loops(a, integers((E, N, K), 1) * factor[:, :, None], offsets))


@pytest.mark.parametrize("backend", PORTABLE)
def test_bias_is_added_after_the_scales(backend):
    w, a, offsets = integers((2, 5, 9), 1), integers((4, 9), 2), [0, 1, 4]
    bias = integers((2, 5), 3)
    y = grouped_gemm(a, WeightOperand.unquantized(w, bias), offsets, backend=backend)
    np.testing.assert_array_equal(y, loops(a, w, offsets) + bias[[0, 1, 1, 1]])


@pytest.mark.parametrize("scheme", [None, "fp8_w8a8", "fp8_w8a8_block", "int4_w4a16", "mxfp4"])
@pytest.mark.parametrize("backend", PORTABLE)
def test_bits_of_a_row_depend_on_the_row_alone(backend, scheme, monkeypatch):
    """Any number of rows before it, any place in a tile, any number of threads."""
    if backend == "numba_cuda" and scheme in ("int4_w4a16", "mxfp4"):
        pytest.skip("Numba's kernel refuses this pair")
    if scheme is None:
        rng = np.random.default_rng(0)
        codes, scale, key = rng.standard_normal((23, 256)).astype(np.float32), None, None
        operand = WeightOperand.unquantized(rng.standard_normal((3, 50, 256)).astype(np.float32))
    else:
        codes, scale, key, operand, _, _ = quantized(scheme)

    def run(rows, counts):
        part = None if scale is None else scale[rows]
        return grouped_gemm(
            codes[rows], operand, np.concatenate([[0], np.cumsum(counts)]), a_scale=part, a_key=key, backend=backend
        )

    alone = np.concatenate([run([r], [0, 1, 0]) for r in range(23)])
    for threads in ("1", "3"):
        monkeypatch.setenv("PYMOE_NUM_THREADS", threads)
        for count in (2, 3, 4, 5, 7, 8, 23):
            together = run(list(range(count)), [0, count, 0])
            np.testing.assert_array_equal(together.view(np.uint32), alone[:count].view(np.uint32))
            shifted = run([5, 6, *range(count)], [2, count, 0])[2:]
            np.testing.assert_array_equal(shifted.view(np.uint32), alone[:count].view(np.uint32))


@pytest.mark.parametrize("backend", PORTABLE)
def test_nan_and_inf_stay_in_their_row_and_column(backend):
    w, a = integers((1, 6, 20), 1), integers((5, 20), 2)
    clean = grouped_gemm(a, WeightOperand.unquantized(w), [0, 5], backend=backend)
    a[2, 3], a[3, 19] = np.nan, np.inf
    w[0, 4, 0] = np.nan
    y = grouped_gemm(a, WeightOperand.unquantized(w), [0, 5], backend=backend)
    assert np.isnan(y[2]).all() and np.isnan(y[:, 4]).all() and not np.isfinite(y[3]).all()
    keep = np.ix_([0, 1, 4], [0, 1, 2, 3, 5])
    np.testing.assert_array_equal(y[keep], clean[keep])


@pytest.mark.parametrize("backend", PORTABLE)
def test_E6_odd_layouts_of_rows_weights_and_out(backend):
    w, a, offsets = integers((3, 6, 20), 1), integers((9, 20), 2), offsets_for(3, 9)
    expected = loops(a, w, offsets)
    wide = np.lib.stride_tricks.as_strided(np.zeros(9 * 21 + 1, np.float32), (9, 20), (84, 4))
    wide[...] = a
    for rows in (wide, np.asfortranarray(a), a[::-1].copy()[::-1]):
        for weights in (w, np.asfortranarray(w), np.ascontiguousarray(w.swapaxes(1, 2)).swapaxes(1, 2)):
            y = grouped_gemm(rows, WeightOperand.unquantized(weights), offsets, backend=backend)
            np.testing.assert_array_equal(y, expected)
    out = np.full((9, 6), np.nan, np.float32)
    assert grouped_gemm(a, WeightOperand.unquantized(w), offsets, out=out, backend=backend) is out
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize(
    "change, kind, text",
    [
        ({"a": np.zeros((4, 8), np.float32)}, ShapeError, "a must have shape (any, 9)"),
        ({"a": np.zeros((3, 9), np.float32)}, ShapeError, "a must have 4 rows"),
        ({"a": np.zeros((4, 9), np.int32)}, DTypeError, "a must be float32, float16 or bfloat16 without a_key"),
        ({"a": [[1.0]]}, DTypeError, "a must be a NumPy, CuPy or DLPack array"),
        ({"expert_offsets": [0, 1]}, ShapeError, "expert_offsets must have shape (3)"),
        ({"expert_offsets": [1, 2, 4]}, ArgumentError, "expert_offsets must start at 0 and never fall"),
        ({"expert_offsets": [0, 5, 4]}, ArgumentError, "expert_offsets must start at 0 and never fall"),
        ({"gather": np.array([0, 1, 2, 4])}, ArgumentError, "gather must name rows in 0..3; got 0..4"),
        ({"gather": np.array([0, 1, 2, -1])}, ArgumentError, "gather must name rows in 0..3; got -1..2"),
        ({"gather": np.array([0, 1])}, ShapeError, "gather must have shape (4)"),
        ({"backend": "gpu"}, ArgumentError, "backend must be"),
        ({"out": np.zeros((4, 5))}, ShapeError, "out must be C-contiguous float32"),
    ],
)
def test_bad_arguments_are_named(change, kind, text):
    given = {"a": np.zeros((4, 9), np.float32), "expert_offsets": [0, 1, 4]}
    w = WeightOperand.unquantized(np.zeros((2, 5, 9), np.float32))
    with pytest.raises(kind) as caught:
        grouped_gemm(**({"w": w} | given | change))
    assert text in str(caught.value)
