"""The four ways to finish the experts' output, against plain loops over tokens and slots."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest

from pymoe.errors import ArgumentError, DTypeError, ShapeError, UnsupportedError
from pymoe.ops.permute import permute
from pymoe.ops.unpermute import unpermute
from pymoe.weight_and_reduce import (
    TopKWeightAndReduceContiguous,
    TopKWeightAndReduceDelegate,
    TopKWeightAndReduceNaiveBatched,
    TopKWeightAndReduceNoOP,
)

BF16 = ml_dtypes.bfloat16
DTYPES = ("float32", "float16", BF16)
WEIGHTS, IDS = np.array([[0.5, 2.0], [1.0, 4.0]], np.float32), np.array([[0, 1], [1, 0]], np.int32)


def every_kind():
    return [
        TopKWeightAndReduceDelegate(),
        TopKWeightAndReduceNoOP(),
        TopKWeightAndReduceContiguous(),
        TopKWeightAndReduceNaiveBatched(0),
        TopKWeightAndReduceNaiveBatched(1),
    ]


def test_equality_is_by_type_and_rank():
    for (i, a), (j, b) in itertools.product(enumerate(every_kind()), repeat=2):
        assert (a == b) == (i == j)
        assert i != j or hash(a) == hash(b)
    assert TopKWeightAndReduceNoOP() != "TopKWeightAndReduceNoOP()"
    names = [repr(kind) for kind in every_kind()]
    assert names[0] == "TopKWeightAndReduceDelegate()"
    assert names[-1] == "TopKWeightAndReduceNaiveBatched(rank=1)"


def test_rank_must_be_a_count():
    with pytest.raises(ArgumentError, match="rank must be at least 0; got -1"):
        TopKWeightAndReduceNaiveBatched(-1)
    with pytest.raises(DTypeError, match="rank must be an integer"):
        TopKWeightAndReduceNaiveBatched(1.0)


def test_delegate_is_never_applied():
    with pytest.raises(UnsupportedError, match="weight_and_reduce_impl must be replaced by the prepare/finalize"):
        TopKWeightAndReduceDelegate().apply(None, np.zeros((2, 3)), WEIGHTS, IDS, False)


def test_noop_passes_through_or_copies():
    impl, rows = TopKWeightAndReduceNoOP(), np.arange(6, dtype=np.float32).reshape(2, 3)
    assert impl.apply(None, rows, WEIGHTS, IDS, False) is rows
    assert impl.apply(rows, rows, WEIGHTS, IDS, False) is rows
    output = np.full((2, 3), np.nan, np.float32)
    assert impl.apply(output, rows, WEIGHTS, IDS, False) is output
    assert np.array_equal(output, rows)
    output[0] = -1
    assert rows.tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_noop_rounds_to_the_output_once(dtype):
    rows = (np.random.default_rng(1).standard_normal((2, 9)) * 1e4).astype(np.float32)
    rows[0, 0], rows[1, 1] = 1e38, np.nan
    output = TopKWeightAndReduceNoOP().apply(np.empty((2, 9), dtype), rows, WEIGHTS, IDS, False)
    with np.errstate(all="ignore"):
        assert np.array_equal(output.view(np.uint8), rows.astype(dtype).view(np.uint8))


def test_noop_refuses_another_shape():
    with pytest.raises(ShapeError, match=r"output must have shape \(2, 3\); got \(3, 3\)"):
        TopKWeightAndReduceNoOP().apply(np.zeros((3, 3)), np.zeros((2, 3)), WEIGHTS, IDS, False)


def test_noop_copies_through_overlapping_views():
    rows = np.arange(8, dtype=np.float32).reshape(4, 2)
    TopKWeightAndReduceNoOP().apply(rows[1:], rows[:3], WEIGHTS, IDS, False)
    assert rows.tolist() == [[0, 1], [0, 1], [2, 3], [4, 5]]


def plain_contiguous(slots, weights, ids):
    """Return float32 sums in slot order."""
    M, topk, K = slots.shape
    out = np.zeros((M, K), np.float32)
    for t, j, k in np.ndindex(M, topk, K):
        if ids[t, j] >= 0:
            out[t, k] += np.float32(slots[t, j, k]) * (np.float32(1) if weights is None else weights[t, j])
    return out


@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M, topk", [(0, 2), (1, 1), (9, 4)])
def test_contiguous_against_plain_loop(M, topk, dtype, flat, on_input):
    rng = np.random.default_rng([M, topk])
    slots = rng.standard_normal((M, topk, 7)).astype(dtype)
    weights = rng.standard_normal((M, topk)).astype(np.float32)
    ids = rng.integers(-1, 3, (M, topk)).astype(np.int32)
    kept = slots.copy()
    expected = plain_contiguous(slots, None if on_input else weights, ids).astype(dtype)
    rows = slots.reshape(M * topk, 7) if flat else slots
    made = TopKWeightAndReduceContiguous().apply(None, rows, weights, ids, on_input)
    assert made.dtype == slots.dtype
    assert np.array_equal(made, expected)
    output = np.full((M, 7), np.nan, dtype)
    assert TopKWeightAndReduceContiguous().apply(output, rows, weights, ids, on_input) is output
    assert np.array_equal(output, expected)
    assert np.array_equal(slots, kept)


def test_C2_contiguous_skips_slots_without_an_expert():
    slots = np.array([[[1.0], [np.nan]]], np.float32)
    weights = np.array([[3.0, np.nan]], np.float32)
    assert TopKWeightAndReduceContiguous().apply(None, slots, weights, np.array([[5, -1]]), False).tolist() == [[3.0]]


def test_contiguous_refuses_another_number_of_rows():
    with pytest.raises(ShapeError, match=r"fused_expert_output must have shape \(4, any\) or \(2, 2, any\)"):
        TopKWeightAndReduceContiguous().apply(None, np.zeros((3, 2), np.float32), WEIGHTS, IDS, False)


def slabs_of(ids, outputs, first, E_local, capacity, fill=np.nan):
    """Return the slabs a batched dispatcher hands back: expert e's tokens in token order, each once."""
    slabs = np.full((E_local, capacity, outputs.shape[2]), fill, outputs.dtype)
    for e in range(E_local):
        tokens = [t for t in range(len(ids)) if first + e in ids[t]]
        for place, t in enumerate(tokens):
            slabs[e, place] = outputs[t, first + e]
    return slabs


