"""The Numba kernels as Python on the host, under Numba's simulator: ``NUMBA_ENABLE_CUDASIM=1 pytest tests/numba_cuda``.

A thread of the host stands for each thread of the device, so problems are small; tiles and blocks of threads shrink
with them, so that every edge is met.  Numba decides at import whether it simulates: these tests are a process of their
own.
"""

from __future__ import annotations

import dataclasses
import importlib
import math

import numba
import numpy as np
import pytest

import pymoe
from pymoe import NumbaCudaExperts, SingleProcessPrepareAndFinalize
from pymoe.activations import ActivationConfig
from pymoe.codec.e8m0 import decode_e8m0
from pymoe.codec.fp8 import decode_e4m3, encode_e4m3
from pymoe.codec.weights import WeightOperand
from pymoe.kernel import modular
from pymoe.ops.activation import activation
from pymoe.ops.grouped_gemm import grouped_gemm
from pymoe.ops.permute import permute
from pymoe.ops.quantize import quantize_activations
from pymoe.ops.unpermute import unpermute
from tests.experts.test_pairs import Problem
from tests.formula import untranslated
from tests.selection import BF16, selection
from tests.test_selection import apply, kernel_for

pytestmark = pytest.mark.skipif(
    not numba.config.ENABLE_CUDASIM, reason="needs NUMBA_ENABLE_CUDASIM=1 when the process starts"
)
HIDDEN = [np.float32, np.float16, BF16]
PARAMETERS = {"swigluoai_uninterleave": {"clamp_limit": 1.5}, "situ": {"situ_beta": 1.25, "situ_linear_beta": 2.0}}
ACTIVATIONS = [a for a in pymoe.MoEActivation if a.value != "relu2"]


class DirtyNumpy:
    """NumPy, whose uninitialised memory is full of one byte: NaN and -1, or NaN and the largest index."""

    def __init__(self, fill):
        self._fill = fill

    def __getattr__(self, name):
        return getattr(np, name)

    def empty(self, shape, dtype=float):
        array = np.empty(shape, dtype)
        array.reshape(-1).view(np.uint8)[:] = self._fill
        return array


@pytest.fixture(autouse=True)
def small_and_dirty(monkeypatch):
    """Shrink tiles and blocks, and give layers and the sort scratch memory that an earlier owner left."""
    for op, name in (
        ("grouped_gemm", "TILE"), ("permute", "THREADS"), ("quantize", "THREADS"), ("unpermute", "THREADS"),
        ("activation", "THREADS"),
    ):  # fmt: skip
        monkeypatch.setattr(importlib.import_module(f"pymoe.ops.{op}._numba_cuda"), name, 4)
    monkeypatch.setattr(importlib.import_module("pymoe.ops.activation._numba_cuda_formula"), "THREADS", 4)
    dirt(monkeypatch, 0xFF)


def dirt(monkeypatch, fill):
    numpy = DirtyNumpy(fill)
    monkeypatch.setattr(modular, "np", numpy)
    monkeypatch.setattr(importlib.import_module("pymoe.ops.permute._numba_cuda"), "namespace", lambda _: numpy)


def answer(problem):
    return apply(kernel_for(problem, NumbaCudaExperts, SingleProcessPrepareAndFinalize()), problem)


def check(problem):
    np.testing.assert_array_equal(answer(problem), problem.expected())


def small(scheme, *, M=3, K=7, width=5, E=2, topk=2, dtype=np.float32, kind="silu", biases=True):
    """Return a random problem that the simulator can run; blocks are 3 by 3, no multiple of a tile."""
    rng = np.random.default_rng(0)
    act = kind if isinstance(kind, ActivationConfig) else ActivationConfig(kind)
    N = width * (2 if act.is_gated else 1)
    w1, w2 = rng.standard_normal((E, N, K)).astype(np.float32), rng.standard_normal((E, K, width)).astype(np.float32)
    if scheme in ("none", *HIDDEN):
        w1, w2, config = w1.astype(dtype), w2.astype(dtype), pymoe.FusedMoEQuantConfig.make()
    else:
        w1, w2, config = pymoe.quantize_experts(w1, w2, scheme, group_size=3 if "block" in scheme else None)
    if biases:
        b1, b2 = rng.standard_normal((E, N)).astype(np.float32), rng.standard_normal((E, K)).astype(np.float32)
        config = dataclasses.replace(
            config, w1=dataclasses.replace(config.w1, bias=b1), w2=dataclasses.replace(config.w2, bias=b2)
        )
    x, ids = rng.standard_normal((M, K)).astype(dtype), rng.integers(-1, E, (M, topk)).astype(np.int32)
    ids[0] = [E, -7][:topk]
    return Problem(x, w1, w2, rng.random((M, topk)).astype(np.float32), ids, config, act)


