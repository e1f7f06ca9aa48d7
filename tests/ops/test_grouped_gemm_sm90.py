"""The grouped GEMMs of sm_90a beside the portable one: the same bits, whatever the routing.

It runs on such a GPU and, without one, as g++ compiles it, where tensor copies and multiplies happen as late as they
may.  A work list for tiles of 16 rows goes the portable way, which `test_grouped_gemm_cuda` holds to float64; lists for
64 and 128 rows, and for 96 and 192, are for the two kernels.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

import pymoe
from pymoe.activations import ActivationConfig
from pymoe.codec.weights import WeightOperand
from tests import gpu
from tests.emulator import sm90
from tests.ops import devices


def own_silu(g, u):
    return g / (1 + math.exp(-1.25 * g)) * u / (3.0 + abs(u))


pymoe.register_activation("test_sm90_silu", own_silu, gated=True)
DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
ROUTINGS = ("one", "few", "none", "even", "skewed")
ACTIVATIONS = {
    "plain": None,
    "halves": ActivationConfig("silu", clamp_limit=2.0),
    "alternating": ActivationConfig("swigluoai"),
    "own": ActivationConfig("test_sm90_silu"),
    "apart": ActivationConfig("gelu_tanh"),
    "ungated": ActivationConfig("relu2_no_mul"),
}
SWAPPED = (96, 192)
"""Tiles whose lists are for swapped operands, where answers are direct."""
SIZES = {"cuda": (7, 1992, 328, 6000), "emulated": (4, 392, 328, 420)}
"""E, N, K, P: tails of every extent, and several tiles for each block, so that both warpgroups come round again."""


@pytest.fixture(params=devices.DEVICES)
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def _is_sm90(request):
    if request.node.get_closest_marker("gpu") is None:
        return
    from pymoe.device.arch import current_arch

    if not gpu.why_no_gpu() and current_arch() != "sm_90a":
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
    bias = rng.standard_normal((E, N), np.float32)
    return a.astype(dtype), dataclasses.replace(WeightOperand.unquantized(w.astype(dtype)), bias=bias)


def multiply(device, a, operand, offsets, tile_rows, act=None, out_dtype=np.float32, routed=None, given=None):
    """Return the answer, which was `given` before, or whose every byte was 0xff."""
    from pymoe.ops.grouped_gemm import _cuda

    N = operand.codes.shape[1]
    if routed is not None:
        is_sent = lambda x: isinstance(x, np.ndarray) and device == "cuda"  # noqa: E731
        routed = _cuda.Routed(*(devices.to_cupy(x) if is_sent(x) else x for x in routed))
    options = {"activation": act, "routed": routed}
    even = tile_rows in SWAPPED
    shape = (len(a), N if act is None else act.width(N))
    if device == "emulated":
        out = np.full(shape[0] * shape[1] * np.dtype(out_dtype).itemsize, 0xFF, np.uint8).view(out_dtype).reshape(shape)
        out = out if given is None else given
        with sm90.emulation():
            _cuda.grouped_gemm(a, operand, _cuda.list_tiles(offsets, len(a), tile_rows, even), out=out, **options)
        return out
    a, offsets = devices.to_cupy(a), devices.to_cupy(offsets)
    out = gpu.filled(shape, out_dtype) if given is None else devices.to_cupy(given)
    sent = dataclasses.replace(operand, codes=devices.to_cupy(operand.codes), bias=devices.to_cupy(operand.bias))
    _cuda.grouped_gemm(a, sent, _cuda.list_tiles(offsets, len(a), tile_rows, even), out=out, **options)
    return out.get()


def bits(x):
    return np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}")


def cases():
    """All on a GPU, in memory of every kind; without one a few, since they take a second each."""
    for param in devices.DEVICES:
        (device,) = param.values
        for dtype, kind, routing, fill in itertools.product(DTYPES, ACTIVATIONS, ROUTINGS, gpu.FILLS):
            few = fill == 0xFF and (dtype, kind, routing) in {
                ("float16", "plain", "few"), ("float16", "halves", "skewed"), ("bfloat16", "plain", "none"),
                ("bfloat16", "plain", "even"), *(("bfloat16", kind, "few") for kind in ACTIVATIONS),
            }  # fmt: skip
            if device == "cuda" or few:
                name = f"{device}-{dtype}-{kind}-{routing}-{fill:#04x}"
                yield pytest.param(device, dtype, kind, routing, fill, marks=param.marks, id=name)


@pytest.mark.parametrize("device, dtype, kind, routing, fill", list(cases()))
def test_the_bits_of_the_portable_path(device, dtype, kind, routing, fill):
    E, N, K, P = SIZES[device]
    if device == "cuda":
        gpu.dirty_pool(fill)
    act, offsets = ACTIVATIONS[kind], offsets_of(routing, E, P)
    a, operand = problem(E, N, K, P, DTYPES[dtype])
    out_dtype = np.float32 if act is None else DTYPES[dtype]
    answers = [multiply(device, a, operand, offsets, rows, act, out_dtype) for rows in (16, 64, 128, *SWAPPED)]
    live = offsets[-1]
    assert np.isfinite(answers[0][:live].astype(np.float32)).all()
    for other in answers[1:]:
        np.testing.assert_array_equal(bits(other), bits(answers[0]))
    found = bits(answers[0][live:])
    assert (found == np.iinfo(found.dtype).max).all()  # nobody wrote beyond the live rows


@pytest.mark.parametrize("routing", ["few", "skewed"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_router_weights(device, dtype, routing):
    """A row times its slot's weight in float32, rounded once, in every class of tiles; no slot beyond live rows."""
    E, N, K, P = SIZES[device]
    offsets, rng = offsets_of(routing, E, P), np.random.default_rng(2)
    a, operand = problem(E, N, K, P, DTYPES[dtype])
    slots, weights = rng.permutation(P).astype(np.int32), rng.standard_normal((P, 1)).astype(np.float32)
    slots[offsets[-1] :] = -(2**31)
    live = slice(offsets[-1])
    rows = multiply(device, a, operand, offsets, 16)[live] * weights[slots[live]]
    for tile_rows in (16, 64, 128, *SWAPPED):
        y = multiply(device, a, operand, offsets, tile_rows, None, DTYPES[dtype], (slots, weights))
        np.testing.assert_array_equal(bits(y[live]), bits(rows.astype(DTYPES[dtype])))


