"""The model of expert-parallel time: counts against loops, times by hand, and published figures within 15 %."""

from __future__ import annotations

import importlib.util
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pymoe
from pymoe import ep_model
from pymoe.comm.placement import Placement
from pymoe.comm.plan import plan_all, plan_dispatch

ROOT = Path(__file__).parents[1]


def script(name):
    """Return the module of a script in ``benchmarks``, which finds the others beside it as when it is run."""
    if str(ROOT / "benchmarks") not in sys.path:
        sys.path.append(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def loops(ids, owner, route, node_size):
    """Return the legs by one loop over slots, with sets."""
    R = len(ids)
    legs = np.zeros((2 if route == "node" else 1, R, R), int)
    for s, chosen in enumerate(ids):
        for row in chosen:
            slots = [int(owner[e]) for e in row if 0 <= e < len(owner)]
            if route == "expert":
                for d in slots:
                    legs[0, s, d] += 1
            elif route == "rank":
                for d in set(slots):
                    legs[0, s, d] += 1
            elif route == "all":
                legs[0, s] += 1
            else:
                gates = {}
                for n in {d // node_size for d in slots}:
                    gates[n] = s if n == s // node_size else n * node_size + s % node_size
                    legs[0, s, gates[n]] += 1
                for d in set(slots):
                    legs[1, gates[d // node_size], d] += 1
    return legs


@settings(max_examples=120, deadline=None, derandomize=True, database=None)
@given(
    nodes=st.integers(1, 3),
    node_size=st.integers(1, 3),
    E=st.integers(1, 9),
    topk=st.integers(1, 4),
    route=st.sampled_from(ep_model.ROUTES),
    dtype=st.sampled_from([np.int8, np.int32, np.int64, np.uint8]),
    seed=st.integers(0, 2**20),
)
def test_counts_against_loops(nodes, node_size, E, topk, route, dtype, seed):
    rng = np.random.default_rng(seed)
    R = nodes * node_size
    owner = rng.integers(0, R, E)
    lowest = -2 if np.dtype(dtype).kind == "i" else 0
    ids = [rng.integers(lowest, E + 2, (rng.integers(0, 9), topk)).astype(dtype) for _ in range(R)]
    traffic = ep_model.count_rows(ids, owner, route=route, node_size=node_size)
    np.testing.assert_array_equal(np.stack(traffic.legs), loops(ids, owner, route, node_size))
    assert traffic.tokens.tolist() == [len(chosen) for chosen in ids]
    routed = np.concatenate([chosen.reshape(-1) for chosen in ids]).astype(int)
    for rank in range(R):
        wanted = [np.count_nonzero(routed == e) for e in range(E) if owner[e] == rank]
        found = traffic.rows[rank].tolist()
        assert found == wanted + [0] * (len(found) - len(wanted))
    if route == "node":  # what reaches a node leaves it again for at least one rank
        arrived, left = traffic.legs[0].sum(axis=0), traffic.legs[1].sum(axis=1)
        assert ((arrived > 0) == (left > 0)).all() and (left >= arrived).all()
    back = traffic.back()
    np.testing.assert_array_equal(np.stack(back.legs), np.stack(traffic.legs)[::-1].transpose(0, 2, 1))
    np.testing.assert_array_equal(np.stack(back.back().legs), np.stack(traffic.legs))


@pytest.mark.parametrize("strategy", ["linear", "round_robin"])
def test_counts_are_those_of_the_plans(strategy):
    """What the layers send is what the model counts, for a placement of theirs."""
    shape = ep_model.ModelShape("", 8, 8, 10, 3)
    ids = [ep_model.draw_routing(shape, 5 + rank, seed=rank) for rank in range(4)]
    placement = Placement.of("test", strategy, 10, 4)
    traffic = ep_model.count_rows(ids, placement.owner)
    sent = [plan_dispatch(placement.find(chosen)[0], 4).counts for chosen in ids]
    np.testing.assert_array_equal(traffic.legs[0], np.stack(sent))
    everywhere = ep_model.count_rows(ids, placement.owner, route="all")
    np.testing.assert_array_equal(everywhere.legs[0], np.stack([plan_all(len(chosen), 4).counts for chosen in ids]))


def unique_ranks(R, E=256, topk=8):
    """Return the expected number of ranks of a token whose experts are uniform."""
    return R * (1 - math.comb(E - E // R, topk) / math.comb(E, topk))


@pytest.mark.parametrize("R, expected", [(2, 1.99), (4, 3.61), (8, 5.29), (16, 6.52), (64, 7.68)])
def test_ranks_of_a_token(R, expected):
    """The mean over 4096 drawn tokens is the expectation, within 3 standard errors at most 0.06."""
    shape = ep_model.ModelShape("", 8, 8, 256, 8)
    ids = [ep_model.draw_routing(shape, 4096, seed=R)] + [np.zeros((0, 8), int)] * (R - 1)
    traffic = ep_model.count_rows(ids, np.arange(256) * R // 256)
    assert unique_ranks(R) == pytest.approx(expected, abs=0.006)
    assert traffic.legs[0].sum() / 4096 == pytest.approx(expected, abs=0.06)


SMALL = ep_model.ModelShape("small", K=1000, I=500, E=4, topk=2)


def test_an_exchange_by_hand():
    """Two nodes of two ranks; 1000 bytes a row; every link is the busiest once."""
    legs = np.array([[4, 3, 0, 2], [0, 0, 1, 0], [0, 0, 0, 0], [6, 0, 5, 0]])
    traffic = ep_model.Traffic((legs,), np.zeros((4, 1), int), np.zeros(4, int), 2)

    def system(**change):
        return ep_model.System("", 2, **({"inside": 1.0, "network": 1.0, "start_us": (2, 3)} | change))

    # inside: rank 3 sends 5 rows; network: rank 3 sends 6; at 1 GB/s a row takes 1 us
    assert ep_model.exchange_us(traffic, system(), 1000) == (2 + 6, "network")
    assert ep_model.exchange_us(traffic, system(network=4.0), 1000) == (2 + 5, "nvlink")
    # rank 0 keeps 4 rows
    assert ep_model.exchange_us(traffic, system(local=0.5, inside_kind="shm"), 1000) == (2 + 8, "rank")
    # rank 3 sends 11 rows in all, rank 2 receives 6
    assert ep_model.exchange_us(traffic, system(staging=1.0), 1000) == (2 + 11, "staging")
    assert ep_model.exchange_us(traffic, system(network=100.0, inside=100.0), 1000) == (2 + 0.06, "start")
    assert ep_model.exchange_us(traffic, system(floor_us=(9, 9)), 1000) == (9, "start")
    # two messages leave rank 0, and two leave rank 3
    assert ep_model.exchange_us(traffic, system(message_us=10.0), 1000) == (2 + 6 + 20, "start")
    assert ep_model.exchange_us(traffic, system(), 1000, combine=True) == (3 + 6, "network")
    # one rank sends to three, each of which sends one message back
    fan = ep_model.Traffic((np.eye(4, dtype=int)[[0, 0, 0, 0]].T,), traffic.rows, traffic.tokens, 2)
    assert ep_model.exchange_us(fan, system(message_us=10.0), 1000)[0] == 2 + 2 + 30
    assert ep_model.exchange_us(fan, system(message_us=10.0), 1000, combine=True)[0] == 3 + 2 + 10


def test_a_layer_by_hand():
    shape = ep_model.ModelShape("", K=100, I=50, E=2, topk=1)
    traffic = ep_model.count_rows([np.array([[0], [1]]), np.array([[1]])], np.array([0, 1]), node_size=2)
    system = ep_model.System("", 2, inside=1.0, network=1.0, start_us=(1, 2))
    compute = ep_model.Compute(tflops=1.0, memory=1.0, tile=4, weight_bytes=2.0)
    found = ep_model.predict(traffic, system, shape, compute, dispatch_format="float32", combine_format="bfloat16")
    assert found.dispatch_us == 1 + (400 + 8) / 1000 and found.combine_us == 2 + 200 / 1000
    # each rank has one expert of 3 * 100 * 50 weights, read at 1 GB/s; 4 rows of them take 0.12 us
    assert found.experts_us == 3 * 100 * 50 * 2 / 1000
    assert found.layer_us == found.dispatch_us + found.experts_us + found.combine_us
    fast = ep_model.predict(traffic, system, shape, ep_model.Compute(0.001, 1e9, tile=4))
    assert fast.experts_us == pytest.approx(2 * 4 * 3 * 100 * 50 / 1000)
    assert ep_model.predict(traffic, system, shape).experts_us == 0


def test_hierarchy_saves_network_rows():
    """The reference table of floors, 50 GB/s a GPU, 8 a node, 4096 tokens, rows of 7456 bytes, within 2 %."""
    system = ep_model.System("", 8, inside=1e9, network=50.0, start_us=(0, 0))
    shape = ep_model.ModelShape("", 7168, 2048, 256, 8)
    for R, by_node, by_rank in ((16, 609, 1989), (32, 1656, 3326)):
        ids = [ep_model.draw_routing(shape, 4096, seed=rank) for rank in range(R)]
        for route, floor in (("node", by_node), ("rank", by_rank)):
            traffic = ep_model.count_rows(ids, np.arange(256) * R // 256, route=route, node_size=8)
            assert ep_model.exchange_us(traffic, system, 7456)[0] == pytest.approx(floor, rel=0.02)


def test_row_bytes_are_those_of_arrays():
    """Codes and scales as `quantize` makes them; 4 and 4 bytes for each id and weight."""
    for K in (32, 128, 4096, 7168):
        x = np.zeros((1, K), np.float32)
        for name, key in (
            ("mxfp8", pymoe.QUANT_KEYS["kMxfp8Dynamic"]),
            ("mxfp4", pymoe.QUANT_KEYS["kMxfp4Dynamic"]),
            ("fp8", pymoe.QUANT_KEYS["kFp8Dynamic128Sym"]),
            ("int8", pymoe.QUANT_KEYS["kInt8DynamicTokenSym"]),
        ):
            codes, scale = pymoe.quantize(x, key)
            assert ep_model.row_bytes(K, name) == codes.nbytes + scale.nbytes, name
        for name in ("float32", "float16"):
            assert ep_model.row_bytes(K, name, topk=3) == K * np.dtype(name).itemsize + 3 * 8


def test_published_figures():
    """Constants reproduce what they were fitted to within 3 %, and predict the others within 15 %."""
    found = script("ep_figures").compare("ep.csv")
    assert len(found) == 103
    worst = {"fit": 0.03, "check": 0.15}
    checks = [one for one in found if one.line["use"] == "check"]
    assert len(checks) >= 70 and sum(one.line["use"] == "outside" for one in found) == 3
    for one in found:
        limit = worst.get(one.line["use"])
        if limit is None:  # said not to fit, so it must not
            assert abs(one.error) > 0.15, one
        else:
            assert abs(one.error) <= limit, one
    assert np.median([abs(one.error) for one in checks]) < 0.04
    assert {one.line["system"] for one in found} == set(ep_model.SYSTEMS)  # no constants without figures
    assert all(len(one.line["source"]) > 10 for one in found)


def test_measured_gemms():
    found = script("ep_figures").compare("measured_gemms.csv")
    assert len(found) == 23
    for one in found:
        assert abs(one.error) <= (0.02 if one.line["use"] == "fit" else 0.30), one


def alike(one, other):
    """Return whether two lines of a table agree, numbers within 2 % or 1 in the last place shown."""
    cells, others = ([cell.strip() for cell in line.strip("| ").split("|")] for line in (one, other))
    if len(cells) != len(others):
        return False
    for cell, shown in zip(cells, others, strict=True):
        try:
            found, wanted = float(cell.rstrip("%")), float(shown.rstrip("%"))
        except ValueError:
            if cell != shown:
                return False
            continue
        last = 10.0 ** -len(shown.rstrip("%").partition(".")[2])
        if abs(found - wanted) > max(1.01 * last, 0.02 * abs(wanted)):
            return False
    return True


def test_the_page_shows_what_the_model_says():
    """Tables of docs/scaling.md are the script's, as far as 32 ranks; NumPy versions may draw other routings."""
    scaling = script("model_scaling")
    few = (8, 16, 32)
    made = {
        name: make() for name, make in scaling.TABLES.items() if name in ("published", "outside", "gemms", "formats")
    }
    made["drift"] = scaling.drift(layers=58)
    for shape in scaling.SHAPES:
        made[f"weak {shape.name} 128"] = scaling.weak(shape, 128, few)
        made[f"strong {shape.name}"] = scaling.strong(shape, few)
    for name, text in made.items():
        lines, shown = text.splitlines(), scaling.shown(name).splitlines()
        assert len(lines) >= 5 and len(shown) >= len(lines), name
        for one, other in zip(lines, shown, strict=False):
            assert alike(one, other), f"{name}:\n{one}\n{other}"
    assert not alike("| a | 100 |", "| a | 103 |") and not alike("| a | 1 |", "| b | 1 |")
    unmade = set(re.findall(r"<!-- table: (.*?) -->", scaling.PAGE.read_text(encoding="utf-8"))) ^ set(scaling.TABLES)
    assert unmade == set()


def test_routings():
    shape = ep_model.ModelShape("", 8, 8, 32, 4, groups=8, topk_group=2)
    ids = ep_model.draw_routing(shape, 300, ep_model.zipf(32, 1.0), seed=5)
    assert ids.shape == (300, 4) and ids.dtype == np.int32 and ids.min() >= 0 and ids.max() < 32
    assert all(len(set(row)) == 4 and len(set(row // 4)) <= 2 for row in ids)
    np.testing.assert_array_equal(ids, ep_model.draw_routing(shape, 300, ep_model.zipf(32, 1.0), seed=5))
    popular = ep_model.zipf(32, 1.5, seed=3)
    assert sorted(popular, reverse=True) == pytest.approx([1 / (i + 1) ** 1.5 for i in range(32)])
    flat = ep_model.ModelShape("", 8, 8, 32, 4)
    load = np.bincount(ep_model.draw_routing(flat, 4000, popular).reshape(-1), minlength=32)
    assert np.corrcoef(np.argsort(np.argsort(load)), np.argsort(np.argsort(popular)))[0, 1] > 0.95


@pytest.mark.parametrize(
    "call, kind, text",
    [
        (lambda: ep_model.row_bytes(8, "fp7"), pymoe.ArgumentError, "row_bytes: format must be one of float32"),
        (lambda: ep_model.count_rows([np.zeros((1, 2))], np.array([0])), pymoe.ShapeError, "integer arrays (M, topk)"),
        (lambda: ep_model.count_rows([np.zeros((1, 2), int)], np.array([1])), pymoe.ArgumentError, "ranks in 0..0"),
        (lambda: ep_model.count_rows([], np.array([], int), route="bus"), pymoe.ArgumentError, "route must be one of"),
        (
            lambda: ep_model.count_rows([np.zeros((1, 2), int)] * 3, np.array([1]), node_size=2),
            pymoe.ArgumentError,
            "node_size must divide the 3 ranks; got 2",
        ),
        (
            lambda: ep_model.draw_routing(ep_model.ModelShape("", 8, 8, 9, 2, groups=2), 1),
            pymoe.ArgumentError,
            "shape must divide its experts",
        ),
        (
            lambda: ep_model.draw_routing(SMALL, 1, np.array([1, 1, 0, 1.0])),
            pymoe.ArgumentError,
            "popularity must be finite and above 0",
        ),
        (
            lambda: ep_model.predict(
                ep_model.count_rows([np.zeros((1, 2), int)] * 4, np.array([1]), node_size=4, route="node"),
                ep_model.SYSTEMS["deepep-h200-ib"],
                SMALL,
            ),
            pymoe.ArgumentError,
            "8 ranks a node; got 4",
        ),
    ],
)
def test_errors(call, kind, text):
    with pytest.raises(kind) as caught:
        call()
    assert text in str(caught.value)
