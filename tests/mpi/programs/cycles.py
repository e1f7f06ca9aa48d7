"""Build, call and close layers: argv is transport and how many."""

from __future__ import annotations

import resource
import sys

from mpi4py import MPI

import pymoe
from tests.mpi.problems import problem

comm = MPI.COMM_WORLD
rank = comm.Get_rank()
transport, cycles = sys.argv[1], int(sys.argv[2])
p = problem(comm.Get_size(), tokens="random")
w1, w2, _ = p.experts(rank)


def main():
    early = 0
    for number in range(cycles):
        with pymoe.MoELayer(w1, w2, topk=2, num_experts=8, comm=comm, transport=transport) as layer:
            if number % 50 == 0:
                layer(p.x[rank], topk_weights=p.weights[rank], topk_ids=p.ids[rank])
        if number == cycles // 2:
            early = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - early
    assert grown < 3 * cycles / 2, f"{grown} KiB more after the second half"
    if rank == 0:
        print(f"{cycles} layers, {grown} KiB more after the second half")


main()
