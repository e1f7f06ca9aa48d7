"""Load balancing: maps and plans against their definitions and exhaustive search; layers built from plans."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pymoe
from pymoe.comm.eplb import ExpertPlan, LoadWindow, initial_plan, replica_of_token
from pymoe.comm.packing import replicate
from pymoe.comm.rebalance import rebalance
from pymoe.ops.route import simulate_routing
from tests.selection import selection

ROOT = Path(__file__).parents[2]


def cases(count):
    return settings(max_examples=count, deadline=None, derandomize=True, database=None)


def check_maps(plan):
    """The three maps say the same, in the order that vLLM's do."""
    for layer in range(plan.layers):
        held = plan.physical_to_logical[layer].tolist()
        for expert in range(plan.num_logical):
            slots = [slot for slot, here in enumerate(held) if here == expert]
            count = plan.logical_replica_count[layer, expert]
            row = plan.logical_to_physical[layer, expert].tolist()
            assert count == len(slots) >= 1
            assert row == slots + [-1] * (len(row) - count)
    assert (plan.logical_replica_count.sum(axis=1) == plan.num_physical).all()
    assert plan.logical_to_physical.shape[2] == plan.logical_replica_count.max(initial=1)


@st.composite
def problems(draw, nodes=(1, 2, 3)):
    """Draw loads and sizes that divide."""
    nodes = draw(st.sampled_from(nodes))
    per_node = draw(st.integers(1, 4))
    groups = nodes * draw(st.integers(1, 3))
    size = draw(st.integers(1, 4))
    L = groups * size
    ranks = nodes * per_node
    slots = draw(st.integers(-(-L // ranks), L // nodes))
    kind = draw(st.sampled_from(["any", "equal", "one", "skewed", "none"]))
    layers = draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**20)))
    loads = {
        "any": rng.integers(0, 1000, (layers, L)),
        "equal": np.full((layers, L), 7),
        "one": np.eye(L, dtype=np.int64)[rng.integers(0, L, layers)] * 5,
        "skewed": np.array([rng.permutation(1000 // (1 + np.arange(L))) for _ in range(layers)]),
        "none": np.zeros((layers, L), np.int64),
    }[kind]
    return {"loads": loads, "num_physical": slots * ranks, "ranks": ranks, "nodes": nodes, "groups": groups}


@cases(300)
@given(problem=problems(), data=st.data())
def test_plans_hold_their_invariants(problem, data):
    loads, P, ranks, nodes, groups = problem.values()
    L = loads.shape[1]
    plan = rebalance(**problem)
    check_maps(plan)
    assert (plan.num_logical, plan.num_physical, plan.ranks) == (L, P, ranks)
    assert (plan.repeats() == 0).all()
    for layer in range(plan.layers):
        for group in range(groups):
            mine = np.flatnonzero(plan.physical_to_logical[layer] // (L // groups) == group)
            assert nodes == 1 or len(set(mine // (P // nodes))) == 1
    total = loads.sum(axis=1)
    by_rank = plan.rank_loads(loads)
    np.testing.assert_allclose(by_rank.sum(axis=1), total, rtol=1e-12)
    # No rank can carry less than the mean, nor less than the lightest replica of the heaviest expert.
    assert (by_rank.max(axis=1) >= total / ranks * (1 - 1e-12)).all()
    if nodes == 1:
        initial = initial_plan(L, P - L, ranks, len(loads))
        fair = initial.repeats() == 0
        assert (by_rank.max(axis=1) <= initial.rank_loads(loads).max(axis=1) * (1 + 1e-12))[fair].all()


@cases(300)
@given(problem=problems(), seed=st.integers(0, 2**20), slack=st.sampled_from([0.0, 0.01, 0.2]))
def test_a_plan_in_force_is_mended(problem, seed, slack):
    """Never heavier than the plan in force, within the slack of a new one, and no move without need."""
    before = rebalance(**problem)
    rng = np.random.default_rng(seed)
    problem["loads"] = (problem["loads"] * rng.uniform(0.5, 2, problem["loads"].shape)).astype(np.int64)
    loads = problem["loads"]
    fresh = rebalance(**problem)
    plan = rebalance(**problem, current=before, slack=slack)
    check_maps(plan)
    assert (plan.repeats() == 0).all()
    most = plan.rank_loads(loads).max(axis=1)
    assert (most <= before.rank_loads(loads).max(axis=1)).all()
    if problem["nodes"] > 1:
        assert (most <= fresh.rank_loads(loads).max(axis=1) * (1 + slack) * (1 + 1e-12)).all()
    again = rebalance(**problem, current=plan, slack=slack)
    assert (again.moved_from(plan) == 0).all() or slack == 0


def test_a_stable_load_moves_nothing():
    loads = np.random.default_rng(3).integers(1, 500, (4, 32))
    plan = rebalance(loads, num_physical=40, ranks=8)
    again = rebalance(loads, num_physical=40, ranks=8, current=plan)
    np.testing.assert_array_equal(again.physical_to_logical, plan.physical_to_logical)
    drifted = (loads * np.random.default_rng(4).uniform(0.9, 1.1, loads.shape)).astype(np.int64)
    mended = rebalance(drifted, num_physical=40, ranks=8, current=plan)
    fresh = rebalance(drifted, num_physical=40, ranks=8)
    assert mended.moved_from(plan).sum() < fresh.moved_from(plan).sum() / 3
    assert (mended.balancedness(drifted) > fresh.balancedness(drifted) - 0.011).all()
    stayed = mended.physical_to_logical == plan.physical_to_logical
    assert np.count_nonzero(~stayed) == mended.moved_from(plan).sum()  # what stays on a rank stays in its slot


def counts_of(L, P, most):
    return (c for c in itertools.product(range(1, most + 1), repeat=L) if sum(c) == P)


@pytest.mark.parametrize("seed", range(30))
def test_replication_is_optimal(seed):
    rng = np.random.default_rng(seed)
    L, most = int(rng.integers(1, 6)), int(rng.integers(1, 5))
    P = int(rng.integers(L, L * most + 1))
    loads = rng.integers(0, 30, (1, L)).astype(np.float64)
    found = replicate(loads, P, most)[0]
    assert found.sum() == P and found.min() >= 1 and found.max() <= most
    best = min(max(w / c for w, c in zip(loads[0], counts, strict=True)) for counts in counts_of(L, P, most))
    assert (loads[0] / found).max() == best


def lightest_possible(loads, P, ranks):
    """Return the least greatest load of a rank over all plans without repeats, by exhaustive search."""
    L, slots = len(loads), P // ranks
    holdings = list(itertools.combinations(range(L), slots))
    best = np.inf
    for plan in itertools.combinations_with_replacement(holdings, ranks):
        counts = np.bincount(np.concatenate(plan), minlength=L)
        if counts.min() >= 1:
            share = loads / counts
            best = min(best, max(share[list(held)].sum() for held in plan))
    return best


def test_plans_against_exhaustive_search():
    """On 250 small problems, where one expert is much: the lightest possible in 7 of 10, and 2 % over it on average."""
    rng = np.random.default_rng(5)
    ratios = []
    while len(ratios) < 250:
        L, ranks, slots = rng.integers(2, 6), rng.integers(2, 4), rng.integers(1, 4)
        if not L <= ranks * slots <= L * ranks:
            continue
        loads = rng.integers(1, 40, L) ** rng.integers(1, 3)
        plan = rebalance(loads[None], num_physical=int(ranks * slots), ranks=int(ranks))
        best = lightest_possible(loads, int(ranks * slots), int(ranks))
        ratios.append(plan.rank_loads(loads[None]).max() / best)
    assert min(ratios) >= 1 - 1e-12
    assert np.mean(np.array(ratios) <= 1 + 1e-12) >= 0.7
    assert np.mean(ratios) <= 1.02
    assert max(ratios) <= 1.4


DEEPSEEK_LOADS = np.array(
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
)
DEEPSEEK_PLAN = np.array(
    [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
)


def test_the_published_example_of_deepseek():
    """12 experts in 4 groups, 16 slots, 8 ranks on 2 nodes (README of DeepSeek's EPLB): as even as its plan."""
    published = ExpertPlan.of(DEEPSEEK_PLAN, 12, 8)
    plan = rebalance(DEEPSEEK_LOADS, num_physical=16, ranks=8, nodes=2, groups=4)
    heaviest = plan.rank_loads(DEEPSEEK_LOADS).max(axis=1)
    assert (heaviest <= published.rank_loads(DEEPSEEK_LOADS).max(axis=1)).all()
    # The greatest loads of a replica are the same ones: replication has one answer.
    for layer in range(2):
        loads = DEEPSEEK_LOADS[layer]
        ours, theirs = (p.logical_replica_count[layer] for p in (plan, published))
        assert (loads / ours).max() == (loads / theirs).max()


def plain(loads, P, ranks):
    """Return the heaviest rank under vLLM's steps alone: replicate without a cap, pack heaviest first."""
    counts = np.ones(len(loads), int)
    for _ in range(P - len(loads)):
        counts[np.argmax(loads / counts)] += 1
    items = np.repeat(loads / counts, counts)
    total, room = np.zeros(ranks), np.full(ranks, P // ranks)
    for load in -np.sort(-items, kind="stable"):
        rank = np.where(room > 0, total, np.inf).argmin()
        total[rank] += load
        room[rank] -= 1
    return total.max()


def test_plans_are_at_least_as_even_as_plain_greedy_ones():
    """At the sizes of real models, with Zipf and log-normal loads; strictly better somewhere."""
    better = 0
    for seed, (L, P, ranks) in enumerate([(256, 288, 32), (256, 288, 8), (128, 144, 16), (64, 80, 8), (60, 64, 4)] * 4):
        rng = np.random.default_rng(seed)
        loads = rng.lognormal(0, 1.2, L) if seed % 2 else rng.permutation(1 / (1 + np.arange(L)))
        ours, theirs = (
            rebalance(loads[None], num_physical=P, ranks=ranks).rank_loads(loads[None]).max(),
            plain(loads, P, ranks),
        )
        assert ours <= theirs * (1 + 1e-12)
        better += ours < theirs * (1 - 1e-9)
    assert better >= 10


def test_every_process_makes_the_same_plan():
    """Whatever the hash seed and the number of threads: ranks plan for themselves and must agree to the bit."""
    code = (
        "import numpy as np, zlib; from pymoe.comm.rebalance import rebalance; rng = np.random.default_rng(0);"
        "loads = rng.integers(0, 10**6, (3, 64));"
        "first = rebalance(loads, num_physical=96, ranks=16, nodes=4, groups=8);"
        "loads = loads * rng.random(loads.shape);"
        "then = rebalance(loads, num_physical=96, ranks=16, nodes=4, groups=8, current=first);"
        "print([zlib.crc32(p.physical_to_logical.tobytes()) for p in (first, then)])"
    )
    seen = set()
    for seed, threads in (("0", "1"), ("1", "2"), ("77", "4")):
        surroundings = {
            **os.environ,
            "PYTHONHASHSEED": seed,
            "OMP_NUM_THREADS": threads,
            "OPENBLAS_NUM_THREADS": threads,
        }
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True, env=surroundings
        )
        seen.add(done.stdout)
    assert len(seen) == 1
    loads = np.random.default_rng(1).integers(0, 2**20, (2, 24))
    one = rebalance(loads, num_physical=32, ranks=8).physical_to_logical
    for dtype in (np.uint32, np.float32, np.float64):
        np.testing.assert_array_equal(rebalance(loads.astype(dtype), num_physical=32, ranks=8).physical_to_logical, one)
    np.testing.assert_array_equal(rebalance(loads[:, ::-1][:, ::-1], num_physical=32, ranks=8).physical_to_logical, one)


def test_initial_plan_is_vllms():
    plan = initial_plan(5, 7, ranks=4, layers=2)
    assert plan.physical_to_logical.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]] * 2
    assert plan.logical_to_physical[1].tolist() == [[0, 5, 10], [1, 6, 11], [2, 7, -1], [3, 8, -1], [4, 9, -1]]
    assert plan.logical_replica_count[0].tolist() == [3, 3, 2, 2, 2]
    assert plan.experts(2).tolist() == [1, 2, 3]
    assert plan.repeats().tolist() == [0, 0]
    assert initial_plan(2, 2, ranks=1).repeats().tolist() == [2]


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.int64, np.uint64])
def test_replicas_by_token(dtype):
    plan = rebalance(np.array([[50, 3, 9, 1, 30]]), num_physical=9, ranks=3)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 7, (200, 3)).astype(dtype)
    if np.dtype(dtype).kind == "i":
        ids[::5, 1] = -1
        ids[1, 0] = np.iinfo(dtype).min
    ids[2, 2] = np.iinfo(dtype).max
    for first in (0, 1, 12345):
        found = plan.to_physical(ids, first_token=first)
        assert found.dtype == np.int32
        for m, j in np.ndindex(ids.shape):
            expert = int(ids[m, j])
            if not 0 <= expert < 5:
                assert found[m, j] == -1
                continue
            slots = [slot for slot, here in enumerate(plan.physical_to_logical[0]) if here == expert]
            assert found[m, j] == slots[((m + first) * 2654435769) % 2**32 % len(slots)]
        np.testing.assert_array_equal(found, plan.to_physical(ids, first_token=first))
    assert plan.to_physical(ids[:0]).shape == (0, 3)


def test_replicas_share_the_tokens():
    """Of 1..8 replicas each gets its share of 4096 consecutive tokens within 2 %, and one token of 8 ranks spreads."""
    for count in range(1, 9):
        share = np.bincount(replica_of_token(np.arange(4096), np.full(4096, count)), minlength=count) / 4096 * count
        assert abs(share - 1).max() < 0.02
    assert len(set(replica_of_token(np.arange(8), np.full(8, 4)).tolist())) == 4


def test_window():
    rng = np.random.default_rng(0)
    window, steps = LoadWindow(2, 6, size=3), []
    for _ in range(8):
        step = np.zeros((2, 6), np.int64)
        for layer in range(2):
            ids = rng.integers(-2, 8, (rng.integers(0, 20), 2))
            window.record(ids, layer)
            loads = rng.integers(0, 9, 6)
            window.add(loads, layer)
            for expert in ids.reshape(-1):
                if 0 <= expert < 6:
                    step[layer, expert] += 1
            step[layer] += loads
        assert (window.total() == (np.sum(steps[-3:], axis=0) if steps else 0)).all()  # what is recorded is not in yet
        window.step()
        steps.append(step)
        np.testing.assert_array_equal(window.total(), np.sum(steps[-3:], axis=0))
    window.clear()
    assert not window.total().any()


def test_loads_of_slots_become_loads_of_experts():
    plan = initial_plan(3, 3, ranks=2)
    assert plan.logical_loads(np.array([[1, 2, 3, 10, 20, 30]])).tolist() == [[11, 22, 33]]


BF16 = np.dtype(ml_dtypes.bfloat16)


@pytest.mark.parametrize("dtype", [np.dtype("float32"), np.dtype("float16"), BF16])
@pytest.mark.parametrize("scheme", [None, "fp8_w8a8_block", "int8_w8a8", "int4_w4a16", "mxfp4_w4a16", "nvfp4"])
def test_layers_built_from_a_plan_give_the_same_bits(dtype, scheme):
    """Duplicated and renumbered experts, a replica by token: every bit of the output is that of the logical layer."""
    E, K, width, topk, M = 6, 128, 128, 3, 67
    rng = np.random.default_rng(0)
    w1 = rng.standard_normal((E, 2 * width, K)).astype(dtype)
    w2 = (rng.standard_normal((E, K, width)) / 8).astype(dtype)
    x = rng.standard_normal((M, K)).astype(dtype)
    weights, ids = simulate_routing(M, E, topk, "zipf")
    ids = ids.copy()
    ids[::7, 0], ids[3, 2] = -1, E + 4
    ids[5, 1] = ids[5, 0]
    window = LoadWindow(1, E)
    window.record(ids)
    window.step()
    plan = rebalance(window.total(), num_physical=10, ranks=5)
    assert plan.logical_replica_count.max() >= 3
    slots = plan.physical_to_logical[0]

    def layer(w1, w2):
        if scheme is None:
            return pymoe.MoELayer(w1, w2, topk=topk)
        w1, w2, config = pymoe.quantize_experts(w1, w2, scheme)
        return pymoe.MoELayer(w1, w2, topk=topk, quant_config=config)

    with layer(w1, w2) as logical, layer(w1[slots], w2[slots]) as physical:
        expected = logical(x, topk_weights=weights, topk_ids=ids)
        for first in (0, 1, 999):
            served = plan.to_physical(ids, first_token=first)
            found = physical(x, topk_weights=weights, topk_ids=served)
            np.testing.assert_array_equal(found.view(np.uint8), expected.view(np.uint8))
        np.testing.assert_array_equal(plan.logical_loads(physical.last_load[None])[0], logical.last_load)
    assert np.count_nonzero(expected.astype(np.float32)) > 0.9 * expected.size


def test_plans_in_both_formats_are_exact():
    """The batched format too, against an answer that is a gather."""
    problem = selection(41, 24, 16, 5, 3, dtype=BF16, ids_dtype=np.int64)
    loads = np.bincount(problem.topk_ids[problem.topk_ids >= 0], minlength=5)[:5]
    plan = rebalance(loads[None], num_physical=8, ranks=4)
    slots = plan.physical_to_logical[0]
    given = problem.arguments() | {"w1": problem.w1[slots], "w2": problem.w2[slots]}
    given["topk_ids"] = plan.to_physical(problem.topk_ids)
    np.testing.assert_array_equal(pymoe.fused_experts(**given), problem.expected())
    kernel = pymoe.FusedMoEKernel(
        pymoe.BatchedPrepareAndFinalize(41 * 3, 8, 1, 0),
        pymoe.NaiveBatchedExperts(
            pymoe.FusedMoEConfig(8, 3, 24, 16, 8, in_dtype=BF16), pymoe.FusedMoEQuantConfig.make(), 41 * 3, 1
        ),
    )
    found = kernel.apply(
        given["hidden_states"], given["w1"], given["w2"],
        topk_weights=given["topk_weights"].astype(np.float32), topk_ids=given["topk_ids"],
    )  # fmt: skip
    np.testing.assert_array_equal(found, problem.expected())


GOOD = {"loads": np.ones((1, 8)), "num_physical": 8, "ranks": 4}


@pytest.mark.parametrize(
    "change, kind, text",
    [
        ({"loads": [[1, 2]]}, pymoe.DTypeError, "loads must be a NumPy"),
        ({"loads": np.ones(8)}, pymoe.ShapeError, "loads must have shape (any, any)"),
        ({"loads": np.ones((1, 8), bool)}, pymoe.DTypeError, "loads must"),
        ({"loads": np.ones((0, 8))}, pymoe.ArgumentError, "at least one layer"),
        ({"loads": np.array([[1, np.nan] * 4])}, pymoe.ArgumentError, "nan for expert 1 in layer 0"),
        ({"loads": np.array([[1, -1] * 4])}, pymoe.ArgumentError, "-1.0 for expert 1 in layer 0"),
        ({"loads": np.full((1, 8), 1e308)}, pymoe.ArgumentError, "a finite sum"),
        ({"num_physical": 9}, pymoe.ArgumentError, "Add 3 redundant experts"),
        ({"num_physical": 4}, pymoe.ArgumentError, "num_physical must be in 8..32"),
        ({"num_physical": 36}, pymoe.ArgumentError, "num_physical must be in 8..32"),
        ({"num_physical": 8.0}, pymoe.DTypeError, "num_physical must be an integer"),
        ({"ranks": 0}, pymoe.ArgumentError, "ranks must be at least 1"),
        ({"nodes": 3}, pymoe.ArgumentError, "ranks must divide by 3 nodes"),
        ({"nodes": 2}, pymoe.ArgumentError, "groups must divide by 2 nodes; got 1. Pass nodes=1"),
        ({"groups": 3}, pymoe.ArgumentError, "must divide by 3 groups"),
        (
            {"current": initial_plan(8, 0, 2)},
            pymoe.ArgumentError,
            "current must have 1 layers, 8 experts, 8 slots and 4",
        ),
        ({"current": 3}, pymoe.DTypeError, "current must be an ExpertPlan"),
        ({"current": initial_plan(8, 0, 4), "slack": -1}, pymoe.ArgumentError, "slack must be in 0..1"),
    ],
)
def test_bad_arguments(change, kind, text):
    rebalance(**GOOD)
    with pytest.raises(kind) as caught:
        rebalance(**(GOOD | change))
    assert text in str(caught.value) and str(caught.value).startswith("rebalance: ")


@pytest.mark.parametrize(
    "held, kind, text",
    [
        (np.array([[0, 1, 1]]), pymoe.ArgumentError, "no slot of expert 2 in layer 0"),
        (np.array([[0, 1, 3]]), pymoe.ArgumentError, "name experts in 0..2; got 3"),
        (np.array([[0, 1, 2.0]]), pymoe.DTypeError, "an integer dtype"),
        (np.zeros((1, 1, 3), int), pymoe.ShapeError, "(any, any)"),
    ],
)
def test_bad_maps(held, kind, text):
    with pytest.raises(kind) as caught:
        ExpertPlan.of(held, 3, 1)
    assert text in str(caught.value)


def test_maps_are_read_only():
    plan = initial_plan(4, 0, ranks=2)
    for array in (plan.physical_to_logical, plan.logical_to_physical, plan.logical_replica_count):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
