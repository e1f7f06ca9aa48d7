"""Virtual ranks: every routed slot arrives once and returns to its place, up to 1024 ranks; layers to the bit."""

from __future__ import annotations

import time

import numpy as np
import pytest

import pymoe
from pymoe import ep_model
from pymoe.comm import Ranks
from pymoe.comm.placement import Placement
from pymoe.comm.sim import SimComm
from pymoe.prepare_finalize import AllGatherPrepareAndFinalize, StandardEpPrepareAndFinalize
from pymoe.weight_and_reduce import TopKWeightAndReduceNoOP
from tests.mpi.problems import problem

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
