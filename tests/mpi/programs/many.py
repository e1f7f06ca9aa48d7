"""Many more ranks than cores, one layer: argv is the transport, then the number of rounds.

Rank 0 alone computes what all ranks should get, bit for bit.
"""

from __future__ import annotations

import json
import os
import sys
import time

import numpy as np
from mpi4py import MPI

import pymoe
from tests.mpi.problems import problem

comm = MPI.COMM_WORLD
rank, ranks = comm.Get_rank(), comm.Get_size()
transport, rounds = sys.argv[1], int(sys.argv[2])


def main():
    E, topk = 2 * ranks + 3, 8
    p = problem(ranks, E=E, topk=topk, seed=1)
    w1, w2, _ = p.experts(rank)
    wrong, began = [], time.monotonic()
    with pymoe.MoELayer(w1, w2, topk=topk, num_experts=E, comm=comm, transport=transport) as layer:
        layer.warm_up(1)
        for number in range(rounds):
            q = problem(ranks, E=E, topk=topk, tokens=("uneven", "last", "none")[number % 3], seed=number,
                        routing=("random", "holes", "skewed")[number % 3])  # fmt: skip
            q.w1, q.w2, q.owned = p.w1, p.w2, p.owned
            q.node_size = int(os.environ.get("PYMOE_NODE_SIZE", "1")) if transport == "hier" else 1
            y = layer(q.x[rank], topk_weights=q.weights[rank], topk_ids=q.ids[rank])
            due = comm.scatter(q.one_process(rank_order=True) if rank == 0 else None)
            wrong += [] if np.array_equal(y, due) else [f"round {number}"]
    everywhere = comm.gather(wrong)
    if rank == 0:
        found = {"cases": rounds, "wrong": [w for w in everywhere if w], "seconds": round(time.monotonic() - began, 1)}
        print(json.dumps(found))


main()