def run(problem, cls=NumbaCudaExperts, **options):
    E = problem.w1.shape[0]
    config = dataclasses.replace(problem.config(), num_experts=E, num_local_experts=E, hidden_dim=problem.x.shape[1])
    experts = cls(config, problem.quant_config)
    return problem.run(experts, SingleProcessPrepareAndFinalize(), **options)


@pytest.mark.parametrize(
    "M, K, width, E, topk, dtype",
    [(1, 1, 1, 1, 1, BF16), (5, 9, 7, 3, 2, np.float32), (5, 4, 5, 2, 1, np.float16), (2, 4, 3, 6, 4, BF16)],
)
def test_the_oracle_at_odd_sizes(M, K, width, E, topk, dtype):
    check(selection(M, K, width, E, topk, dtype=dtype, mapped=E == 3, dead=0.3))


def test_what_memory_held_before_changes_nothing(monkeypatch):
    for fill in (0x7F, 0x00):
        dirt(monkeypatch, fill)
        check(selection(3, 5, 5, 3, 2, dead=0.3))


def test_the_oracle_sees_the_smallest_faults():
    for fault in (
        lambda p: p.w1.__setitem__((slice(None), slice(None), 4), 0),
        lambda p: p.w2.__setitem__((slice(None), slice(None), 4), 0),
        lambda p: p.topk_ids.__setitem__((2, 1), -1),
    ):
        problem = selection(3, 5, 5, 3, 2, dead=0)
        expected = problem.expected()
        fault(problem)
        assert not np.array_equal(answer(problem), expected)


SCHEMES = ["none", "fp8_w8a8", "fp8_w8a8_tensor", "fp8_w8a8_tensor_token", "fp8_w8a8_block", "fp8_w8a8_block_ue8m0",
           "int8_w8a8", "int8_w8a8_tensor", "int8_w8a8_block", "fp8_w8a16"]  # fmt: skip


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_pair_agrees_with_the_definition(scheme):
    p = small(scheme)
    expected = run(p, pymoe.NumpyReferenceExperts)
    np.testing.assert_allclose(run(p), expected, rtol=0, atol=2e-6 * np.abs(expected).max())
    assert not run(p)[0].any()


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_every_activation_agrees_to_4_ulp(kind):
    config = ActivationConfig(kind, **PARAMETERS.get(kind.value, {}))
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, 88.8, -104.0, 3e38, 32.0, -0.3, 8.5]
    x = np.concatenate([special, np.random.default_rng(1).standard_normal(12) * 4]).astype(np.float32)
    x = np.stack([x, x[::-1]])
    expected = activation(x, config, backend="numpy")
    got = activation(x, config, backend="numba_cuda")
    np.testing.assert_array_max_ulp(got[np.isfinite(expected)], expected[np.isfinite(expected)], 4)
    rest = ~np.isfinite(expected)
    np.testing.assert_array_equal(got[rest], expected[rest])


def bent_gate(gate, up):
    return math.tanh(gate) * up + 0.5 if gate > 0 else math.exp(gate * 3.0 + up) / (2.0 + abs(up))


def bent(x):
    return math.floor(x) + math.sqrt(abs(x)) ** 1.5 - math.log(2.0 + x * x)


@pytest.mark.parametrize("fn, gated", [(bent_gate, True), (bent, False)])
def test_registered_activations_have_the_bits_of_the_definition(fn, gated):
    kind = ActivationConfig(pymoe.register_activation(f"simulated_{fn.__name__}", fn, gated))
    x = np.concatenate([[0.0, -0.0, np.inf, np.nan], np.random.default_rng(1).standard_normal(8) * 4]).astype("f4")
    x = np.stack([x, x[::-1]])
    expected = activation(x, kind, backend="numpy")
    np.testing.assert_array_equal(activation(x, kind, backend="numba_cuda"), expected)
    p = small("none", kind=kind)
    expected = run(p, pymoe.NumpyReferenceExperts)
    np.testing.assert_allclose(run(p), expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("fn", [untranslated.helped, untranslated.wave])
def test_functions_that_are_not_translated_have_the_bits_of_numba(fn):
    kind = ActivationConfig(pymoe.register_activation(f"simulated_{fn.__name__}", fn))
    x = np.random.default_rng(1).standard_normal((2, 24)).astype("f4") * 4
    expected = activation(x, kind, backend="numba")
    np.testing.assert_array_equal(activation(x, kind, backend="numba_cuda"), expected)


def test_codes_are_decoded_bit_for_bit():
    from pymoe.codec import _numba_cuda as codec

    tables = {
        codec.E4M3: decode_e4m3(np.arange(256, dtype=np.uint8)),
        codec.E8M0: decode_e8m0(np.arange(256, dtype=np.uint8)),
        codec.INT8: np.arange(256, dtype=np.uint8).view(np.int8).astype(np.float32),
        codec.FLOAT16: np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32),
        codec.BFLOAT16_BITS: np.arange(65536, dtype=np.uint16).view(BF16).astype(np.float32),
    }
    for form, table in tables.items():
        codes = np.arange(len(table), dtype=np.uint16 if len(table) > 256 else np.uint8)
        got = np.array([codec.decode(code, form) for code in codes], np.float32)
        np.testing.assert_array_equal(got.view(np.uint32), table.view(np.uint32))


