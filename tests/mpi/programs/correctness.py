"""Every rank's rows against one process: argv is the transport, then words that choose groups of cases."""

from __future__ import annotations

import itertools
import json
import os
import random
import sys
import time

import ml_dtypes
import numpy as np
from mpi4py import MPI

import pymoe
from pymoe.comm import agree, connecting, place
from tests.mpi.problems import problem

BF16 = np.dtype(ml_dtypes.bfloat16)
comm = MPI.COMM_WORLD
rank, ranks = comm.Get_rank(), comm.Get_size()
transport, groups = sys.argv[1], sys.argv[2:]
NODE_SIZE = int(os.environ.get("PYMOE_NODE_SIZE", "1")) if transport == "hier" else 1


def layer_cases():
    """The layer: tokens, routing, placement, dtype, experts that do not divide by the ranks."""
    for tokens, routing in itertools.product(("uneven", "none", "first", "last"), ("random", "holes")):
        yield {"tokens": tokens, "routing": routing}
    for E, topk in ((10, 3), (3, 2), (1, 1), (16, 8)):
        yield {"E": E, "topk": topk}
    for routing in ("dead", "one rank", "duplicate"):
        yield {"routing": routing, "topk": 3}
    for placement in ("round_robin", "shuffled"):
        yield {"placement": placement, "E": 10}
    for dtype in (BF16, np.dtype("float16")):
        yield {"dtype": dtype}
        yield {"dtype": dtype, "exact": True, "topk": 4}
    yield {"exact": True, "topk": 5, "E": 11, "routing": "holes"}


def scheme_cases():
    """Schemes whose activations travel as codes with scales, as codes without, and as they are."""
    yield {"tokens": "many", "routing": "skewed"}
    for scheme in ("fp8_w8a8", "fp8_w8a8_block", "fp8_w8a8_block_ue8m0", "int8_w8a8", "mxfp8", "mxfp4", "nvfp4",
                   "fp8_w8a8_tensor", "fp8_static", "fp8_w8a16", "int4_w4a16"):  # fmt: skip
        yield {"scheme": scheme, "dtype": BF16 if scheme != "int8_w8a8" else np.dtype("float32")}


def same(actual, expected):
    """Return whether two arrays have the same bits."""
    return actual.dtype == expected.dtype and actual.shape == expected.shape and actual.tobytes() == expected.tobytes()


def run_layer(case, seed):
    """Return what is wrong with a layer's rows."""
    p = problem(ranks, seed=seed, **case)
    p.node_size = NODE_SIZE
    w1, w2, config = p.experts(rank)
    placement = case.get("placement", "linear")
    placement = p.owned[rank] if placement == "shuffled" else placement
    topk = p.ids[0].shape[1]
    if topk > p.num_experts:
        return "topk above the experts"
    wrong = []
    with pymoe.MoELayer(w1, w2, topk=topk, num_experts=p.num_experts, quant_config=config, comm=comm,
                        placement=placement, transport=transport) as layer:  # fmt: skip
        for _ in range(2):
            y = layer(p.x[rank], topk_weights=p.weights[rank], topk_ids=p.ids[rank])
        if not same(y, p.one_process(rank_order=True)[rank]):
            wrong.append("bits differ from the declared order")
        if case.get("exact") and not same(y, p.one_process(rank_order=False)[rank]):
            wrong.append("bits differ from slot order on exact data")
        owners = np.concatenate([np.asarray(ids) for ids in p.ids])
        load = np.bincount(owners[(owners >= 0) & (owners < p.num_experts)], minlength=p.num_experts)
        mine = np.zeros_like(load)
        mine[p.owned[rank]] = load[p.owned[rank]]
        if not np.array_equal(layer.last_load, mine):
            wrong.append(f"load {layer.last_load} is not {mine}")
    return "; ".join(wrong)


def format_cases():
    """Formats and schedules, with sizes that leave ranks without tokens or experts."""
    schedules = (False, True)
    for kind, late in itertools.product(("standard", "allgather", "batched"), schedules):
        for more in ({}, {"routing": "holes", "E": 10, "topk": 3}, {"routing": "duplicate", "topk": 3}, {"E": 3},
                     {"routing": "one rank"}, {"tokens": "none"}, {"dtype": BF16, "scheme": "fp8_w8a8_block"},
                     {"placement": "shuffled", "tokens": "last"}, {"routing": "dead"}):  # fmt: skip
            yield {"kind": kind, "late": late} | more
    for more in ({}, {"E": 10, "topk": 3}, {"tokens": "none"}, {"dtype": np.dtype("float16")}, {"tokens": "first"}):
        yield {"kind": "monolithic", "late": False} | more