def plain_batched(ids, outputs, weights, first, E_local):
    out = np.zeros((len(ids), outputs.shape[2]), np.float32)
    for t, j in np.ndindex(ids.shape):
        if first <= ids[t, j] < first + E_local:
            out[t] += np.float32(outputs[t, ids[t, j]]) * np.float32(1 if weights is None else weights[t, j])
    return out


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M, topk, E_local", [(0, 2, 3), (1, 1, 1), (13, 4, 3), (8, 2, 0)])
def test_naive_batched_against_plain_loop(M, topk, E_local, dtype, rank):
    """Unused rows of the slabs are NaN; ids of other ranks and repeated ids occur."""
    rng = np.random.default_rng([M, topk, rank])
    E = 3 * E_local
    outputs = rng.standard_normal((M, max(E, 1), 6)).astype(dtype)
    ids = rng.integers(-1, E + 1, (M, topk)).astype(np.int32)
    weights = rng.standard_normal((M, topk)).astype(np.float32)
    slabs = slabs_of(ids, outputs, rank * E_local, E_local, max(M, 1) + 2)
    kept = slabs.copy()
    for on_input in (False, True):
        expected = plain_batched(ids, outputs, None if on_input else weights, rank * E_local, E_local).astype(dtype)
        output = np.full((M, 6), np.nan, dtype)
        impl = TopKWeightAndReduceNaiveBatched(rank)
        assert impl.apply(output, slabs, weights, ids, on_input) is output
        assert np.array_equal(output, expected)
        assert np.array_equal(impl.apply(None, slabs, weights, ids, on_input), expected)
    assert np.array_equal(slabs.view(np.uint8), kept.view(np.uint8))


def test_naive_batched_counts_a_repeated_expert_twice():
    slabs = np.array([[[3.0], [5.0]]], np.float32)
    ids, weights = np.array([[0, 0], [0, -1]]), np.array([[0.5, 2.0], [1.0, np.nan]], np.float32)
    assert TopKWeightAndReduceNaiveBatched(0).apply(None, slabs, weights, ids, False).tolist() == [[7.5], [5.0]]


@pytest.mark.parametrize("dtype", ["int64", "uint32", "uint64", "int8"])
def test_B4_naive_batched_ids_do_not_wrap(dtype):
    limits = np.iinfo(dtype)
    ids = np.array([[limits.min, limits.max], [1, 0]], dtype)
    slabs = slabs_of(ids, np.ones((2, 2, 1), np.float32), 0, 2, 4)
    y = TopKWeightAndReduceNaiveBatched(0).apply(None, slabs, np.ones((2, 2), np.float32), ids, False)
    assert y.tolist() == [[1.0 if limits.min == 0 else 0.0], [2.0]]


def test_naive_batched_sums_in_slot_order_like_the_standard_format():
    """Bit for bit what unpermute gives, although the rows lie elsewhere."""
    rng = np.random.default_rng(5)
    ids = np.argsort(rng.random((40, 6)), axis=1)[:, :4]
    outputs = rng.standard_normal((40, 6, 5)).astype(np.float32) * 10.0 ** rng.integers(-4, 5, (40, 6, 1))
    outputs = outputs.astype(np.float32)
    weights = rng.standard_normal((40, 4)).astype(np.float32)
    row_map = permute(ids, 6)
    expert = np.repeat(np.arange(6), np.diff(row_map.expert_offsets))
    standard = unpermute(outputs[row_map.row_to_token, expert], row_map, topk_weights=weights)
    batched = TopKWeightAndReduceNaiveBatched(0).apply(None, slabs_of(ids, outputs, 0, 6, 40), weights, ids, False)
    assert np.array_equal(standard, batched)


def test_naive_batched_refuses_slabs_too_small_for_the_ids():
    with pytest.raises(
        ShapeError, match="must have a row for every token; got capacity 1 for the 2 tokens of expert 0"
    ):
        TopKWeightAndReduceNaiveBatched(0).apply(None, np.zeros((2, 1, 3), np.float32), WEIGHTS, IDS, False)
    with pytest.raises(ShapeError, match="fused_expert_output must have shape"):
        TopKWeightAndReduceNaiveBatched(0).apply(None, np.zeros((2, 3), np.float32), WEIGHTS, IDS, False)