def test_numbers_are_encoded_bit_for_bit():
    from pymoe.codec import _numba_cuda as codec

    rng = np.random.default_rng(0)
    anything = rng.integers(0, 2**32, 3000, dtype=np.uint32)
    halves = np.arange(0, 65536, 97, dtype=np.uint16).view(np.float16).astype(np.float32).view(np.uint32)
    ties = np.concatenate([halves, halves + 0x1000, halves + 0xFFF, halves + 0x1001]).astype(np.uint32)
    small_numbers = rng.integers(0x32000000, 0x45000000, 3000, dtype=np.uint32)
    values = np.concatenate([anything, ties, small_numbers]).view(np.float32)
    with np.errstate(all="ignore"):
        for form, dtype in ((codec.FLOAT16, np.float16), (codec.BFLOAT16_BITS, BF16)):
            got = np.array([codec.encode(v, form) for v in values], np.uint16)
            nan = np.isnan(values)
            np.testing.assert_array_equal(got[~nan], values.astype(dtype).view(np.uint16)[~nan])
            assert np.isnan(got.view(dtype)[nan].astype(np.float32)).all()
        np.testing.assert_array_equal([codec.encode_e4m3(v) for v in values], encode_e4m3(values))


@pytest.mark.parametrize("scheme", ["fp8_w8a8", "fp8_w8a8_tensor", "fp8_w8a8_block", "fp8_w8a8_block_ue8m0",
                                    "int8_w8a8", "int8_w8a8_tensor", "int8_w8a8_block"])  # fmt: skip
@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_codes_and_scales_are_those_of_the_definition(scheme, dtype):
    """Ordinary rows, zeros, the largest and the least numbers, infinities, NaN, halves; a tail of a group."""
    config = small(scheme).quant_config
    x = np.random.default_rng(0).standard_normal((8, 11)).astype(np.float32)
    x[1], x[2, 3], x[3, 2], x[4, :4], x[5] = 0, np.inf, np.nan, 3e38, x[5] * 1e-40
    x[6], x[7] = np.arange(11) - 5.5, 1e-12
    x[6, 0] = 127
    x = x.astype(dtype)
    live = np.array([True] * 7 + [False])
    tensor = scheme.endswith("tensor")
    options = {"live": live} if tensor else {}
    expected, expected_scale = quantize_activations(x, config, backend="numpy", **options)
    got, scale = quantize_activations(x, config, backend="numba_cuda", **options)
    rows = live if tensor else slice(None)
    np.testing.assert_array_equal(got[rows], expected[rows])
    np.testing.assert_array_equal(scale.view(np.uint8), expected_scale.view(np.uint8))


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.int64, np.uint64])
@pytest.mark.parametrize("mapped", [False, True])
def test_permute_is_the_definition(mapped, dtype, monkeypatch):
    dirt(monkeypatch, 0x7F)
    rng = np.random.default_rng(0)
    E = 5
    ids = rng.integers(0, 7, (7, 3)).astype(dtype)
    ids[2, 1], ids[3] = np.iinfo(dtype).max, 0
    if np.iinfo(dtype).min:
        ids[0, 0], ids[1, 1] = -1, np.iinfo(dtype).min
    expert_map = np.array([3, -1, 0, 4, -1, 1], np.int32) if mapped else None
    expected = permute(ids, E, expert_map=expert_map, backend="numpy")
    found = permute(ids, E, expert_map=expert_map, tile_rows=2, backend="numba_cuda")
    P = expected.P
    np.testing.assert_array_equal(found.expert_offsets, expected.expert_offsets)
    np.testing.assert_array_equal(found.slot_to_row, expected.slot_to_row)
    np.testing.assert_array_equal(found.row_to_slot[:P], expected.row_to_slot)
    assert (found.row_to_slot[P:] == -1).all()
    offsets = expected.expert_offsets
    tiles = [(e, r, min(2, offsets[e + 1] - r), 0) for e in range(E) for r in range(offsets[e], offsets[e + 1], 2)]
    assert found.tiles[: found.tile_count[0]].tolist() == [list(map(int, tile)) for tile in tiles]


