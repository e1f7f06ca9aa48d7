"""unpermute against two plain loops: float32 scalars bit for bit, float64 within the error of an ordered sum."""

from __future__ import annotations

import contextlib
import doctest
import importlib
import tempfile
import warnings

import ml_dtypes
import numpy as np
import pytest

from pymoe.contracts import RowMap
from pymoe.errors import ArgumentError, DTypeError, ShapeError
from pymoe.ops.permute import permute
from pymoe.ops.permute import permute_rows as rows_stage
from pymoe.ops.unpermute import unpermute as unpermute_stage
from tests.ops.devices import DEVICES, HOST, PORTABLE, emulation, from_cupy, staged, to_cupy

unpermute = staged(unpermute_stage)


def permute_rows(x, row_map, backend=None):
    """On a device the rows have room for all slots; those of the map are compared."""
    return staged(rows_stage)(x, row_map, backend=backend)[: row_map.P]


BF16 = ml_dtypes.bfloat16
DTYPES = ("float32", "float16", BF16)
U = 2.0**-24  # unit roundoff of float32


@pytest.fixture(params=PORTABLE)
def backend(request):
    return request.param


@pytest.fixture
def sparse():
    """Return a maker of float32 zeros in a sparse file, of which only the pages that are touched exist."""
    with tempfile.TemporaryFile() as file:
        yield lambda shape: np.memmap(file, np.float32, "w+", shape=shape)


def problem(M, topk, K, E, seed):
    rng = np.random.default_rng(seed)
    row_map = permute(rng.integers(-1, E, (M, topk)).astype(np.int32), E)
    rows = rng.standard_normal((row_map.P, K)).astype(np.float32)
    return rows, row_map, rng.standard_normal((M, topk)).astype(np.float32)


def plain_sum(rows, row_map, weights, number):
    """Return the sum with every operation done by `number`."""
    M, topk = row_map.slot_to_row.shape
    out = np.zeros((M, rows.shape[1]), number)
    for t in range(M):
        for k in range(rows.shape[1]):
            total = number(0)
            for j in range(topk):
                r = row_map.slot_to_row[t, j]
                if r >= 0:
                    term = number(rows[r, k])
                    total = number(total + (term if weights is None else number(term * number(weights[t, j]))))
            out[t, k] = total
    return out


def bits(x):
    return np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}")


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("M, topk, K", [(0, 2, 3), (1, 1, 1), (2, 1, 5), (7, 3, 17), (33, 8, 4), (5, 2, 0), (3, 0, 4)])
def test_against_plain_loops(M, topk, K, weighted, backend):
    rows, row_map, weights = problem(M, topk, K, 4, [M, topk, K])
    weights = weights if weighted else None
    y = unpermute(rows, row_map, topk_weights=weights, backend=backend)
    assert y.dtype == np.float32
    assert np.array_equal(bits(y), bits(plain_sum(rows, row_map, weights, np.float32)))
    magnitude = plain_sum(np.abs(rows), row_map, None if weights is None else np.abs(weights), np.float64)
    # topk additions and one product, each wrong by at most U: gamma(topk + 1) of the sum of magnitudes.
    gamma = (topk + 1) * U / (1 - (topk + 1) * U)
    assert (np.abs(y - plain_sum(rows, row_map, weights, np.float64)) <= gamma * magnitude).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows_dtype", [*DTYPES, "float64"])
def test_one_rounding_to_the_output(rows_dtype, dtype, backend):
    rows, row_map, weights = problem(19, 4, 23, 5, 7)
    rows = rows.astype(rows_dtype)
    exact = plain_sum(rows, row_map, weights, np.float32)
    y = unpermute(rows, row_map, topk_weights=weights, out_dtype=dtype, backend=backend)
    assert y.dtype == np.dtype(dtype)
    assert np.array_equal(bits(y), bits(exact.astype(dtype)))
    out = np.full((19, 23), np.nan, dtype)
    assert unpermute(rows, row_map, topk_weights=weights, out=out, backend=backend) is out
    assert np.array_equal(bits(out), bits(y))


