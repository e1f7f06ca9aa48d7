"""weight_reduce against a plain loop of float32 scalars, bit for bit."""

from __future__ import annotations

import doctest
import importlib
import tempfile
import warnings

import ml_dtypes
import numpy as np
import pytest

from pymoe.errors import ArgumentError, DTypeError, ShapeError
from pymoe.ops.weight_reduce import weight_reduce as stage
from tests.ops.devices import BACKENDS, HOST, staged

weight_reduce = staged(stage)

BF16 = ml_dtypes.bfloat16
DTYPES = ("float32", "float16", BF16)


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture
def sparse():
    """Return a maker of float32 zeros in a sparse file, of which only the pages that are touched exist."""
    with tempfile.TemporaryFile() as file:
        yield lambda shape: np.memmap(file, np.float32, "w+", shape=shape)


def problem(M, topk, K, seed):
    rng = np.random.default_rng(seed)
    slots = rng.standard_normal((M, topk, K)).astype(np.float32)
    return slots, rng.standard_normal((M, topk)).astype(np.float32), rng.integers(-1, 3, (M, topk)).astype(np.int32)


def plain_sum(slots, weights=None, ids=None):
    M, topk, K = slots.shape
    out = np.zeros((M, K), np.float32)
    for t, j, k in np.ndindex(M, topk, K):  # the slot axis outruns k, so each sum sees its slots in order
        if ids is None or ids[t, j] >= 0:
            term = np.float32(slots[t, j, k])
            out[t, k] += term if weights is None else term * np.float32(weights[t, j])
    return out


def bits(x):
    return np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}")


