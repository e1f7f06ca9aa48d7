"""Ranks that disagree: all raise one error that names rank and field, and go on.  argv is the transport."""

from __future__ import annotations

import functools
import json
import sys
import threading
from pathlib import Path

import numpy as np
from mpi4py import MPI

import pymoe
from pymoe import MoELayer
from tests.mpi.problems import K, N, problem

comm = MPI.COMM_WORLD
rank, ranks = comm.Get_rank(), comm.Get_size()
transport = sys.argv[1]
ODD = 1
DIGITS = Path(__file__).parents[3] / "examples/digits"
p = problem(ranks, E=8, topk=2, tokens="random", seed=3)
W1, W2, _ = p.experts(rank)


def build(on=None, **changes):
    """Build the layer of the problem with `changes` on the odd rank alone."""
    options = {"topk": 2, "num_experts": 8, "comm": comm, "transport": transport}
    w1, w2 = W1, W2
    if rank == ODD:
        w1, w2 = changes.pop("w1", w1), changes.pop("w2", w2)
        options |= changes
    return MoELayer(w1, w2, **options)


def call(layer, **changes):
    """Call a layer with `changes` on the odd rank alone; check the rows of a call without any."""
    given = {"hidden_states": p.x[rank], "topk_weights": p.weights[rank], "topk_ids": p.ids[rank]}
    y = layer(**(given | (changes if rank == ODD else {})))
    assert changes or np.array_equal(y, p.one_process(rank_order=True)[rank])


def other_order(layer):
    """Call two layers in another order on one rank."""
    second = build()
    try:
        for each in (second, layer) if rank == ODD else (layer, second):
            call(each)
    finally:
        second.close()


def too_many(layer):
    """Bring more tokens than one rank allows."""
    limited = build(max_num_tokens=1)
    try:
        call(limited)
    finally:
        limited.close()


def closes_early(layer):
    """Close on one rank while the others call."""
    third = build()
    try:
        if rank == ODD:
            third.close()
        else:
            call(third)
    finally:
        third.close()