def test_rows_are_added_to_their_tokens(device):
    """Sums of integers are exact in any order; what was in the answer stays in it."""
    topk, M, rng = 3, 150, np.random.default_rng(4)
    a, w = rng.integers(-3, 4, (400, 400)), rng.integers(-3, 4, (2, 400, 400))
    operand = WeightOperand.unquantized(w.astype(np.float16), np.zeros((2, 400), np.float32))
    offsets = np.array([0, 130, 390], np.int32)
    slots = np.r_[rng.permutation(M * topk)[:390], np.full(10, -1)].astype(np.int32)
    rows = np.concatenate([a[:130] @ w[0].T, a[130:390] @ w[1].T])
    expected = np.full((M, 400), 7)
    np.add.at(expected, slots[:390] // topk, 2 * rows)
    weights = np.full((M, topk), 2, np.float32)
    for tile_rows in (64, 128, *SWAPPED):
        out = np.full((M, 400), 7, np.float32)
        y = multiply(
            device, a.astype(np.float16), operand, offsets, tile_rows, None, np.float32, (slots, weights, topk), out
        )
        np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("N, K", [(1, 8), (8, 64), (190, 72), (192, 1024), (386, 584), (132, 64), (388, 64)])
def test_extents_around_a_tile(device, N, K):
    a, operand = problem(3, N, K, 200, ml_dtypes.bfloat16)
    offsets = offsets_of("even", 3, 200)
    expected = multiply(device, a, operand, offsets, 16)
    for tile_rows in (64, 128, *SWAPPED):
        np.testing.assert_array_equal(multiply(device, a, operand, offsets, tile_rows), expected)


def test_numbers_at_the_ends_of_the_format(device):
    """Subnormal, huge, infinite and NaN elements: the same bits, and NaN where the portable path has NaN."""
    dtype = ml_dtypes.bfloat16
    a, operand = problem(3, 200, 256, 300, dtype)
    offsets, rng = offsets_of("even", 3, 300), np.random.default_rng(3)
    given = np.array([2.0**-133, -(2.0**-130), 2.0**-126, 3e38, -3e38, np.inf, -np.inf, np.nan, -0.0, 0.0], dtype)
    a[rng.integers(0, 300, 100), rng.integers(0, 256, 100)] = given[rng.integers(0, len(given), 100)]
    a[5], a[6] = 2.0**-130, 0  # sums of subnormal numbers, and of zeros
    answers = [multiply(device, a, operand, offsets, rows) for rows in (16, 64, 128, *SWAPPED)]
    same = [np.where(np.isnan(y), np.uint32(0x7FC00000), bits(y)) for y in answers]
    for other in same[1:]:
        np.testing.assert_array_equal(other, same[0])


@pytest.mark.parametrize("kind", ["halves", "alternating", "own"])
def test_gates_whose_quotient_is_far_from_one(device, kind):
    """Sums of +-3000, zeros, infinities, NaN: SiLU takes its long way to the bits of the portable path."""
    dtype = ml_dtypes.bfloat16
    a, operand = problem(3, 200, 64, 300, dtype)
    codes, bias = (operand.codes.astype(np.float32) * 1000).astype(dtype), np.zeros_like(operand.bias)
    operand = dataclasses.replace(operand, codes=codes, bias=bias)
    a[:40], a[40, 3], a[41, 5] = 0, np.inf, np.nan
    a[50:60] = (a[50:60].astype(np.float32) * 1e-30).astype(dtype)
    offsets, act = offsets_of("even", 3, 300), ActivationConfig("silu") if kind == "halves" else ACTIVATIONS[kind]
    first, *others = (multiply(device, a, operand, offsets, rows, act, dtype) for rows in (16, 64, 128, *SWAPPED))
    for y in others:
        np.testing.assert_array_equal(np.isnan(y), np.isnan(first))
        np.testing.assert_array_equal(bits(np.nan_to_num(y)), bits(np.nan_to_num(first)))


@pytest.mark.parametrize("kind", ["plain", "halves", "alternating"])
@pytest.mark.parametrize("K", [200, 8200])
def test_both_warpgroups_together(device, kind, K, monkeypatch):
    """Long sums come in tiles of 256 columns that two warpgroups share, one of them idle where rows are few."""
    from pymoe.ops.grouped_gemm import _cuda_instances

    monkeypatch.setattr(_cuda_instances, "_SM90_LONG", 200)
    if device == "emulated" and K > 200:
        pytest.skip("nothing that the shorter sums do not show, in forty times the time")
    act, offsets = ACTIVATIONS[kind], offsets_of("few", 3, 200)
    a, operand = problem(3, 520 if K == 200 else 264, K, 200, ml_dtypes.bfloat16)
    expected, *others = (multiply(device, a, operand, offsets, rows, act) for rows in (16, 64, 128))
    for other in others:
        np.testing.assert_array_equal(bits(other), bits(expected))


@pytest.mark.parametrize("gated", [False, True])
def test_every_number_of_rows(device, gated):
    """Experts of 1 to 200 rows: each number of columns that a multiply has, one tile and two, full pieces and none."""
    counts = np.r_[1:201] if device == "cuda" else np.array([1, 8, 9, 47, 95, 96, 97, 143, 184, 191, 192, 193, 200])
    offsets = np.r_[0, np.cumsum(counts)].astype(np.int32)
    a, operand = problem(len(counts), 72, 64, offsets[-1], ml_dtypes.bfloat16)
    act = ACTIVATIONS["halves"] if gated else None
    expected = multiply(device, a, operand, offsets, 16, act, ml_dtypes.bfloat16)
    for tile_rows in SWAPPED:
        found = multiply(device, a, operand, offsets, tile_rows, act, ml_dtypes.bfloat16)
        np.testing.assert_array_equal(bits(found), bits(expected))


RING_FAULTS = {
    "none": ("", ""),
    "turns are not waited for": ("{ ptx::barrier_wait(1 + group, 256); }", "{}"),
    "a stage is multiplied before it is full": ("ptx::mbarrier_wait(ring.full(at.slot()), at.parity());", ""),
    "a stage is filled before it is empty": ("ptx::mbarrier_wait(ring.empty(at.slot()), at.parity() ^ 1);", ""),
    "a stage is given back under its multiplies": ("ptx::wgmma_wait<1>();", "ptx::wgmma_wait<2>();"),
    "a stage is given back to one block": ("if (block < 2) ptx::mbarrier", "if (block < 1) ptx::mbarrier"),
    "sums are stored before they are there": ("    ptx::wgmma_wait<0>();\n", "ptx::wgmma_wait<1>();\n"),
    "the other's stages are not skipped": ("at.number += steps;  // the other's tile", ";"),
    "a block ends before its neighbour": ("    ptx::cluster_sync();  // the other", "    // the other"),
}
FAULTS = {
    **RING_FAULTS,
    "a short tile waits for rows that nobody copies": ("(both ? I::kRowsBytes : I::kRowsBytes / 2)", "I::kRowsBytes"),
    "the second half of a long tile is left out": ("if (both)\n", "if (false)\n"),
    "lanes store what others have not written yet": ("        __syncwarp();\n        store_tile", "        store_tile"),
    "the next tile is noted before all have read this one": (
        "tile = noted_tile<I>();\n        __syncwarp();\n", "tile = noted_tile<I>();\n"
    ),
    "weights are shared by blocks of two experts": ("shared = other.expert == tile.expert && ", "shared = "),
    "both blocks bring the same half": ("half ? second : first", "first"),
}  # fmt: skip
SWAPPED_FAULTS = {
    **RING_FAULTS,
    "the next tile is noted before all have stored this one": (
        "        store_swapped<I>(p, sums);\n        __syncwarp();\n", "        store_swapped<I>(p, sums);\n"
    ),
    "the last rows of a tile are not copied": ("(tile.rows + I::kBoxRows - 1)", "(tile.rows - 1)"),
    "rows are shared by tiles of two experts": ("tile.first_row == other.first_row && tile.rows == other.rows", "true"),
    "both blocks bring the same rows": ("box = shared ? half : 0;", "box = 0;"),
    "fewer rows are multiplied": ("if (rows > kRows) return", "if (rows > kRows + 8) return"),
}  # fmt: skip
ALL_FAULTS = {"sm90.cu": FAULTS, "sm90_swapped.cu": SWAPPED_FAULTS}
PROGRAM = """
import sys
import numpy as np, ml_dtypes
from pymoe.activations import ActivationConfig
from pymoe.codec.weights import WeightOperand
from pymoe.ops.grouped_gemm import _cuda
from tests.emulator import emulator, sm90

unit, old, new = sys.argv[1:]
paths = [emulator._folder() / "grouped_gemm" / name for name in (unit, "sm90_ring.cuh")]
if old:
    (path,) = (path for path in paths if old in path.read_text())
    assert path.read_text().count(old) == 1
    path.write_text(path.read_text().replace(old, new))
rng = np.random.default_rng(0)
N = 400 if unit == "sm90.cu" else 328  # an odd number of tiles, so that neighbours may have other rows or weights
a, w = (rng.integers(-3, 4, shape).astype(ml_dtypes.bfloat16) for shape in ((400, 400), (2, N, 400)))
offsets, weights = np.array([0, 130, 400], np.int32), WeightOperand.unquantized(w)
wide = [x.astype(np.float32) for x in (a[:130], w[0], a[130:], w[1])]
sums = np.concatenate([wide[0] @ wide[1].T, wide[2] @ wide[3].T])
with sm90.emulation():
    # From registers, in turns; and by way of shared memory, which an activation without a gate takes, together.
    relu2 = (ActivationConfig("relu2_no_mul"), np.maximum(sums, 0) ** 2)
    for act, expected in ((None, sums), relu2) if unit == "sm90.cu" else ((None, sums),):
        out = np.full((400, N), np.nan, np.float32)
        tiles = _cuda.list_tiles(offsets, 400, 128 if unit == "sm90.cu" else 192, unit != "sm90.cu")
        _cuda.grouped_gemm(a, weights, tiles, activation=act, out=out)
        if not np.array_equal(out, expected):
            sys.exit(3)
"""


@pytest.mark.compile
@pytest.mark.parametrize("unit, fault", [(unit, fault) for unit, faults in ALL_FAULTS.items() for fault in faults])
def test_each_wait_is_needed(unit, fault):
    """Without any one of them the sums are wrong, or threads wait for ever, which ends the emulator."""
    command = [sys.executable, "-c", PROGRAM, unit, *ALL_FAULTS[unit][fault]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    said = f"{done.returncode}: {done.stderr[-2000:]}"
    if fault == "none":
        assert done.returncode == 0, said
    else:
        assert done.returncode == 3 or (done.returncode == -6 and "emulator: " in done.stderr), said


@pytest.mark.gpu
def test_one_graph_for_every_routing(cuda):
    """A captured GEMM reads the work list anew: replayed with other lists, and the first one again."""
    from pymoe.ops.grouped_gemm import _cuda

    E, P = 7, 6000
    host, operand = problem(E, 384, 256, P, ml_dtypes.bfloat16)
    a = cuda.asarray(host)
    sent = dataclasses.replace(operand, codes=cuda.asarray(operand.codes), bias=cuda.asarray(operand.bias))
    fixed = _cuda.list_tiles(cuda.asarray(offsets_of("even", E, P)), P, 128)
    out, stream = cuda.empty((P, 384), np.float32), cuda.cuda.Stream(non_blocking=True)
    _cuda.grouped_gemm(a, sent, fixed, out=out)
    cuda.cuda.Device().synchronize()
    with stream:
        stream.begin_capture()
        _cuda.grouped_gemm(a, sent, fixed, out=out)
        graph = stream.end_capture()
    for routing in ("one", "skewed", "none", "even", "one"):
        offsets = offsets_of(routing, E, P)
        other = _cuda.list_tiles(cuda.asarray(offsets), P, 128)
        fixed.tiles[...], fixed.tile_count[...], out[...] = other.tiles, other.tile_count, np.nan
        cuda.cuda.Device().synchronize()
        graph.launch(stream)
        stream.synchronize()
        live = offsets[-1]
        np.testing.assert_array_equal(out[:live].get(), multiply("cuda", host, operand, offsets, 16)[:live])
        assert np.isnan(out[live:].get()).all()


@pytest.mark.gpu
def test_a_caller_s_rows_are_not_mapped_while_a_tape_records(cuda):
    """A tensor map would keep the address of this call's array; by row number, a tape finds the next call's."""
    from pymoe.device.tape import Recorder
    from pymoe.ops.grouped_gemm import _cuda

    host, operand = problem(3, 192, 128, 300, ml_dtypes.bfloat16)
    other, _ = problem(3, 192, 128, 300, ml_dtypes.bfloat16, seed=1)
    a, b = cuda.asarray(host), cuda.asarray(other)
    sent = dataclasses.replace(operand, codes=cuda.asarray(operand.codes), bias=cuda.asarray(operand.bias))
    offsets = offsets_of("even", 3, 300)
    tiles, out = _cuda.list_tiles(cuda.asarray(offsets), 300, 128), cuda.empty((300, 192), np.float32)
    recorder = Recorder([a, out])
    with recorder.active():
        _cuda.grouped_gemm(a, sent, tiles, out=out)
    stream = cuda.cuda.get_current_stream()
    recorder.tape().play([b.data.ptr, out.data.ptr], cuda.cuda.runtime.getDevice(), stream.ptr)
    np.testing.assert_array_equal(out.get(), multiply("cuda", other, operand, offsets, 16))


@pytest.mark.gpu
def test_a_map_that_the_driver_refuses_says_why(cuda):
    from pymoe.device.tensor_maps import tensor_map
    from pymoe.errors import UnsupportedError

    with pytest.raises(
        UnsupportedError, match=r"must have a tensor map; got CUDA_ERROR_INVALID_VALUE for shape \(4, 8\)"
    ):
        tensor_map(0x7F0000000008, 2, (4, 8), (4, 64))