@pytest.mark.parametrize("dtype", HIDDEN)
def test_unpermute_is_the_definition(dtype):
    rng = np.random.default_rng(0)
    ids = rng.integers(-1, 4, (5, 3))
    reference, found = permute(ids, 4, backend="numpy"), permute(ids, 4, backend="numba_cuda")
    rows, weights = rng.standard_normal((15, 5)).astype(np.float32), rng.standard_normal((5, 3)).astype(np.float32)
    for given in (weights, None):
        expected = unpermute(rows, reference, topk_weights=given, out_dtype=dtype, backend="numpy")
        y = unpermute(rows, found, topk_weights=given, out_dtype=dtype, backend="numba_cuda")
        np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("gather", [None, np.array([2, 0, 0, 1, 2, 2, 1])])
def test_the_gemm_sums_k_in_ascending_order(gather):
    """Products of 2^24 and 1: any other order, or float64, gives another sum."""
    a = np.array([[2.0**24, 1, 1, -(2.0**24), 1, 1, 0]] * 7, np.float32)
    w = WeightOperand.unquantized(np.ones((2, 3, 7), np.float32))
    y = grouped_gemm(a, w, [0, 5, 7], gather=gather, backend="numba_cuda")
    np.testing.assert_array_equal(y, np.full((7, 3), 2.0))


def test_a_nan_stays_in_its_row():
    for scheme in ("none", "int8_w8a8"):
        p = small(scheme, biases=False)
        p.ids[:] = [[0, 1], [1, 0], [1, 0]]
        clean = run(p)
        p.x[1, 3] = np.nan
        y = run(p)
        np.testing.assert_array_equal(y[[0, 2]], clean[[0, 2]])
        assert np.isnan(y[1]).all()


def test_chunks_change_no_bit_and_inputs_are_left_alone():
    p = small("fp8_w8a8")
    before = p.x.copy(), p.w1.copy(), p.ids.copy()
    np.testing.assert_array_equal(run(p, chunk_size=2), run(p))
    for array, copy in zip((p.x, p.w1, p.ids), before, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_a_static_scale_and_the_weight_on_the_input():
    p = small("fp8_w8a8_tensor", topk=1)
    p.ids = p.ids[:, :1]
    scales = {name: getattr(p.quant_config, name[:2]).scale for name in ("w1_scale", "w2_scale")}
    config = pymoe.FusedMoEQuantConfig.fp8_w8a8(**scales, a1_scale=0.0625, a2_scale=0.03125)
    p = dataclasses.replace(p, quant_config=config, scale=p.scale[:, :1])
    for on_input in (False, True):
        expected = run(p, pymoe.NumpyReferenceExperts, apply_router_weight_on_input=on_input)
        y = run(p, apply_router_weight_on_input=on_input)
        np.testing.assert_allclose(y, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def test_no_tokens_and_no_live_slot():
    p = small("none", biases=False)
    p.ids[:] = -1
    assert not run(p).any()
    nobody = dataclasses.replace(p, x=p.x[:0], ids=p.ids[:0], scale=p.scale[:0])
    assert run(nobody).shape == (0, p.x.shape[1])


def test_arrays_of_a_gpu_are_refused():
    """What a simulated process would do with them is not what the user asked for."""
    from pymoe.device import numba_gpu

    with pytest.raises(pymoe.ArgumentError, match="backend must get NumPy arrays while a GPU is simulated"):
        numba_gpu.require("permute", object())


def test_kernels_that_are_not_there_are_refused_by_name():
    key = pymoe.kMxfp8Dynamic
    w = WeightOperand(np.zeros((1, 4, 32), np.uint8), 32, pymoe.kMxfp8Static, group_scale=np.zeros((1, 4, 1), np.uint8),
                      block=(1, 32))  # fmt: skip
    with pytest.raises(pymoe.UnsupportedError, match="numba_cuda for kMxfp8Static x kMxfp8Dynamic"):
        grouped_gemm(np.zeros((1, 32), np.uint8), w, [0, 1], a_scale=np.zeros((1, 1), np.uint8), a_key=key,
                     backend="numba_cuda")  # fmt: skip
    _, _, config = pymoe.quantize_experts(np.ones((1, 32, 32), "f4"), np.ones((1, 32, 32), "f4"), "mxfp8")
    with pytest.raises(pymoe.UnsupportedError, match="numba_cuda for kMxfp8Dynamic"):
        quantize_activations(np.ones((1, 32), np.float32), config, backend="numba_cuda")