x, ids, weights = p.x[rank], p.ids[rank], p.weights[rank]
IN_CALLS = {
    "K": (lambda layer: call(layer, hidden_states=np.zeros((3, K + 1), np.float32)), None, "hidden_states must have"),
    "dtype": (lambda layer: call(layer, hidden_states=x.astype(np.float16)), "dtype", "float16 on rank 1"),
    "rows": (lambda layer: call(layer, topk_ids=ids[:-1]), None, "topk_ids must have shape"),
    "ids": (lambda layer: call(layer, topk_ids=ids.astype(float)), None, "topk_ids must have an integer dtype"),
    "nothing": (lambda layer: call(layer, topk_ids=None, topk_weights=None), None, "router_logits must be given"),
    "out": (lambda layer: call(layer, out=np.zeros((1, 1), np.float32)), None, "out must have shape"),
    "limit": (too_many, None, "a call must bring at most max_num_tokens = 1 tokens"),
    "order": (other_order, "layer", "layer must be the same on all ranks"),
}
AT_BUILDING = {
    "topk": ({"topk": 3}, "topk", "2 on ranks 0, 2; 3 on rank 1"),
    "K": ({"w1": W1[:, :, :16], "w2": W2[:, :16]}, "K", "on rank 1"),
    "I": ({"w1": W1[:, : N // 2], "w2": W2[:, :, : N // 4]}, "I", "on rank 1"),
    "dtype": ({"w1": W1.astype("f2"), "w2": W2.astype("f2")}, "w1", "float16 on rank 1"),
    "activation": ({"activation": "gelu"}, "activation", "gelu on rank 1"),
    "num_experts": ({"num_experts": 9}, "num_experts", "9 on rank 1"),
    "placement": ({"placement": "round_robin"}, "placement", "round_robin on rank 1"),
    "count": ({"w1": W1[:1], "w2": W2[:1]}, None, "w1 must hold"),
    "error": ({"w2": W2[:, :, :3]}, None, "w2 must have shape"),
    "routed_dtype": ({"routed_dtype": np.float32}, "routed_dtype", "float32 on rank 1"),
    "deterministic": ({"deterministic": False}, "deterministic", "False on rank 1"),
    "routing": ({"routing": pymoe.RoutingConfig(2, renormalize=False)}, "routing", "on rank 1"),
}


def expect(name, action, field, text):
    """Return what is wrong with the errors of an action, one a rank."""
    try:
        action()
        found = ("", -1, None)
    except pymoe.CommError as error:
        found = (str(error), error.rank, error.field)
    everywhere = comm.allgather(found)
    if len(set(everywhere)) != 1:
        return f"{name}: ranks raise different things: {everywhere}"
    if text not in found[0] or found[2] != field or (field != "placement" and found[1] not in (ODD, 0)):
        return f"{name}: {found}"
    return ""


def checkpoint():
    """The digits checkpoint over all ranks; then a folder that one rank does not find."""
    sys.path.insert(0, str(DIGITS))
    folder, other = DIGITS / "checkpoint", DIGITS / "nowhere"
    tokens = np.random.default_rng(rank).standard_normal((5, MoELayer.from_checkpoint(folder, 0).K)).astype(np.float32)
    whole = MoELayer.from_checkpoint(folder, 0, dtype="float32")
    with MoELayer.from_checkpoint(folder, 0, dtype="float32", comm=comm, transport=transport) as layer:
        y = layer(tokens)
        loads = comm.allreduce(layer.last_load)
        every = comm.allreduce(whole(tokens) is not None and whole.last_load)
    wrong = [] if np.allclose(y, whole(tokens), rtol=1e-5, atol=1e-5) else ["checkpoint: rows differ"]
    wrong += [] if np.array_equal(loads, every) else ["checkpoint: loads differ"]
    paths = other if rank == ODD else folder
    action = lambda: MoELayer.from_checkpoint(paths, 0, comm=comm, transport=transport)  # noqa: E731
    return [*wrong, expect("no folder", action, None, "CheckpointError")]


def parts():
    """Layers on parts of the ranks, and two threads with a communicator each."""
    wrong = []
    half = comm.Split(rank % 2)
    q = problem(half.size, tokens="random", seed=rank % 2)
    w1, w2, _ = q.experts(half.rank)
    with MoELayer(w1, w2, topk=2, num_experts=8, comm=half, transport="auto") as layer:
        y = layer(q.x[half.rank], topk_weights=q.weights[half.rank], topk_ids=q.ids[half.rank])
        if not np.array_equal(y, q.one_process(rank_order=True)[half.rank]):
            wrong.append("part of the ranks")
    half.Free()
    if MPI.Query_thread() == MPI.THREAD_MULTIPLE:
        comms = [comm.Dup() for _ in range(2)]
        layers = [MoELayer(W1, W2, topk=2, num_experts=8, comm=each, transport=transport) for each in comms]
        errors = []

        def work(layer):
            try:
                for _ in range(20):
                    call(layer)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(layer,)) for layer in layers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for layer, each in zip(layers, comms, strict=True):
            layer.close()
            each.Free()
        wrong += [f"threads: {error}" for error in errors]
    return wrong


def main():
    layer, wrong = build(), []
    for name, (action, field, text) in IN_CALLS.items():
        wrong.append(expect(name, functools.partial(action, layer), field, text))
        call(layer)
    for name, (changes, field, text) in AT_BUILDING.items():
        wrong.append(expect(f"building {name}", functools.partial(build, **changes), field, text))
        call(layer)
    wrong.append(expect("close", lambda: closes_early(layer), "call", "a call on ranks 0, 2; close on rank 1"))
    call(layer)
    layer.close()
    wrong += checkpoint() + parts()
    everywhere = comm.gather([text for text in wrong if text])
    if rank == 0:
        print(json.dumps({"cases": len(wrong), "wrong": [w for w in everywhere if w]}))


main()