def run_format(case, seed):
    """Return what is wrong with the rows of a kernel built by hand."""
    case = dict(case)
    kind, late = case.pop("kind"), case.pop("late")
    p = problem(ranks, seed=seed, **case)
    p.node_size = NODE_SIZE
    w1, w2, config = p.experts(rank)
    topk, K = p.ids[0].shape[1], p.w2.shape[1]
    config = pymoe.FusedMoEQuantConfig() if config is None else config
    monolithic, batched = kind == "monolithic", kind == "batched"
    backend = "standard" if kind == "standard" else "allgather_reducescatter"
    sizes = pymoe.FusedMoEConfig(
        p.num_experts, topk, K, p.w1.shape[1] // 2, len(w1), in_dtype=p.x[rank].dtype,
        routing=pymoe.RoutingConfig(topk) if monolithic else None, max_num_tokens=24,
        moe_parallel_config=pymoe.FusedMoEParallelConfig.make_expert_parallel(ranks, rank, backend),
    )  # fmt: skip
    formats = pymoe.FusedMoEActivationFormat
    with connecting("test", comm, transport, keep=False) as group:
        members = place("test", group, p.owned[rank], p.num_experts, len(w1))
        agree("test", members, {}, {})
        group.users += 1
    chosen = pymoe.select(sizes, config, monolithic=monolithic, ranks=members,
                          activation_format=formats.BatchedExperts if batched else formats.Standard)  # fmt: skip
    pair = chosen.prepare_finalize
    if not monolithic:
        pair._asynchronous = late
    kernel = pymoe.FusedMoEKernel(pair, chosen.experts)
    try:
        if monolithic:
            rng = np.random.default_rng(seed)
            logits = [rng.standard_normal((len(x), p.num_experts)).astype(np.float32) for x in p.x]
            y = kernel.apply_monolithic(p.x[rank], w1, w2, router_logits=logits[rank], expert_map=members.expert_map,
                                        global_num_experts=p.num_experts)  # fmt: skip
            return "" if same(y, p.one_process_monolithic(logits)[rank]) else "bits differ"
        y = kernel.apply(p.x[rank], w1, w2, topk_weights=p.weights[rank], topk_ids=p.ids[rank],
                         global_num_experts=p.num_experts, expert_map=members.expert_map)  # fmt: skip
        # The batched format brings back every slot's row: it has the order, and so the bits, of one process.
        return "" if same(y, p.one_process(rank_order=not batched)[rank]) else "bits differ"
    finally:
        members.close("test")


def run_rounds(rounds, jitter):
    """Return what is wrong in many rounds of random sizes on one layer, ranks arriving at different times."""
    rng = random.Random(rank)
    p = problem(ranks, E=7, topk=2)
    w1, w2, _ = p.experts(rank)
    with pymoe.MoELayer(w1, w2, topk=2, num_experts=7, comm=comm, transport=transport) as layer:
        for number in range(rounds):
            routing = ("random", "holes")[number % 2]
            q = problem(ranks, E=7, topk=2, tokens="random", seed=1 + number % 16, routing=routing)
            if jitter and rng.random() < 0.2:
                time.sleep(rng.random() * 2e-3)
            y = layer(q.x[rank], topk_weights=q.weights[rank], topk_ids=q.ids[rank])
            if number < 32 or number % 16 == 0:
                q.w1, q.w2, q.owned, q.node_size = p.w1, p.w2, p.owned, NODE_SIZE
                if not same(y, q.one_process(rank_order=True)[rank]):
                    return f"round {number}"
    return ""


def main():
    wrong, number = {}, 0
    cases = {"layer": layer_cases, "schemes": scheme_cases, "formats": format_cases}
    for group in groups:
        if group == "rounds":
            found = {"1,000 rounds with jitter": run_rounds(1000, True)}
        else:
            run = run_format if group == "formats" else run_layer
            found = {f"{group} {case}": run(case, seed) for seed, case in enumerate(cases[group]())}
        number += len(found)
        wrong |= {name: text for name, text in found.items() if text}
    everywhere = comm.gather(wrong)
    if rank == 0:
        print(json.dumps({"cases": number, "wrong": [w for w in everywhere if w]}))


main()
