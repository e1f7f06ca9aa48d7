"""Ask for a transport, by `PYMOE_TRANSPORT`, that cannot be used; then build a layer without asking."""

from __future__ import annotations

import json
import os

from mpi4py import MPI

import pymoe
from tests.mpi.problems import problem

comm = MPI.COMM_WORLD
p = problem(comm.size, tokens="random")
w1, w2, _ = p.experts(comm.rank)


def build():
    return pymoe.MoELayer(w1, w2, topk=2, num_experts=p.num_experts, comm=comm)


try:
    build()
    error = "none"
except pymoe.PymoeError as refusal:
    error = f"{type(refusal).__name__}: {refusal}"
del os.environ["PYMOE_TRANSPORT"]
with build() as layer:
    y = layer(p.x[comm.rank], topk_weights=p.weights[comm.rank], topk_ids=p.ids[comm.rank])
p.node_size = int(os.environ["PYMOE_NODE_SIZE"])
right = y.tobytes() == p.one_process(rank_order=True)[comm.rank].tobytes()
everywhere = comm.gather((error, right))
if comm.rank == 0:
    print(json.dumps(everywhere))