@pytest.mark.parametrize("dtype", ["float16", BF16])
def test_rounding_of_every_kind_of_value(dtype, backend):
    """Ties, subnormals, overflow and both infinities, through one row of weight 1."""
    edge = np.array(
        [0x3F808000, 0x3F818000, 0x3F801000, 0x3F803000, 0x00000001, 0x80000001, 0x33000000, 0x33000001, 0x387FE000,
         0x387FF000, 0x477FEFFF, 0x477FF000, 0x7F7F7FFF, 0x7F7F8000, 0x7F7FFFFF, 0xFF800000, 0x7F800000, 0x00800000,
         0x007FFFFF, 0x80000000], np.uint32,
    ).view(np.float32)  # fmt: skip
    random = np.random.default_rng(5).integers(0, 2**32, 4000, np.uint32).view(np.float32)
    values = np.r_[edge, random[~np.isnan(random)]][None]
    with np.errstate(all="ignore"):
        expected = (np.float32(0) + values).astype(dtype)
    y = unpermute(values, permute(np.array([[0]]), 1), out_dtype=dtype, backend=backend)
    assert np.array_equal(bits(y), bits(expected))


@pytest.mark.parametrize("topk", range(1, 9))
def test_E12_every_slot_has_its_own_weight(topk, backend):
    ids = np.stack([np.roll(np.arange(8), t)[:topk] for t in range(8)])
    row_map = permute(ids, 8)
    rows = np.repeat(2.0 ** np.arange(8), np.diff(row_map.expert_offsets))[:, None].astype(np.float32)
    weights = np.tile(0.5 ** np.arange(topk), (8, 1))
    y = unpermute(rows, row_map, topk_weights=weights, backend=backend)
    assert y[:, 0].tolist() == (2.0**ids * weights).sum(axis=1).tolist()


def test_E12_a_repeated_expert_counts_twice(backend):
    y = unpermute(
        np.array([[3.0], [3.0]], "f4"), permute(np.array([[0, 0]]), 1), topk_weights=np.array([[0.5, 2.0]]),
        backend=backend,
    )  # fmt: skip
    assert y.tolist() == [[7.5]]


