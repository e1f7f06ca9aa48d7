"""Property tests over generated problems: 2,000 cases a run, fewer than 120 seconds."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pymoe
from pymoe.ops import permute, unpermute
from tests import oracle
from tests.selection import BF16, selection

DTYPES = st.sampled_from([np.dtype("float32"), np.dtype("float16"), BF16])
SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]


def cases(count):
    """Deterministic examples, so that a red run can be repeated; CI runs 2,000 in all."""
    return settings(max_examples=count, deadline=None, derandomize=True, suppress_health_check=SLOW, database=None)


sizes = st.fixed_dictionaries(
    {
        "M": st.integers(0, 40),
        "K": st.integers(1, 70),
        "width": st.integers(1, 40),
        "E": st.integers(1, 12),
        "topk": st.integers(1, 4),
        "dtype": DTYPES,
        "dead": st.sampled_from([0, 0.2, 1]),
        "seed": st.integers(0, 2**20),
        "ids_dtype": st.sampled_from([np.int32, np.int64]),
        "mapped": st.booleans(),
    }
)


@cases(400)
@given(size=sizes)
def test_layers_are_exact(size):
    problem = selection(**size)
    np.testing.assert_array_equal(pymoe.fused_experts(**problem.arguments()), problem.expected())


@cases(200)
@given(size=sizes, data=st.data())
def test_rows_are_independent(size, data):
    """O3 and batch invariance: other rows replaced by anything change nothing."""
    problem = selection(**size)
    M = len(problem.x)
    if not M:
        return
    rows = data.draw(st.lists(st.integers(0, M - 1), min_size=1, max_size=M, unique=True))
    given_ = problem.arguments()
    part = {name: given_[name][rows] for name in ("hidden_states", "topk_weights", "topk_ids")}
    full = pymoe.fused_experts(**given_)
    np.testing.assert_array_equal(pymoe.fused_experts(**given_ | part), full[rows])
    poisoned = problem.x.copy()
    others = np.setdiff1d(np.arange(M), rows)
    poisoned[others] = np.nan
    np.testing.assert_array_equal(pymoe.fused_experts(**given_ | {"hidden_states": poisoned})[rows], full[rows])


logits = st.integers(0, 2**32 - 1).flatmap(
    lambda seed: st.tuples(st.just(seed), st.integers(1, 20), st.integers(1, 30), st.sampled_from([1, 10, 1e4]))
)


@cases(400)
@given(drawn=logits, scoring=st.sampled_from(["softmax", "sigmoid"]), renormalize=st.booleans(), data=st.data())
def test_routing_against_the_loops(drawn, scoring, renormalize, data):
    seed, M, E, spread = drawn
    rng = np.random.default_rng(seed)
    x = (rng.integers(-8, 9, (M, E)) / 4 * spread).astype(np.float32)  # many ties
    special = rng.random((M, E))
    x[special < 0.05] = np.nan
    x[(special >= 0.05) & (special < 0.08)] = -np.inf
    x[(special >= 0.08) & (special < 0.1)] = np.inf
    topk = data.draw(st.integers(1, E))
    weights, ids = pymoe.select_experts(x, topk, scoring_func=scoring, renormalize=renormalize)
    want, want_ids = oracle.route(x, topk, scoring=scoring, renormalize=renormalize)
    np.testing.assert_array_equal(ids, want_ids)
    assert np.isfinite(weights).all() and (weights >= 0).all()
    assert all(len(set(row)) == topk for row in ids.tolist())
    live = np.isfinite(np.take_along_axis(x, want_ids, axis=1))  # what a chosen -inf weighs is the router's own page
    np.testing.assert_allclose(weights[live], want[live], rtol=2e-5, atol=1e-7)


@cases(300)
@given(
    M=st.integers(0, 30),
    topk=st.integers(1, 5),
    E=st.integers(0, 9),
    dtype=st.sampled_from([np.int8, np.uint8, np.int32, np.uint32, np.int64, np.uint64]),
    seed=st.integers(0, 2**20),
    mapped=st.booleans(),
)
def test_permute_and_unpermute_are_inverse(M, topk, E, dtype, seed, mapped):
    rng = np.random.default_rng(seed)
    ids = rng.integers(max(np.iinfo(dtype).min, -3), E + 4, (M, topk)).astype(dtype)
    mapping = rng.permutation(np.concatenate([np.arange(E), np.full(2, -1)])).astype(np.int32) if mapped else None
    row_map = permute(ids, E, expert_map=mapping)
    served = [
        (m, j) for m in range(M) for j in range(topk)
        if 0 <= int(ids[m, j]) < (E + 2 if mapped else E) and (not mapped or mapping[int(ids[m, j])] >= 0)
    ]  # fmt: skip
    assert row_map.P == len(served)
    assert sorted((int(s) // topk, int(s) % topk) for s in row_map.row_to_slot) == served
    assert [(m, j) for m in range(M) for j in range(topk) if row_map.slot_to_row[m, j] >= 0] == served
    for e in range(E):
        slots = row_map.row_to_slot[row_map.expert_offsets[e] : row_map.expert_offsets[e + 1]]
        assert (np.diff(slots) > 0).all()
    rows = rng.integers(-4, 5, (row_map.P, 3)).astype(np.float32)
    weights = rng.choice([0.5, 1.0, 2.0], (M, topk)).astype(np.float32)
    want = np.zeros((M, 3))
    for r, slot in enumerate(row_map.row_to_slot):
        want[slot // topk] += weights[slot // topk, slot % topk] * rows[r]
    np.testing.assert_array_equal(unpermute(rows, row_map, topk_weights=weights), want)


KEYS = ["kFp8DynamicTensorSym", "kFp8DynamicTokenSym", "kFp8Dynamic128Sym", "kFp8Dynamic128E8M0Sym", "kMxfp8Dynamic",
        "kInt8DynamicTokenSym", "kInt8DynamicTensorSym", "kMxfp4Dynamic", "kNvfp4Dynamic"]  # fmt: skip
# Largest error of one value relative to the largest of its group: half a step at the top of the format, and for
# powers of two as scales twice that, since up to half of the range is unused.  int8 has 127 steps; nvfp4's own scale is
# an e4m3 number, 1/16 off at most.
HALF_STEP = {"kFp8": 2.0**-4, "kMxfp8": 2.0**-4, "kInt8": 0.51 / 127, "kMxfp4": 0.25, "kNvfp4": 0.25}


@cases(500)
@given(
    key=st.sampled_from(KEYS),
    rows=st.integers(1, 6),
    groups=st.integers(1, 3),
    exponent=st.integers(-30, 30),
    dtype=DTYPES,
    seed=st.integers(0, 2**20),
)
def test_quantize_then_dequantize_stays_near(key, rows, groups, exponent, dtype, seed):
    rng = np.random.default_rng(seed)
    exponent = exponent // 4 if dtype == np.float16 else exponent
    x = (rng.standard_normal((rows, 128 * groups)) * 2.0**exponent).astype(dtype)
    codes, scale = pymoe.quantize(x, key)
    values = pymoe.dequantize(codes, scale, key)
    x = x.astype(np.float32)
    relative = next(limit for prefix, limit in HALF_STEP.items() if key.startswith(prefix))
    # nvfp4's e4m3 scales have no number below 2^-9: with a global scale of 1 smaller groups go to zero.
    floor = 6 * 2.0**-9 if key.startswith("kNvfp4") else 2.0**-126
    if key.startswith("kFp8"):
        floor = 2.0**-10 / (448 * 512)  # half the smallest code under vLLM's least scale
    ceiling = 448 * 6 if key.startswith("kNvfp4") else np.inf
    if np.abs(x).max() > ceiling:
        return
    assert (np.abs(values - x) <= relative * np.abs(x).max() + floor).all()
    again, _ = pymoe.quantize(x.astype(dtype), key)
    np.testing.assert_array_equal(again, codes)


@cases(200)
@given(seed=st.integers(0, 2**20), name=st.sampled_from(["w1", "w2", "topk_weights", "topk_ids", "hidden_states"]),
       axis=st.integers(0, 2), change=st.sampled_from([-1, 1]))  # fmt: skip
def test_no_single_wrong_extent_passes(seed, name, axis, change):
    """One axis of one argument is one too long or too short: an error."""
    problem = selection(6, 9, 5, 3, 2, dead=0, seed=seed)
    arguments = problem.arguments()
    array = arguments[name]
    axis %= array.ndim
    shape = list(array.shape)
    shape[axis] += change
    wrong = np.zeros(shape, array.dtype)
    with pytest.raises(pymoe.ShapeError):
        pymoe.fused_experts(**arguments | {name: wrong})


def test_ml_dtypes_four_bit_arrays_are_refused():
    problem = selection(6, 8, 4, 3, 2)
    with pytest.raises(pymoe.DTypeError, match="pack narrow codes in uint8"):
        pymoe.fused_experts(**problem.arguments() | {"w1": problem.w1.astype(ml_dtypes.int4)})
