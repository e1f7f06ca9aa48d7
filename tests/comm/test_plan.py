"""Planning and packing: pure functions, checked for virtual ranks against plain loops."""

from __future__ import annotations

import numpy as np
import pytest

from pymoe.comm.placement import Placement, experts_of
from pymoe.comm.plan import check_counts, counts_of, pack_meta, plan_all, plan_dispatch, rows_of_tokens, unpack_meta
from pymoe.errors import ArgumentError, CommError, DTypeError


def owners(M, topk, ranks, seed, dead=0.3):
    rng = np.random.default_rng([M, topk, ranks, seed])
    owner = rng.integers(0, ranks, (M, topk))
    owner[rng.random((M, topk)) < dead] = -1
    return owner


@pytest.mark.parametrize("M, topk, ranks", [(0, 2, 3), (1, 1, 1), (5, 3, 4), (17, 8, 5), (9, 2, 64), (3, 4, 1024)])
def test_a_token_goes_once_to_each_rank_that_owns_one_of_its_experts(M, topk, ranks):
    owner = owners(M, topk, ranks, 0)
    plan = plan_dispatch(owner, ranks)
    wanted = [(d, t) for d in range(ranks) for t in range(M) if d in owner[t]]
    assert list(zip(plan.destination().tolist(), plan.token.tolist(), strict=True)) == wanted
    assert plan.counts.tolist() == [sum(d == r for d, _ in wanted) for r in range(ranks)]
    for t in range(M):
        rows = [row for row in plan.row_of_token[t] if row >= 0]
        assert rows == [number for number, (_, token) in enumerate(wanted) if token == t]
        assert (plan.row_of_token[t][len(rows) :] == -1).all()


def test_every_token_to_every_rank():
    plan = plan_all(3, 2)
    assert plan.token.tolist() == [0, 1, 2, 0, 1, 2] and plan.counts.tolist() == [3, 3]
    assert plan.row_of_token.tolist() == [[0, 3], [1, 4], [2, 5]]
    assert plan_all(0, 2).row_of_token.shape == (0, 2)


def test_rows_of_tokens_fills_up():
    assert rows_of_tokens(np.array([2, 0, 2]), 4).tolist() == [[1, -1], [-1, -1], [0, 2], [-1, -1]]


def test_counts_of_a_matrix():
    """What a rank sees is its row, its column and where its rows start at the receivers."""
    matrix = np.random.default_rng(0).integers(0, 9, (5, 5))
    for rank in range(5):
        counts = counts_of(matrix, rank)
        assert counts.send.tolist() == matrix[rank].tolist() and counts.receive.tolist() == matrix[:, rank].tolist()
        assert counts.start.tolist() == [matrix[:rank, d].sum() for d in range(5)]
        assert counts.most == max(matrix[:, d].sum() for d in range(5))


@pytest.mark.parametrize("count, tokens, right", [(0, 0, True), (3, 3, True), (4, 3, False), (-1, 3, False)])
def test_counts_that_no_plan_makes(count, tokens, right):
    arguments = "call", np.array([0, count]), np.array([0, tokens])
    if right:
        return check_counts(*arguments)
    with pytest.raises(CommError, match="rank 1") as caught:
        check_counts(*arguments)
    assert (caught.value.rank, caught.value.field) == (1, "count")


@pytest.mark.parametrize("n", [0, 1, 7])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("scale_dtype", [None, np.float32, np.uint8])
def test_meta_survives_packing(n, weighted, scale_dtype):
    rng = np.random.default_rng(n)
    ids = rng.integers(-1, 9, (n, 3)).astype(np.int32)
    weights = rng.random((n, 3), np.float32) if weighted else None
    scale = None if scale_dtype is None else rng.integers(0, 200, (n, 5)).astype(scale_dtype)
    found = unpack_meta(pack_meta(ids, weights, scale), 3, weighted, scale_dtype)
    for actual, expected in zip(found, (ids, weights, scale), strict=True):
        assert (actual is None) == (expected is None)
        if expected is not None:
            assert actual.dtype == expected.dtype
            np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("E, ranks", [(8, 2), (10, 4), (3, 4), (0, 3), (1, 1), (257, 64)])
@pytest.mark.parametrize("strategy", ["linear", "round_robin"])
def test_strategies_give_every_expert_to_one_rank(E, ranks, strategy):
    placement = Placement.of("call", strategy, E, ranks)
    parts = [placement.experts(rank).tolist() for rank in range(ranks)]
    assert sorted(sum(parts, [])) == list(range(E))
    assert parts == [experts_of("call", strategy, E, ranks, rank) for rank in range(ranks)]
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)
    for rank, part in enumerate(parts):
        mapping = placement.expert_map(rank)
        assert mapping[part].tolist() == list(range(len(part)))
        assert (np.delete(mapping, part) == -1).all()


def test_vllms_linear_placement():
    assert [experts_of("call", "linear", 10, 4, rank) for rank in range(4)] == [[0, 1, 2], [3, 4, 5], [6, 7], [8, 9]]
    assert experts_of("call", "round_robin", 10, 4, 1) == [1, 5, 9]


def test_find_never_follows_a_bad_id():
    placement = Placement.from_ids("call", [[3, 0], [], [1]], 4)
    ids = np.array([[0, 3, 1, 2], [-1, 4, 2**40, -(2**40)]])
    owner, local = placement.find(ids)
    assert owner.tolist() == [[0, 0, 2, -1], [-1] * 4]
    assert local.tolist() == [[1, 0, 0, -1], [-1] * 4]
    assert Placement.from_ids("call", [[], []], 0).find(ids)[0].tolist() == [[-1] * 4] * 2


@pytest.mark.parametrize("ids, error, text", [
    ([[0, 1], [1]], ArgumentError, "expert 1 on ranks 0 and 1"),
    ([[0], [4]], ArgumentError, "4 on rank 1"),
])  # fmt: skip
def test_wrong_placements(ids, error, text):
    with pytest.raises(error, match=text):
        Placement.from_ids("call", ids, 4)


@pytest.mark.parametrize("placement, error", [("diagonal", ArgumentError), (7, DTypeError), ([0.5], DTypeError),
                                              ([-1], ArgumentError)])  # fmt: skip
def test_wrong_strategies(placement, error):
    with pytest.raises(error, match="placement"):
        experts_of("call", placement, 4, 2, 0)