@pytest.mark.parametrize("poison", [np.nan, np.inf, 0.0])
def test_C2_C12_weight_of_an_absent_slot_is_not_read(poison, backend):
    row_map = permute(np.array([[0, -1], [-1, -1], [7, 1]]), 2)
    weights = np.array([[2.0, poison], [poison, poison], [poison, 4.0]])
    y = unpermute(np.array([[1.0], [1.0]], "f4"), row_map, topk_weights=weights, backend=backend)
    assert y.tolist() == [[2.0], [0.0], [4.0]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_C5_C14_C16_token_without_rows_is_zero_in_a_poisoned_output(dtype, backend):
    row_map = permute(np.array([[-1, -1], [0, 1], [-1, -1]]), 2)
    out = np.full((3, 70), np.nan, dtype)
    unpermute(np.ones((2, 70), np.float32), row_map, out=out, backend=backend)
    assert not bits(out)[[0, 2]].any()
    assert (out[1] == 2).all()


def test_C1_rows_beyond_the_live_ones_are_not_read(backend):
    rows, row_map, weights = problem(9, 2, 6, 3, 1)
    longer = np.vstack([rows, np.full((5, 6), np.nan, np.float32)])
    y = unpermute(longer, row_map, topk_weights=weights, backend=backend)
    assert np.array_equal(y, unpermute(rows, row_map, topk_weights=weights, backend=backend))


@pytest.mark.parametrize("dtype", DTYPES)
def test_C17_a_real_nan_reaches_its_own_token_only(dtype, backend):
    rows, row_map, weights = problem(9, 2, 6, 3, 2)
    clean = unpermute(rows, row_map, topk_weights=weights, out_dtype=dtype, backend=backend)
    rows[4, 3] = np.nan
    y = unpermute(rows, row_map, topk_weights=weights, out_dtype=dtype, backend=backend)
    token = row_map.row_to_token[4]
    assert np.isnan(y[token, 3])
    changed = bits(y) != bits(clean)
    changed[token, 3] = False
    assert not changed.any()


@pytest.mark.parametrize("fill", [0x00, 0x7F, 0xFF])
def test_C10_canaries_around_the_output(fill, backend):
    rows, row_map, weights = problem(6, 3, 13, 4, 3)
    guarded = np.frombuffer(bytearray([fill]) * (8 * 13 * 4), np.float32).reshape(8, 13)
    before = guarded.copy()
    unpermute(rows, row_map, topk_weights=weights, out=guarded[1:7], backend=backend)
    assert np.array_equal(bits(guarded[[0, 7]]), bits(before[[0, 7]]))
    assert np.array_equal(guarded[1:7], unpermute(rows, row_map, topk_weights=weights, backend=backend))


@pytest.mark.parametrize("dtype", DTYPES)
def test_E1_E6_strides(dtype, backend):
    rows, row_map, weights = problem(8, 2, 12, 3, 4)
    expected = unpermute(rows, row_map, topk_weights=weights, out_dtype=dtype, backend=backend)
    base = np.zeros((rows.shape[0], 25), np.float32)
    base[:, 1::2] = rows
    wide = np.full((8, 24), np.nan, dtype)
    out = wide[:, ::2]
    unpermute(base[:, 1::2], row_map, topk_weights=np.asfortranarray(weights), out=out, backend=backend)
    assert np.array_equal(out, expected)
    assert np.isnan(wide[:, 1::2]).all()
    backwards = np.empty((8, 12), dtype)[::-1]
    unpermute(np.asfortranarray(rows), row_map, topk_weights=weights, out=backwards, backend=backend)
    assert np.array_equal(backwards, expected)


def test_rows_do_not_depend_on_their_company(backend):
    rng = np.random.default_rng(6)
    ids = rng.integers(-1, 5, (40, 3))
    outputs, weights = rng.standard_normal((40, 5, 9)).astype(np.float32), rng.standard_normal((40, 3))

    def run(tokens):
        row_map = permute(ids[tokens], 5)
        expert = np.repeat(np.arange(5), np.diff(row_map.expert_offsets))
        rows = outputs[tokens][row_map.row_to_token, expert]
        return unpermute(rows, row_map, topk_weights=weights[tokens], backend=backend)

    whole = run(np.arange(40))
    assert np.array_equal(bits(np.vstack([run(np.array([t])) for t in range(40)])), bits(whole))
    assert np.array_equal(bits(np.vstack([run(np.arange(0, 17)), run(np.arange(17, 40))])), bits(whole))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_bits_do_not_depend_on_threads(threads, monkeypatch, backend):
    rows, row_map, weights = problem(700, 4, 501, 6, 11)
    monkeypatch.setenv("PYMOE_NUM_THREADS", "3")
    expected = unpermute(rows, row_map, topk_weights=weights, out_dtype=BF16, backend="numpy")
    monkeypatch.setenv("PYMOE_NUM_THREADS", str(threads))
    y = unpermute(rows, row_map, topk_weights=weights, out_dtype=BF16, backend=backend)
    assert np.array_equal(bits(y), bits(expected))


@pytest.mark.parametrize("backend", HOST)
def test_D4_rows_beyond_2_to_the_31_elements(sparse, backend):
    P, K = 2**31 // 4096 + 3, 4096
    rows = sparse((P, K))
    rows[-1], rows[-3], rows[0] = 1.5, 0.25, 4.0
    slot_to_row = np.array([[P - 1, P - 3], [-1, 0]])
    row_map = RowMap(np.array([0, P]), np.empty(0, np.int64), slot_to_row)
    assert unpermute(rows, row_map, backend=backend).tolist() == [[1.75] * K, [4.0] * K]


@pytest.mark.parametrize("M", [1, 65, 4097])
def test_D7_round_trip(M, backend):
    rng = np.random.default_rng(M)
    x = rng.integers(-100, 100, (M, 33)).astype(np.float32)
    row_map = permute(np.argsort(rng.random((M, 6)), axis=1)[:, :4], 6)
    rows = permute_rows(x, row_map, backend=backend)
    y = unpermute(rows, row_map, topk_weights=np.full((M, 4), 0.25), backend=backend)
    assert np.array_equal(x, y)


def test_B6_inputs_are_unchanged_and_no_warning_leaves(backend):
    rows, row_map, weights = problem(5, 2, 4, 3, 8)
    rows[0] = [np.inf, -np.inf, 3e38, np.nan]
    weights[:, 0] = [np.inf, 0, 3e38, -3e38, 1e-45]
    kept = rows.copy(), weights.copy()
    for frozen in (rows, weights):
        frozen.flags.writeable = False
    before = np.geterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unpermute(rows, row_map, topk_weights=weights, out_dtype="float16", backend=backend)
    assert np.geterr() == before
    assert np.array_equal(bits(rows), bits(kept[0]))
    assert np.array_equal(bits(weights), bits(kept[1]))


def _bad(case):
    rows, row_map, weights = problem(4, 2, 3, 2, 9)
    arguments = {"rows": rows, "row_map": row_map, "topk_weights": weights}
    frozen = np.zeros((4, 3), np.float32)
    frozen.flags.writeable = False
    change = {
        "rows.ndim": {"rows": rows[0]},
        "rows.dtype": {"rows": rows.astype(np.int32)},
        "rows.length": {"rows": rows[:-1]},
        "weights.shape": {"topk_weights": weights[:, :1]},
        "weights.dtype": {"topk_weights": weights.astype(np.int32)},
        "out.shape": {"out": np.zeros((4, 4), np.float32)},
        "out.readonly": {"out": frozen},
        "out.list": {"out": [[0.0] * 3] * 4},
        "out.dtype": {"out": np.zeros((4, 3), np.int32)},
        "out_dtype.kind": {"out_dtype": np.int32},
        "out_dtype.both": {"out_dtype": np.float32, "out": np.zeros((4, 3), np.float32)},
        "backend": {"backend": "gpu"},
    }
    return arguments | change[case]


@pytest.mark.parametrize(
    "case, error, argument",
    [
        ("rows.ndim", ShapeError, "rows"),
        ("rows.dtype", DTypeError, "rows"),
        ("rows.length", ShapeError, "rows"),
        ("weights.shape", ShapeError, "topk_weights"),
        ("weights.dtype", DTypeError, "topk_weights"),
        ("out.shape", ShapeError, "out"),
        ("out.readonly", ArgumentError, "out"),
        ("out.list", DTypeError, "out"),
        ("out.dtype", DTypeError, "out"),
        ("out_dtype.kind", DTypeError, "out_dtype"),
        ("out_dtype.both", ArgumentError, "out_dtype"),
        ("backend", ArgumentError, "backend"),
    ],
)
def test_bad_arguments_are_named(case, error, argument):
    with pytest.raises(error, match=f"^unpermute: {argument} must .*; got "):
        unpermute(**_bad(case))


def test_out_may_not_overlap_an_input():
    row_map = permute(np.array([[0], [0]]), 1)
    rows = np.zeros((3, 2), np.float32)
    with pytest.raises(ArgumentError, match="out must not overlap rows"):
        unpermute(rows[:2], row_map, out=rows[1:])


def test_examples_in_the_docstrings():
    found = doctest.testmod(importlib.import_module("pymoe.ops.unpermute"))
    assert found.attempted
    assert not found.failed


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size, shift", [(1, 0), (1023, 0), (1024, 0), (2052, 0), (1024, 1)])
def test_sums_that_began_as_zeros_are_rounded(device, size, shift):
    """Only theirs is written, in pieces of four numbers or, where those do not fit, one by one."""
    from pymoe.ops.unpermute import _cuda

    sums = np.random.default_rng(0).standard_normal(size + 8).astype(np.float32)
    sums[:8] = (np.inf, -np.inf, 1e30, 1 + 2.0**-8, 1 + 3 * 2.0**-8, -0.0, 2.0**-140, 7)
    send, fetch = (to_cupy, from_cupy) if device == "cuda" else (np.copy, np.asarray)
    part = slice(shift, shift + size)
    with contextlib.nullcontext() if device == "cuda" else emulation():
        for dtype in (np.float16, BF16):
            out, given = send(np.full(size + 8, 7, dtype)), send(sums)
            _cuda.round_sums(given[part], out[part])
            expected = np.full(size + 8, 7, dtype)
            with np.errstate(over="ignore"):
                expected[part] = sums[part].astype(dtype)
            np.testing.assert_array_equal(fetch(out).view(np.uint16), expected.view(np.uint16))
            _cuda.zero_sums(given[part])
            expected = sums.copy()
            expected[part] = 0
            np.testing.assert_array_equal(fetch(given).view(np.uint32), expected.view(np.uint32))
