"""The CUDA grouped GEMM beyond what every backend is asked: tiles, the activation in it, gathers, dirty memory.

Most of it runs on the GPU and, without one, on the kernels that g++ has compiled (see `devices`).
"""

from __future__ import annotations

import dataclasses
import math

import ml_dtypes
import numpy as np
import pytest

from pymoe.activations import ActivationConfig, register_activation
from pymoe.codec.weights import WeightOperand
from pymoe.errors import ArgumentError, DTypeError, ShapeError
from pymoe.ops import activation as activate
from pymoe.ops import grouped_gemm
from tests import gpu
from tests.ops import devices
from tests.ops.test_grouped_gemm import SCHEMES, integers, loops, offsets_for, quantized

BF16 = ml_dtypes.bfloat16
HIDDEN = {"float32": np.float32, "float16": np.float16, "bfloat16": BF16}
TILE_ROWS = (16, 64, 128)
# Rows of both operands are whole pieces of 16 bytes in every format, or not; the last has tails everywhere.
SHAPES = {"whole": (3, 64, 256, 23), "tails": (4, 72, 288, 300), "odd": (3, 33, 112, 90)}
FILLS = (0xFF, 0x7F, 0x00)


@pytest.fixture(params=devices.DEVICES)
def device(request):
    return request.param


def sent(x, device):
    return devices.to_cupy(x) if device == "cuda" and isinstance(x, np.ndarray) else x


def on_device(operand, device):
    given = {f.name: getattr(operand, f.name) for f in dataclasses.fields(operand)}
    return WeightOperand(**{name: sent(value, device) for name, value in given.items()})


def multiply(device, a, operand, offsets, *, tile_rows=64, out=None, out_dtype=np.float32, act=None, **options):
    """Run with one tile shape; an answer that is not given starts as NaN.  Arrays of the device stay as they are."""
    from pymoe.ops.grouped_gemm import _cuda

    if "gather" in options:
        options["gather"] = options["gather"].astype(np.int32)
    P = len(a) if options.get("gather") is None else len(options["gather"])
    width = operand.codes.shape[1] if act is None else act.width(operand.codes.shape[1])
    out = sent(np.full((P, width), np.nan, out_dtype), device) if out is None else out
    a, offsets, w = sent(a, device), sent(np.asarray(offsets, np.int32), device), on_device(operand, device)
    options = {name: sent(value, device) for name, value in options.items()}
    if "routed" in options:
        options["routed"] = _cuda.Routed(*(sent(x, device) for x in options["routed"]))

    def run():
        tiles = _cuda.list_tiles(offsets, P, tile_rows)
        return _cuda.grouped_gemm(a, w, tiles, activation=act, out=out, **options)

    if device == "emulated":
        with devices.emulation():
            assert run() is out
        return out
    assert run() is out
    return out.get()


def bits(x):
    return np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}")


