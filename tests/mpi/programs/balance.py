"""Count loads, sum them, plan, and run the layer by the plan: every rank against one process."""

from __future__ import annotations

import json

import numpy as np
from mpi4py import MPI

import pymoe
from pymoe.comm.eplb import LoadWindow
from pymoe.comm.loads import sum_over_ranks
from pymoe.comm.rebalance import rebalance
from tests.mpi.problems import problem

comm = MPI.COMM_WORLD
rank, ranks = comm.Get_rank(), comm.Get_size()
wrong, cases = [], 0
for seed in range(6):
    p = problem(ranks, E=2 * ranks + 1, topk=3, exact=True, routing="holes", seed=seed)
    window = LoadWindow(1, p.num_experts)
    window.record(p.ids[rank])
    window.step()
    total = sum_over_ranks(comm, window.total())
    ids = np.concatenate(p.ids)
    if total[0].tolist() != np.bincount(ids[(ids >= 0) & (ids < p.num_experts)], minlength=p.num_experts).tolist():
        wrong.append(f"seed {seed}: loads {total.tolist()}")
    plan = rebalance(total, num_physical=3 * ranks, ranks=ranks)
    mine = plan.experts(rank)
    with pymoe.MoELayer(p.w1[mine], p.w2[mine], topk=3, num_experts=p.num_experts, comm=comm, placement=plan) as layer:
        y = layer(p.x[rank], topk_weights=p.weights[rank], topk_ids=p.ids[rank])
    if y.tobytes() != p.one_process(rank_order=False)[rank].tobytes():
        wrong.append(f"seed {seed}: rows of rank {rank}")
    cases += 1
wrong = comm.gather(wrong)
if rank == 0:
    print(json.dumps({"wrong": sum(wrong, []), "cases": cases}))
