"""The grouped GEMM of sm_90a beside the portable one: the same bits, whatever the routing.

Only a GPU of that architecture can run it: g++ has no tensor copies and no wgmma, so that the emulator takes the device
for an sm_80.  A work list for tiles of 16 rows goes the portable way, which `test_grouped_gemm_cuda` holds to float64.
"""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np
import pytest

from pymoe.activations import ActivationConfig
from pymoe.codec.weights import WeightOperand
from tests.ops import devices

pytestmark = pytest.mark.gpu

DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
ROUTINGS = ("one", "few", "none", "even", "skewed")
ACTIVATIONS = {
    "plain": None,
    "halves": ActivationConfig("silu", clamp_limit=2.0),
    "alternating": ActivationConfig("swigluoai"),
    "apart": ActivationConfig("gelu_tanh"),
    "ungated": ActivationConfig("relu2_no_mul"),
}


@pytest.fixture(autouse=True)
def _device(cuda):
    from pymoe.device.arch import current_arch

    if current_arch() != "sm_90a":
        pytest.skip("the GPU is no sm_90a")


def offsets_of(routing, E, P):
    """Rows of P that experts have: all in one, in the last three, nowhere, evenly, and most in the first."""
    counts = np.zeros(E, int)
    if routing == "one":
        counts[E // 2] = P
    elif routing == "few":
        counts[-3:] = (1, 65, 130)
    elif routing == "even":
        counts[:] = P // E
    elif routing == "skewed":
        counts[:] = np.random.default_rng(1).multinomial(P, 0.5 ** np.arange(1, E + 1) / (1 - 0.5**E))
    return np.r_[0, np.cumsum(counts)].astype(np.int32)


def problem(E, N, K, P, dtype, seed=0):
    rng = np.random.default_rng(seed)
    a, w = rng.standard_normal((P, K), np.float32), rng.standard_normal((E, N, K), np.float32) / K**0.5
    operand = WeightOperand.unquantized(devices.to_cupy(w.astype(dtype)))
    bias = devices.to_cupy(rng.standard_normal((E, N), np.float32))
    return devices.to_cupy(a.astype(dtype)), dataclasses.replace(operand, bias=bias)


def multiply(a, operand, offsets, tile_rows, act=None, out_dtype=np.float32):
    """Return the answer, whose every byte was 0xff before."""
    import cupy

    from pymoe.ops.grouped_gemm import _cuda
    from tests.gpu import filled

    P, N = len(a), operand.codes.shape[1]
    out = filled((P, N if act is None else act.width(N)), out_dtype)
    tiles = _cuda.list_tiles(cupy.asarray(offsets), P, tile_rows)
    return _cuda.grouped_gemm(a, operand, tiles, activation=act, out=out).get()


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_of_the_portable_path(dtype, kind, routing, dirty_memory):
    """Tails of every extent, and up to six tiles for each block, so that both warpgroups come round again."""
    E, N, K, P = 7, 1992, 328, 6000
    act, offsets = ACTIVATIONS[kind], offsets_of(routing, E, P)
    a, operand = problem(E, N, K, P, DTYPES[dtype])
    out_dtype = np.float32 if act is None else DTYPES[dtype]
    answers = [multiply(a, operand, offsets, rows, act, out_dtype) for rows in (16, 64, 128)]
    bits = [np.ascontiguousarray(answer).view(f"u{answer.dtype.itemsize}") for answer in answers]
    live = offsets[-1]
    assert np.isfinite(answers[0][:live].astype(np.float32)).all()
    for other in bits[1:]:
        np.testing.assert_array_equal(other, bits[0])
    assert (bits[0][live:] == np.iinfo(bits[0].dtype).max).all()  # nobody wrote beyond the live rows


@pytest.mark.parametrize("N, K", [(1, 8), (8, 64), (190, 72), (192, 1024), (386, 4104), (520, 8200)])
def test_extents_around_a_tile(N, K):
    offsets = offsets_of("even", 3, 387)
    a, operand = problem(3, N, K, 387, ml_dtypes.bfloat16)
    expected = multiply(a, operand, offsets, 16)
    for tile_rows in (64, 128):
        np.testing.assert_array_equal(multiply(a, operand, offsets, tile_rows), expected)


def test_numbers_at_the_ends_of_the_format():
    """Subnormal, huge, infinite and NaN elements: the same bits, and NaN where the portable path has NaN."""
    import cupy

    dtype = ml_dtypes.bfloat16
    a, operand = problem(3, 384, 256, 700, dtype)
    offsets, rng = offsets_of("even", 3, 700), np.random.default_rng(3)
    given = np.array([2.0**-133, -(2.0**-130), 2.0**-126, 3e38, -3e38, np.inf, -np.inf, np.nan, -0.0, 0.0], dtype)
    host = a.get()
    host[rng.integers(0, 700, 300), rng.integers(0, 256, 300)] = given[rng.integers(0, len(given), 300)]
    host[5], host[6] = 2.0**-130, 0  # sums of subnormal numbers, and of zeros
    answers = [multiply(cupy.asarray(host), operand, offsets, rows) for rows in (16, 64, 128)]
    same = np.array([np.where(np.isnan(y), np.uint32(0x7FC00000), y.view(np.uint32)) for y in answers])
    np.testing.assert_array_equal(same[1], same[0])
    np.testing.assert_array_equal(same[2], same[0])


@pytest.mark.parametrize("kind", ["plain", "halves", "alternating"])
def test_long_sums_of_both_warpgroups_together(kind, dirty_memory):
    """From K 8192 on two warpgroups share a tile of 256 columns; some have one of them idle, most blocks two tiles."""
    E, N, K, P = 3, 4088, 8200, 2000
    act, offsets = ACTIVATIONS[kind], offsets_of("skewed", E, P)
    a, operand = problem(E, N, K, P, ml_dtypes.bfloat16)
    expected, *others = (multiply(a, operand, offsets, rows, act) for rows in (16, 64, 128))
    for other in others:
        np.testing.assert_array_equal(other.view(np.uint32), expected.view(np.uint32))


def test_one_graph_for_every_routing():
    """A captured GEMM reads the work list anew: replayed with other lists, and the first one again."""
    import cupy

    from pymoe.ops.grouped_gemm import _cuda

    E, P = 7, 6000
    a, operand = problem(E, 384, 256, P, ml_dtypes.bfloat16)
    fixed = _cuda.list_tiles(cupy.asarray(offsets_of("even", E, P)), P, 128)
    out, stream = cupy.empty((P, 384), np.float32), cupy.cuda.Stream(non_blocking=True)
    _cuda.grouped_gemm(a, operand, fixed, out=out)
    cupy.cuda.Device().synchronize()
    with stream:
        stream.begin_capture()
        _cuda.grouped_gemm(a, operand, fixed, out=out)
        graph = stream.end_capture()
    for routing in ("one", "skewed", "none", "even", "one"):
        offsets = offsets_of(routing, E, P)
        other = _cuda.list_tiles(cupy.asarray(offsets), P, 128)
        fixed.tiles[...], fixed.tile_count[...], out[...] = other.tiles, other.tile_count, np.nan
        cupy.cuda.Device().synchronize()
        graph.launch(stream)
        stream.synchronize()
        live = offsets[-1]
        np.testing.assert_array_equal(out[:live].get(), multiply(a, operand, offsets, 16)[:live])
        assert np.isnan(out[live:].get()).all()


def test_a_caller_s_rows_are_not_mapped_while_a_tape_records():
    """A tensor map would keep the address of this call's array; by row number, a tape finds the next call's."""
    import cupy

    from pymoe.device.tape import Recorder
    from pymoe.ops.grouped_gemm import _cuda

    a, operand = problem(3, 192, 128, 300, ml_dtypes.bfloat16)
    b, _ = problem(3, 192, 128, 300, ml_dtypes.bfloat16, seed=1)
    tiles = _cuda.list_tiles(cupy.asarray(offsets_of("even", 3, 300)), 300, 128)
    out = cupy.empty((300, 192), np.float32)
    recorder = Recorder([a, out])
    with recorder.active():
        _cuda.grouped_gemm(a, operand, tiles, out=out)
    stream = cupy.cuda.get_current_stream()
    recorder.tape().play([b.data.ptr, out.data.ptr], cupy.cuda.runtime.getDevice(), stream.ptr)
    np.testing.assert_array_equal(out.get(), multiply(b, operand, offsets_of("even", 3, 300), 16))


def test_a_map_that_the_driver_refuses_says_why():
    from pymoe.device.tensor_maps import tensor_map
    from pymoe.errors import UnsupportedError

    with pytest.raises(
        UnsupportedError, match=r"must have a tensor map; got CUDA_ERROR_INVALID_VALUE for shape \(4, 8\)"
    ):
        tensor_map(0x7F0000000008, 2, (4, 8), (4, 64))
