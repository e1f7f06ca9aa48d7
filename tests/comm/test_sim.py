"""Virtual ranks: every routed slot arrives once and returns to its place, up to 1024 ranks; layers to the bit."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

import pymoe
from pymoe import ep_model
from pymoe.comm import Ranks
from pymoe.comm.eplb import ExpertPlan, initial_plan
from pymoe.comm.loads import sum_over_ranks
from pymoe.comm.placement import Placement
from pymoe.comm.rebalance import rebalance
from pymoe.comm.sim import SimComm
from pymoe.prepare_finalize import AllGatherPrepareAndFinalize, StandardEpPrepareAndFinalize
from pymoe.weight_and_reduce import TopKWeightAndReduceNoOP
from tests import tolerance
from tests.mpi.problems import problem

ROOT = Path(__file__).parents[2]
PLAIN = pymoe.FusedMoEQuantConfig()


def routing(R, M, E, topk, skew, seed):
    """Return ids of every rank: uneven numbers of tokens, an idle rank, dead and repeated ids, popular experts."""
    rng = np.random.default_rng([R, M, E, topk, seed])
    chances = ep_model.zipf(E, skew, seed) if E else None
    ids = []
    for rank in range(R):
        tokens = 0 if R > 2 and rank == R // 2 else int(rng.integers(0, M + 1)) if R > 1 else M
        chosen = rng.choice(E, (tokens, topk), p=chances / chances.sum()) if E else np.full((tokens, topk), -1)
        chosen[rng.random(chosen.shape) < 0.1] = -1
        chosen[rng.random(chosen.shape) < 0.05] = E + 3
        ids.append(chosen)
    return ids


def check_conservation(R, ids, placement, pair=StandardEpPrepareAndFinalize):
    """Send stamped rows through the pair of every virtual rank; check each slot on arrival, and each token on return.

    A token's row is (rank, token).  The experts answer, exactly in float32: how many slots of the token they serve, the
    sum of those slots' weights, and the stamp times the number of slots.
    """
    comm = SimComm(R)
    topk = ids[0].shape[1]
    arrived = []

    def program(rank):
        pf = pair(Ranks(comm.groups[rank], placement, 0))
        M = len(ids[rank])
        x = np.stack([np.full(M, rank), np.arange(M), np.zeros(M), np.zeros(M)], axis=1).astype(np.float32)
        weights = (1 + np.arange(M * topk).reshape(M, topk) % 64).astype(np.float32)
        hook, receive = pf.prepare_async(x, weights, ids[rank], placement.num_experts, None, False, PLAIN)
        yield
        hook()
        yield
        rows, _, meta, local, local_weights = receive()
        served = local >= 0
        global_ids = placement.experts(rank)
        for row, slot in np.argwhere(served):
            stamp = int(rows[row, 0]), int(rows[row, 1]), int(local_weights[row, slot])
            arrived.append((*stamp, int(global_ids[local[row, slot]]), rank))
        assert meta.expert_num_tokens_cpu.tolist() == np.bincount(local[served], minlength=len(global_ids)).tolist()
        slots = served.sum(axis=1, dtype=np.float32)
        answer = np.stack([slots, (local_weights * served).sum(axis=1), rows[:, 0] * slots, rows[:, 1] * slots], axis=1)
        y = np.full((M, 4), np.nan, np.float32)
        finish = pf.finalize_async(y, answer, local_weights, local, False, TopKWeightAndReduceNoOP())
        yield
        finish()
        live = (ids[rank] >= 0) & (ids[rank] < placement.num_experts)
        live &= placement.find(ids[rank])[0] >= 0
        expected = np.stack([live.sum(axis=1), (weights * live).sum(axis=1)], axis=1)
        np.testing.assert_array_equal(y[:, :2], expected)
        np.testing.assert_array_equal(y[:, 2:], x[:, :2] * live.sum(axis=1, keepdims=True))
        return len(rows)

    received = comm.lockstep("test", [program(rank) for rank in range(R)])
    wanted = []
    for rank, chosen in enumerate(ids):
        owner = placement.find(chosen)[0]
        for token, slot in np.argwhere(owner >= 0):
            stamp = rank, int(token), int(1 + (token * topk + slot) % 64)
            wanted.append((*stamp, int(chosen[token, slot]), int(owner[token, slot])))
    assert sorted(arrived) == sorted(wanted)
    return received, len(wanted)


@pytest.mark.parametrize("pair", [StandardEpPrepareAndFinalize, AllGatherPrepareAndFinalize])
@pytest.mark.parametrize(
    "R, M, E, topk, skew",
    [(1, 9, 4, 2, 0), (2, 30, 5, 2, 0), (3, 8, 2, 2, 0), (5, 20, 16, 4, 1.2), (16, 12, 60, 8, 0.8), (33, 4, 7, 3, 3)],
)
@pytest.mark.parametrize("strategy", ["linear", "round_robin"])
def test_every_slot_arrives_once_and_returns(pair, R, M, E, topk, skew, strategy):
    placement = Placement.of("test", strategy, E, R)
    ids = routing(R, M, E, topk, skew, 1)
    received, slots = check_conservation(R, ids, placement, pair)
    assert slots > 0
    if pair is AllGatherPrepareAndFinalize:
        assert received == [sum(len(chosen) for chosen in ids)] * R
    else:
        traffic = ep_model.count_rows(ids, placement.owner)
        assert received == traffic.legs[0].sum(axis=0).tolist()


@pytest.mark.parametrize("R", [64, 256, 1024])
def test_conservation_at_scale(R):
    """Experts fewer than ranks, as many, and replicas' worth of more; some rank gets most."""
    for E, skew in ((R // 2, 0.5), (R, 1.0), (2 * R, 0.0)):
        placement = Placement.of("test", "linear", E, R)
        received, slots = check_conservation(R, routing(R, 4, E, 8, skew, 2), placement)
        assert slots > 8 * R and max(received) > 0


def test_nobody_has_anything():
    placement = Placement.of("test", "linear", 4, 3)
    for ids in ([np.zeros((0, 2), int)] * 3, [np.full((5, 2), -1)] * 3):
        received, slots = check_conservation(3, ids, placement)
        assert (received, slots) == ([0, 0, 0], 0)


def test_all_to_one():
    placement = Placement.of("test", "linear", 8, 4)
    received, slots = check_conservation(4, [np.full((50, 2), 7)] * 4, placement)
    assert received == [0, 0, 0, 200] and slots == 400


LAYERS = [
    (2, {}),
    (5, {"E": 10, "topk": 3, "routing": "holes"}),
    (4, {"E": 3, "topk": 2, "placement": "round_robin"}),
    (8, {"E": 16, "topk": 8, "scheme": "fp8_w8a8_block", "dtype": pymoe.device.arrays.BFLOAT16}),
    (16, {"E": 11, "topk": 5, "exact": True, "routing": "duplicate"}),
]


@pytest.mark.parametrize("R, case", LAYERS)
def test_layers_of_virtual_ranks_equal_one_process(R, case):
    """Whole layers, a thread a rank: the partial sums of each rank in rank order, bit for bit."""
    p = problem(R, **case)
    placement, topk = case.get("placement", "linear"), p.ids[0].shape[1]

    def program(group):
        w1, w2, config = p.experts(group.rank)
        options = {"topk": topk, "num_experts": p.num_experts, "quant_config": config, "placement": placement}
        with pymoe.MoELayer(w1, w2, comm=group, **options) as layer:
            return layer(p.x[group.rank], topk_weights=p.weights[group.rank], topk_ids=p.ids[group.rank])

    for found, expected in zip(SimComm(R).run(program), p.one_process(rank_order=True), strict=True):
        np.testing.assert_array_equal(found.view(np.uint8), expected.view(np.uint8))


@pytest.mark.parametrize("scheme, exact", [(None, True), (None, False), ("fp8_w8a8_block", False)])
@pytest.mark.parametrize("R, E, topk, P", [(2, 5, 2, 8), (4, 8, 3, 12), (6, 3, 2, 12), (1, 4, 2, 4)])
def test_layers_with_redundant_experts(R, E, topk, P, scheme, exact):
    """A plan as the placement: each slot is served by the replica that its token's number chooses, and by no other."""
    p = problem(R, E=E, topk=topk, scheme=scheme, exact=exact, routing="holes", tokens="random", seed=R)
    ids = np.concatenate(p.ids)
    loads = np.bincount(ids[(ids >= 0) & (ids < E)], minlength=E)
    plan = rebalance(loads[None], num_physical=P, ranks=R)
    assert plan.logical_replica_count.sum() == P
    p.owned = [plan.experts(rank).tolist() for rank in range(R)]

    def program(group):
        w1, w2, config = p.experts(group.rank)
        options = {"topk": topk, "num_experts": E, "quant_config": config, "placement": plan}
        with pymoe.MoELayer(w1, w2, comm=group, **options) as layer:
            y = layer(p.x[group.rank], topk_weights=p.weights[group.rank], topk_ids=p.ids[group.rank])
            return y, layer.last_load

    found, loads = zip(*SimComm(R).run(program), strict=True)
    served = [plan.to_physical(chosen, first_token=rank) for rank, chosen in enumerate(p.ids)]
    owner = np.concatenate([np.where(slot >= 0, slot // plan.slots, -1) for slot in served])
    x, weights = np.concatenate(p.x), np.concatenate(p.weights)
    total = np.zeros(x.shape, np.float32)
    for rank in range(R):
        mine = np.where(owner == rank, ids, -1)
        total += p.partial(x, mine, weights, np.arange(E))
        counted = np.bincount(mine[(mine >= 0) & (mine < E)], minlength=E)
        if R > 1:
            assert loads[rank].tolist() == counted.tolist()
    np.testing.assert_array_equal(np.concatenate(found), total.astype(x.dtype))
    if exact:
        np.testing.assert_array_equal(np.concatenate(found), np.concatenate(p.one_process(rank_order=False)))


def test_a_checkpoint_by_a_plan():
    """Each rank reads what the plan puts there, in the plan's order, some experts on several ranks."""
    folder = ROOT / "examples/digits/checkpoint"
    whole = pymoe.MoELayer.from_checkpoint(folder, 0)
    # Not ascending, as the slots of a mended plan; four experts on both ranks.
    plan = ExpertPlan.of(np.array([0, 1, 2, 3, 4, 5, 7, 6, 5, 4, 0, 2]), whole.num_experts, 2)
    x = np.random.default_rng(0).standard_normal((33, whole.K)).astype(np.float32)

    def program(group):
        with pymoe.MoELayer.from_checkpoint(folder, 0, comm=group, placement=plan) as layer:
            return layer(x), layer.last_load

    (first, load), (second, other) = SimComm(2).run(program)
    for found in (first, second):
        tolerance.assert_fused(found, whole(x), whole.K, whole.I)
    np.testing.assert_array_equal(load + other, 2 * whole.last_load)
    assert (load > 0).tolist() == [expert in plan.experts(0) for expert in range(8)]


@pytest.mark.parametrize(
    "change, text",
    [
        (lambda rank: {"placement": initial_plan(4, 0, 2) if rank == 1 else initial_plan(4, 2, 2)}, "rank 1"),
        (lambda rank: {"placement": initial_plan(4, 0, 4)}, "be a plan for 2 ranks; got one for 4"),
        (lambda rank: {"placement": initial_plan(4, 0, 2), "num_experts": 5}, "be a plan of 5 experts; got one of 4"),
        (lambda rank: {"placement": initial_plan(4, 0, 2, layers=3)}, "be a plan of one layer; got 3 layers"),
        (lambda rank: {"placement": ExpertPlan.of(np.array([0, 0, 0, 1]), 2, 2)}, "hold no expert twice on a rank"),
    ],
)
def test_plans_that_do_not_fit(change, text):
    """Every rank raises the same, also where only one of them brings another plan."""
    w1, w2 = np.ones((2, 16, 8), np.float32), np.ones((2, 8, 8), np.float32)
    seen = []

    def program(group):
        with pytest.raises(pymoe.PymoeError) as caught:
            pymoe.MoELayer(w1, w2, topk=1, comm=group, **change(group.rank))
        seen.append(str(caught.value))

    SimComm(2).run(program)
    assert len(seen) == 2 and all(text in one for one in seen), seen


def test_an_error_of_one_virtual_rank_is_everybodys(monkeypatch):
    monkeypatch.setenv("PYMOE_TIMEOUT_S", "20")
    w1, w2 = np.ones((4, 16, 8), np.float32), np.ones((4, 8, 8), np.float32)
    seen = []

    def program(group):
        mine = slice(group.rank, group.rank + 1)
        with pymoe.MoELayer(w1[mine], w2[mine], topk=1, num_experts=4, comm=group) as layer:
            K = 8 if group.rank != 2 else 9
            try:
                layer(np.zeros((3, K), np.float32), np.ones((3, 4), np.float32))
            except pymoe.CommError as error:
                seen.append((group.rank, error.rank))
            return layer(np.zeros((3, 8), np.float32), np.ones((3, 4), np.float32)).shape

    assert SimComm(4).run(program) == [(3, 8)] * 4
    assert sorted(seen) == [(rank, 2) for rank in range(4)]


def test_a_forgotten_yield_is_told_at_once():
    comm = SimComm(3)
    placement = Placement.of("test", "linear", 3, 3)

    def program(rank):
        pf = StandardEpPrepareAndFinalize(Ranks(comm.groups[rank], placement, 0))
        ids = np.array([[rank]])
        hook, _ = pf.prepare_async(np.zeros((1, 4), np.float32), np.ones((1, 1)), ids, 3, None, False, PLAIN)
        hook()
        yield

    start = time.monotonic()
    with pytest.raises(pymoe.CommError, match="posted a header before one of them waits; got rank 0 waiting for ranks"):
        comm.lockstep("test", [program(rank) for rank in range(3)])
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("fault", ["lost", "twice", "short"])
def test_a_wrong_delivery_is_told(fault, monkeypatch):
    """The check can fail: a message that is lost, comes twice, or has too few rows."""
    comm = SimComm(3)
    mail = comm._board.mail
    ids = [np.tile(np.arange(6), (4, 1))] * 3

    def faulty(way, number, rank, source, chunks):
        if (rank, source) != (1, 2):
            return mail(way, number, rank, source, chunks)
        if fault == "short":
            return mail(way, number, rank, source, [chunk[:-1] for chunk in chunks])
        for _ in range({"lost": 0, "twice": 2}[fault]):
            mail(way, number, rank, source, chunks)

    monkeypatch.setattr(comm._board, "mail", faulty)
    monkeypatch.setattr("tests.comm.test_sim.SimComm", lambda R: comm)
    with pytest.raises(pymoe.CommError, match="rank 2|ranks \\[2\\]"):
        check_conservation(3, ids, Placement.of("test", "linear", 6, 3))


def test_loads_over_ranks_and_one_plan():
    """Every rank gets the sum of all, and makes the same plan of it."""
    rng = np.random.default_rng(0)
    loads = rng.integers(0, 2**40, (5, 3, 16))

    def program(group):
        total = sum_over_ranks(group, loads[group.rank].astype(np.uint64 if group.rank else np.int64))
        return total, rebalance(total, num_physical=20, ranks=5)

    for total, plan in SimComm(5).run(program):
        np.testing.assert_array_equal(total, loads.sum(axis=0))
        wanted = rebalance(loads.sum(axis=0), num_physical=20, ranks=5)
        np.testing.assert_array_equal(plan.physical_to_logical, wanted.physical_to_logical)


@pytest.mark.parametrize("odd, text", [(np.zeros((1, 5), int), "experts"), (np.zeros((1, 4)), "integer dtype")])
def test_loads_that_do_not_fit(odd, text):
    """A wrong array on one rank is every rank's error."""
    seen = []

    def program(group):
        with pytest.raises(pymoe.CommError, match=text) as caught:
            sum_over_ranks(group, odd if group.rank == 1 else np.zeros((1, 4), int))
        seen.append(caught.value.rank)
        return sum_over_ranks(group, np.full((1, 4), group.rank)).tolist()

    assert SimComm(3).run(program) == [[[3] * 4]] * 3
    assert seen == [1, 1, 1]