@pytest.mark.parametrize("use_ids", [False, True])
@pytest.mark.parametrize("use_weights", [False, True])
@pytest.mark.parametrize("M, topk, K", [(0, 2, 3), (1, 1, 1), (3, 1, 5), (9, 4, 17), (2, 0, 3), (2, 3, 0), (40, 8, 3)])
def test_against_plain_loop(M, topk, K, use_weights, use_ids, backend):
    slots, weights, ids = problem(M, topk, K, [M, topk, K])
    weights, ids = weights if use_weights else None, ids if use_ids else None
    y = weight_reduce(slots, weights, ids, backend=backend)
    assert y.dtype == np.float32
    assert np.array_equal(bits(y), bits(plain_sum(slots, weights, ids)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slots_dtype", [*DTYPES, "float64"])
def test_one_rounding_to_the_output(slots_dtype, dtype, backend):
    slots, weights, ids = problem(11, 4, 19, 5)
    slots = slots.astype(slots_dtype)
    expected = plain_sum(slots, weights, ids).astype(dtype)
    assert np.array_equal(bits(weight_reduce(slots, weights, ids, out_dtype=dtype, backend=backend)), bits(expected))
    out = np.full((11, 19), np.nan, dtype)
    assert weight_reduce(slots, weights, ids, out=out, backend=backend) is out
    assert np.array_equal(bits(out), bits(expected))
    assert weight_reduce(slots, backend=backend).dtype == slots.dtype


def test_C2_absent_slot_is_neither_read_nor_weighed(backend):
    slots = np.array([[[1.0], [np.nan]], [[np.inf], [np.nan]]], np.float32)
    y = weight_reduce(slots, np.array([[2.0, np.nan], [np.nan, 0.0]]), np.array([[0, -1], [-1, -9]]), backend=backend)
    assert y.tolist() == [[2.0], [0.0]]


def test_C17_a_real_nan_reaches_its_own_element_only(backend):
    slots, weights, _ = problem(5, 2, 6, 1)
    clean = weight_reduce(slots, weights, backend=backend)
    slots[2, 1, 3] = np.nan
    changed = bits(weight_reduce(slots, weights, backend=backend)) != bits(clean)
    assert np.argwhere(changed).tolist() == [[2, 3]]


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int64", "uint64"])
def test_E3_ids_of_any_integer_dtype(dtype, backend):
    ids = np.array([[np.iinfo(dtype).max, 0], [np.iinfo(dtype).min, 1]], dtype)
    y = weight_reduce(np.ones((2, 2, 1), np.float32), None, ids, backend=backend)
    assert y.tolist() == [[2.0], [2.0 if dtype.startswith("u") else 1.0]]


def test_E1_E2_strides(backend):
    slots, weights, ids = problem(6, 4, 10, 2)
    base = np.zeros((6, 8, 21), np.float32)
    base[:, ::2, 1::2] = slots
    out = np.empty((10, 6), np.float32).T
    weight_reduce(base[:, ::2, 1::2], weights[::-1][::-1], np.asfortranarray(ids), out=out, backend=backend)
    assert np.array_equal(bits(out), bits(plain_sum(slots, weights, ids)))
    tiled = np.broadcast_to(slots[:1, :1], (6, 4, 10))
    assert np.array_equal(weight_reduce(tiled, weights, backend=backend), plain_sum(tiled, weights))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_bits_do_not_depend_on_threads(threads, monkeypatch, backend):
    slots, weights, ids = problem(700, 4, 501, 6)
    expected = weight_reduce(slots, weights, ids, backend="numpy")
    monkeypatch.setenv("PYMOE_NUM_THREADS", str(threads))
    assert np.array_equal(bits(weight_reduce(slots, weights, ids, backend=backend)), bits(expected))


@pytest.mark.parametrize("backend", HOST)
def test_D4_slots_beyond_2_to_the_31_elements(sparse, backend):
    topk, K = 2**31 // 4096 // 64, 4096
    slots = sparse((66, topk, K))
    slots[-1, -1], slots[0, 0] = 1.5, 4.0
    ids = np.full((66, topk), -1, np.int8)
    ids[-1, -1] = ids[0, 0] = 3
    y = weight_reduce(slots, None, ids, backend=backend)
    assert (y[-1] == 1.5).all()
    assert (y[0] == 4.0).all()
    assert not y[1:-1].any()


def test_no_warning_leaves_and_inputs_stay(backend):
    slots = np.full((2, 2, 2), 3e38, np.float32)
    slots[1] = np.inf
    slots.flags.writeable = False
    before = np.geterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weight_reduce(slots, np.array([[1e30, -1], [0, 1.0]]), out_dtype="float16", backend=backend)
    assert np.geterr() == before


@pytest.mark.parametrize(
    "change, error, argument",
    [
        ({"slots": np.zeros((2, 2), np.float32)}, ShapeError, "slots"),
        ({"slots": np.zeros((2, 2, 2), np.int32)}, DTypeError, "slots"),
        ({"topk_weights": np.zeros((2, 3))}, ShapeError, "topk_weights"),
        ({"topk_weights": np.zeros((2, 2), int)}, DTypeError, "topk_weights"),
        ({"topk_ids": np.zeros((3, 2), int)}, ShapeError, "topk_ids"),
        ({"topk_ids": np.zeros((2, 2))}, DTypeError, "topk_ids"),
        ({"out": np.zeros((2, 3), np.float32)}, ShapeError, "out"),
        ({"out": np.zeros((2, 2), np.int8)}, DTypeError, "out"),
        ({"out_dtype": np.int8}, DTypeError, "out_dtype"),
        ({"out": np.zeros((2, 2)), "out_dtype": np.float64}, ArgumentError, "out_dtype"),
        ({"backend": "gpu"}, ArgumentError, "backend"),
    ],
)
def test_bad_arguments_are_named(change, error, argument):
    with pytest.raises(error, match=f"^weight_reduce: {argument} must .*; got "):
        weight_reduce(**({"slots": np.zeros((2, 2, 2), np.float32)} | change))


def test_out_may_not_overlap_slots():
    slots = np.zeros((2, 1, 2), np.float32)
    with pytest.raises(ArgumentError, match="out must not overlap slots"):
        weight_reduce(slots, out=slots[:, 0])


def test_examples_in_the_docstrings():
    found = doctest.testmod(importlib.import_module("pymoe.ops.weight_reduce"))
    assert found.attempted
    assert not found.failed
