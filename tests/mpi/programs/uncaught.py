"""Rank 1 raises, the others wait for it: argv is "guarded", "plain" or "fine"; with "fine" nobody raises."""

from __future__ import annotations

import contextlib
import sys

from mpi4py import MPI

import pymoe
from tests.mpi.problems import problem

comm = MPI.COMM_WORLD
p = problem(comm.Get_size(), tokens="random")
w1, w2, _ = p.experts(comm.Get_rank())

with pymoe.abort_on_error() if sys.argv[1] == "guarded" else contextlib.nullcontext():
    layer = pymoe.MoELayer(w1, w2, topk=2, num_experts=8, comm=comm)
    if sys.argv[1] != "fine":
        if comm.Get_rank() == 1:
            raise RuntimeError("planted")
        comm.Barrier()
    layer.close()
    print(f"rank {comm.Get_rank()} ends with {sys.argv[1:]}")