def problem(scheme, shape, hidden):
    """Activations as the GEMM takes them, and both sides in float64."""
    E, N, K, P = SHAPES[shape]
    if scheme.startswith(("int4", "mx", "nvfp4")):  # what their groups and nibbles allow
        N = -(-N // 32) * 32
        K = -(-K // 32) * 32 if scheme.startswith("mx") else K
    codes, scale, key, operand, x, w = quantized(scheme, E, N, K, P)
    if key is None:
        codes = codes.astype(hidden)
        x = codes.astype(np.float64)
    return codes, scale, key, operand, x, w, offsets_for(E, P)


def combinations():
    for scheme in SCHEMES:
        for hidden in HIDDEN if scheme.endswith(("a16", "zp")) else ("bfloat16",):
            yield scheme, hidden


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scheme, hidden", list(combinations()))
def test_every_pair_in_every_tile_shape(device, scheme, hidden, shape):
    """Float64 within the limit of all backends, and the same bits whatever the tile, the neighbours and the memory."""
    codes, scale, key, operand, x, w, offsets = problem(scheme, shape, HIDDEN[hidden])
    given = {} if scale is None else {"a_scale": scale, "a_key": key}
    answers = [multiply(device, codes, operand, offsets, tile_rows=rows, **given) for rows in TILE_ROWS]
    expected, magnitude = loops(x, w, offsets), loops(np.abs(x), np.abs(w), offsets).max()
    np.testing.assert_allclose(answers[0], expected, rtol=0, atol=magnitude * 2.0**-18)
    for other in answers[1:]:
        np.testing.assert_array_equal(bits(other), bits(answers[0]))
    last = len(codes) - 1
    part = {} if scale is None else {"a_scale": scale[last:] if len(scale) > 1 else scale, "a_key": key}
    alone = multiply(device, codes[last:], operand, np.r_[np.zeros(len(offsets) - 1, int), 1], tile_rows=16, **part)
    np.testing.assert_array_equal(bits(alone), bits(answers[0][last:]))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scheme, hidden", list(combinations()))
def test_router_weights_multiply_before_the_one_rounding(device, scheme, hidden, shape):
    if device == "emulated" and scheme not in ("fp8_w8a16", "int8_w8a8_block", "fp8_w8a8"):
        pytest.skip("one epilogue for all pairs; few stand for all where each has to be compiled")
    codes, scale, key, operand, _, _, offsets = problem(scheme, shape, HIDDEN[hidden])
    given = {} if scale is None else {"a_scale": scale, "a_key": key}
    P, rng = len(codes), np.random.default_rng(5)
    weights = rng.standard_normal((P + 9, 1)).astype(np.float32)
    weights[:3, 0] = (0, -0.0, 2.0**-140)
    slots = rng.permutation(P + 9)[:P].astype(np.int32)
    rows = multiply(device, codes, operand, offsets, **given) * weights[slots]
    for tile_rows in TILE_ROWS:
        for dtype in HIDDEN.values():
            y = multiply(
                device, codes, operand, offsets, tile_rows=tile_rows, routed=(slots, weights), out_dtype=dtype, **given
            )
            np.testing.assert_array_equal(bits(y), bits(rows.astype(dtype)))


@pytest.mark.parametrize("tile_rows", TILE_ROWS)
@pytest.mark.parametrize("dtype, N", [("float32", 36), ("float32", 33), ("bfloat16", 192), ("bfloat16", 35)])
def test_rows_are_added_to_their_tokens(device, dtype, N, tile_rows):
    """Sums of integers are exact in any order; a token without rows stays what it was, and so does what lies beyond."""
    P, topk, M, rng = 160, 3, 70, np.random.default_rng(3)
    w, a = integers((3, N, 64), 1, dtype=HIDDEN[dtype]), integers((P, 64), 2, dtype=HIDDEN[dtype])
    offsets = np.array([0, 20, 20, 150])
    slots = np.r_[rng.permutation(M * topk)[:150], np.full(10, -1)].astype(np.int32)
    rows = loops(a, w, offsets)[:150]
    for weights in (None, rng.integers(-2, 3, (M, topk)).astype(np.float32)):
        out = np.full((M, N), 7, np.float32)
        expected = out.copy()
        np.add.at(
            expected, slots[:150] // topk, rows if weights is None else rows * weights.reshape(-1, 1)[slots[:150]]
        )
        y = multiply(
            device, a, WeightOperand.unquantized(w), offsets, tile_rows=tile_rows, out=sent(out, device),
            routed=(slots, weights, topk),
        )  # fmt: skip
        np.testing.assert_array_equal(y, expected)


def test_rows_are_added_in_float32_only(device):
    operand, routed = WeightOperand.unquantized(np.zeros((2, 6, 8), np.float32)), (np.zeros(4, np.int32), None, 2)
    with pytest.raises(DTypeError, match="out must be float32 where rows are added to their tokens'"):
        multiply(device, np.zeros((4, 8), np.float32), operand, [0, 1, 4], out_dtype=np.float16, routed=routed)


def test_router_weights_do_not_go_with_an_activation(device):
    operand = WeightOperand.unquantized(np.zeros((2, 6, 8), np.float32))
    routed = (np.zeros(4, np.int32), np.ones((4, 1), np.float32))
    with pytest.raises(ArgumentError, match="routed must be None where an activation follows"):
        multiply(device, np.zeros((4, 8), np.float32), operand, [0, 1, 4], act=CONFIGS[0], routed=routed)


@pytest.mark.parametrize("tile_rows", TILE_ROWS)
@pytest.mark.parametrize("dtype", HIDDEN)
@pytest.mark.parametrize(
    "E, N, K, P",
    [(1, 1, 1, 1), (3, 5, 7, 4), (2, 33, 15, 9), (5, 64, 16, 65), (4, 31, 130, 3), (7, 4, 65, 300), (1, 3, 5, 1000),
     (2, 3, 17, 0), (3, 130, 1000, 70), (2, 257, 72, 129), (8, 128, 64, 1), (2, 200, 200, 400)],
)  # fmt: skip
def test_exact_integers_bit_for_bit(device, dtype, tile_rows, E, N, K, P):
    w, a = integers((E, N, K), 1, dtype=HIDDEN[dtype]), integers((P, K), 2, dtype=HIDDEN[dtype])
    offsets = offsets_for(E, P)
    y = multiply(device, a, WeightOperand.unquantized(w), offsets, tile_rows=tile_rows)
    np.testing.assert_array_equal(y, loops(a, w, offsets))


@pytest.mark.parametrize("weights", HIDDEN)
@pytest.mark.parametrize("hidden", HIDDEN)
def test_any_hidden_dtype_by_any_weight_dtype(device, hidden, weights):
    w, a, offsets = (
        integers((3, 40, 64), 1, dtype=HIDDEN[weights]),
        integers((50, 64), 2, dtype=HIDDEN[hidden]),
        [0, 20, 20, 50],
    )
    for out_dtype in HIDDEN.values():
        y = multiply(device, a, WeightOperand.unquantized(w), np.array(offsets), out_dtype=out_dtype)
        np.testing.assert_array_equal(y.astype(np.float64), loops(a, w, offsets).astype(out_dtype).astype(np.float64))


@pytest.mark.parametrize("block", [True, False])
@pytest.mark.parametrize("K", [4992, 4999])
def test_int8_sums_are_exact_integers(device, K, block):
    """Products of about 127 by 127 whose sum passes 2^26, where float32 sums would round."""
    import pymoe

    w = np.random.default_rng(0).integers(120, 128, (1, 3, K)).astype(np.int8)
    a = np.full((2, K), 127, np.int8)
    a[1, 7] = 1
    exact = a.astype(np.int64) @ w[0].astype(np.int64).T
    assert exact.max() > 2**26
    if block:
        scales = np.ones((1, 1, -(-K // 128)), np.float32)
        config = pymoe.FusedMoEQuantConfig.int8_w8a8(w1_scale=scales, w2_scale=scales, block_shape=(128, 128))
        scale, limit = np.ones((2, -(-K // 128)), np.float32), 2.0**-23
    else:
        channel = np.ones((1, 3), np.float32)
        config = pymoe.FusedMoEQuantConfig.int8_w8a8(
            w1_scale=channel, w2_scale=np.ones((1, K), np.float32), per_act_token_quant=True, per_out_ch_quant=True
        )
        scale, limit = np.array([[1], [0.5]], np.float32), 0
    operand = WeightOperand.from_quant_config(w, config.w1, config, K)
    for rows in TILE_ROWS:
        y = multiply(device, a, operand, [0, 2], a_scale=scale, a_key=config.activation_key, tile_rows=rows)
        expected = exact.astype(np.float32) * (1 if block else scale)
        np.testing.assert_allclose(y, expected, rtol=limit * K / 128)


def test_gather_reads_the_token_of_a_slot(device):
    topk, w, x = 3, integers((4, 40, 64), 1, dtype=BF16), integers((10, 64), 2, dtype=BF16)
    slots = np.random.default_rng(5).permutation(30).astype(np.int32)
    offsets = offsets_for(4, 30)
    y = multiply(device, x, WeightOperand.unquantized(w), offsets, gather=slots, gather_div=topk)
    np.testing.assert_array_equal(y, loops(x, w, offsets, slots // topk))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_beyond_the_live_ones_are_not_touched(device, dtype):
    w, x = integers((3, 24, 64), 1, dtype=HIDDEN[dtype]), integers((9, 64), 2, dtype=HIDDEN[dtype])
    slots = np.full(200, -1, np.int32)
    slots[:20] = np.arange(20) % 9
    y = multiply(device, x, WeightOperand.unquantized(w), [0, 5, 5, 20], gather=slots, tile_rows=16)
    np.testing.assert_array_equal(y[:20], loops(x, w, [0, 5, 5, 20], slots[:20]))
    assert np.isnan(y[20:]).all()


CONFIGS = [
    ActivationConfig("silu"),
    ActivationConfig("silu", clamp_limit=1.5, alpha=0.75, beta=0.5),
    ActivationConfig("swigluoai"),
    ActivationConfig("swigluoai_uninterleave", clamp_limit=3.0, alpha=1.702, beta=1.0),
    ActivationConfig("swiglustep"),
    ActivationConfig("gelu"),
    ActivationConfig("gelu_tanh"),
    ActivationConfig("situ", situ_beta=4.0, situ_linear_beta=25.0),
    *(ActivationConfig(name) for name in ("silu_no_mul", "gelu_no_mul", "gelu_tanh_no_mul", "relu2_no_mul")),
]


@pytest.mark.parametrize("N", [6, 96, 128, 258, 260])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.activation.value}_{c.clamp_limit}")
def test_activation_of_exact_sums(device, config, N):
    """Sums of quarters are exact, so only the activation itself can differ, by 4 ulp of float32 before the rounding."""
    w, a = integers((3, N, 64), 1, -2, 3), integers((75, 64), 2, -2, 3) / 4
    bias, offsets = integers((3, N), 3) / 8, offsets_for(3, 75)
    sums = (loops(a, w, offsets) + np.repeat(bias, np.diff(offsets), axis=0)).astype(np.float32)
    expected = activate(sums, config, backend="numpy")
    for dtype in (np.float32, BF16):
        operand = WeightOperand.unquantized(w.astype(dtype), bias)
        for rows in TILE_ROWS:
            y = multiply(device, a.astype(dtype), operand, offsets, act=config, tile_rows=rows)
            ulp = np.spacing(np.maximum(np.abs(expected), np.float32(2.0**-126)))
            assert (np.abs(y - expected) <= 4 * ulp).all()
            rounded = multiply(device, a.astype(dtype), operand, offsets, act=config, tile_rows=rows, out_dtype=BF16)
            np.testing.assert_array_equal(bits(rounded), bits(y.astype(BF16)))


@pytest.mark.parametrize(
    "scheme", [None, "fp8_w8a8", "fp8_w8a8_block", "int8_w8a8", "int4_w4a16_zp", "mxfp4_w4a16", "mxfp4"]
)
def test_O3_O4_nan_stays_in_its_row_and_memory_does_not_matter(device, scheme):
    if scheme is None:
        rng = np.random.default_rng(0)
        codes, scale, key = rng.standard_normal((40, 288)).astype(BF16), None, None
        operand = WeightOperand.unquantized(rng.standard_normal((3, 96, 288)).astype(BF16))
    else:
        codes, scale, key, operand, _, _ = quantized(scheme, 3, 96, 288, 40)
        codes = codes if key is not None else codes.astype(BF16)
    w, offsets, answers = on_device(operand, device), offsets_for(3, 40), []
    for fill in FILLS if device == "cuda" else FILLS[:1]:
        dirty_memory(device, fill)
        given = {} if scale is None else {"a_scale": scale, "a_key": key}
        answers += [multiply(device, codes, w, offsets, tile_rows=rows, **given) for rows in TILE_ROWS]
    for other in answers[1:]:
        np.testing.assert_array_equal(bits(other), bits(answers[0]))
    given, poisoned = {}, codes.copy()
    if scale is None:
        poisoned[7, 5] = np.nan
    else:
        bad = scale.copy()
        bad[7] = 255 if bad.dtype == np.uint8 else np.nan
        given = {"a_scale": bad, "a_key": key}
    for rows in TILE_ROWS:
        y = multiply(device, poisoned, w, offsets, tile_rows=rows, **given)
        assert np.isnan(y[7]).all()
        keep = np.arange(40) != 7
        np.testing.assert_array_equal(bits(y[keep]), bits(answers[0][keep]))


def dirty_memory(device, fill):
    """Leave bytes `fill` in the memory that the next arrays will lie in; the emulator dirties shared memory itself."""
    if device == "cuda":
        import cupy

        cupy.get_default_memory_pool().free_all_blocks()
        kept = [cupy.full(1 << 22, fill, np.uint8) for _ in range(8)]
        del kept


@pytest.mark.parametrize("shift", [1, 3])
def test_E5_operands_that_start_anywhere(device, shift):
    w, a, offsets = integers((2, 24, 64), 1, dtype=BF16), integers((9, 64), 2, dtype=BF16), np.array([0, 4, 9])

    def shifted(x):
        room = (
            np.zeros(x.size + shift, x.dtype)
            if device == "emulated"
            else sent(np.zeros(x.size + shift, x.dtype), device)
        )
        room[shift:] = sent(x.reshape(-1), device)
        return room[shift:].reshape(x.shape)

    out = shifted(np.zeros((9, 24), np.float32))
    y = multiply(device, shifted(a), WeightOperand.unquantized(shifted(w)), offsets, out=out)
    np.testing.assert_array_equal(y, loops(a, w, offsets))


@pytest.mark.gpu
def test_graph_replays_with_other_rows_and_work_lists():
    import cupy

    from pymoe.ops.grouped_gemm import _cuda

    w = integers((5, 40, 64), 1, dtype=BF16)
    operand, x = on_device(WeightOperand.unquantized(w), "cuda"), cupy.zeros((60, 64), BF16)
    offsets, out = cupy.zeros(6, np.int32), cupy.empty((60, 40), np.float32)
    tiles = _cuda.list_tiles(offsets, 60, 16)  # compiles and loads before the capture
    _cuda.grouped_gemm(x, operand, tiles, out=out)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        tiles = _cuda.list_tiles(offsets, 60, 16)
        _cuda.grouped_gemm(x, operand, tiles, out=out)
        graph = stream.end_capture()
    for counts in ([0, 0, 0, 0, 0], [60, 0, 0, 0, 0], [0, 0, 0, 0, 60], [7, 20, 0, 1, 16]):
        a, cuts = integers((60, 64), sum(counts) + 1, dtype=BF16), np.r_[0, np.cumsum(counts)]
        x.set(a)
        offsets.set(cuts.astype(np.int32))
        out.fill(np.nan)
        cupy.cuda.get_current_stream().synchronize()
        graph.launch(stream)
        stream.synchronize()
        y = cupy.asnumpy(out)
        np.testing.assert_array_equal(y[: cuts[-1]], loops(a, w, cuts))
        assert np.isnan(y[cuts[-1] :]).all()


@pytest.mark.parametrize(
    "change, kind, text",
    [
        ({"a": np.zeros((4, 8), np.float32)}, ShapeError, "a must have shape (any, 9)"),
        ({"a": np.zeros((4, 9), np.int32)}, DTypeError, "a must be float32, float16 or bfloat16 without a key"),
        ({"out": np.zeros((4, 4), np.float32)}, ShapeError, "out must be C-contiguous"),
        ({"out": np.zeros((4, 5), np.float64)}, ShapeError, "out must be C-contiguous"),
    ],
)
def test_bad_arguments_are_named(device, change, kind, text):
    given = {"a": np.zeros((4, 9), np.float32)} | change
    options = {"out": sent(given["out"], device)} if "out" in given else {}
    with pytest.raises(kind) as caught:
        operand = WeightOperand.unquantized(np.zeros((2, 5, 9), np.float32))
        multiply(device, given["a"], operand, [0, 1, 4], **options)
    assert text in str(caught.value)


def own_gate(gate, up):
    return gate / (1.0 + math.exp(-1.5 * gate)) * (up - 0.25)


def own_curve(x):
    return max(x, 0.0) ** 2 - math.tanh(x)


OWN = {
    "gated": register_activation("test_gemm_gate", own_gate),
    "plain": register_activation("test_gemm_curve", own_curve, gated=False),
}
FEW = ("fp8_w8a16", "int8_w8a8_block")
"""Pairs of which g++ compiles the kernels for the next test."""


@pytest.mark.parametrize("kind", OWN)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_own_activations_in_the_epilogue(device, scheme, kind):
    """The bits of the activation of the sums, which the same GEMM gives without it."""
    if scheme not in FEW and (device == "emulated" or kind == "plain"):
        pytest.skip("a GPU runs every pair with the gated one; few stand for all where each has to be compiled")
    if device == "cuda" and kind == "gated":
        gpu.compile_gemms(OWN[kind])
    codes, scale, key, operand, _, _, offsets = problem(scheme, "whole", BF16)
    given = {} if scale is None else {"a_scale": scale, "a_key": key}
    act = ActivationConfig(OWN[kind])
    for rows in TILE_ROWS[:1] if device == "emulated" or kind == "plain" else TILE_ROWS:
        sums = multiply(device, codes, operand, offsets, tile_rows=rows, **given)
        expected = activate(sums, act, backend="numpy")
        for dtype in (np.float32, BF16):
            got = multiply(device, codes, operand, offsets, tile_rows=rows, act=act, out_dtype=dtype, **given)
            np.testing.assert_array_equal(bits(got), bits(expected.astype(dtype)))


def test_own_activations_where_nothing_is_aligned(device):
    rng = np.random.default_rng(8)
    operand = WeightOperand.unquantized(rng.standard_normal((3, 34, 9)).astype(np.float32))
    a = rng.standard_normal((21, 9)).astype(np.float32)
    sums = multiply(device, a, operand, [0, 4, 4, 21])
    for own in OWN.values():
        got = multiply(device, a, operand, [0, 4, 4, 21], act=ActivationConfig(own))
        np.testing.assert_array_equal(bits(got), bits(activate(sums, own, backend="numpy")))


@pytest.mark.gpu
def test_cupy_arrays_have_no_other_backend():
    operand = on_device(WeightOperand.unquantized(np.zeros((2, 6, 9), np.float32)), "cuda")
    with pytest.raises(ArgumentError, match="backend must be cuda or None"):
        grouped_gemm(sent(np.zeros((4, 9), np.float32), "cuda"), operand, [0, 1, 4], backend="numba")
