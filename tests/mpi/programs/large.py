"""A dispatch of more than 2**31 bytes from one rank to another."""

from __future__ import annotations

import sys

import numpy as np
from mpi4py import MPI

from pymoe.comm import agree, connecting, place
from pymoe.comm.plan import plan_dispatch
from pymoe.comm.transports.base import Payload
from pymoe.prepare_finalize.exchange import Exchange

comm = MPI.COMM_WORLD
rank = comm.Get_rank()
WIDTH, ROWS = 1 << 16, (1 << 15) + 7


def main():
    with connecting("large", comm, sys.argv[1]) as group:
        ranks = place("large", group, "linear", 2, 1)
        agree("large", ranks, {}, {})
    # Rank 0 has all tokens, and all of them go to rank 1; rows start with their number.
    tokens = ROWS if rank == 0 else 0
    plan = plan_dispatch(np.ones((tokens, 1), np.int64), 2)
    rows = np.zeros((tokens, WIDTH), np.uint8)
    rows[:, :8] = np.arange(tokens, dtype=np.int64)[:, None].view(np.uint8)
    rows[:, -8:] = rows[:, :8]
    with group.guard("large"):
        exchange = Exchange(ranks, plan, plan.counts, [Payload(rows)], 8)
        exchange.announce("large", tokens, {}, {})
        exchange.send()
        (received,) = exchange.receive()
        assert received.size > 2**31 or rank == 0
        for end in (received[:, :8], received[:, -8:]):
            numbers = np.ascontiguousarray(end).view(np.int64)[:, 0]
            assert np.array_equal(numbers, np.arange(len(received)))
        exchange.give_back(received[:, :8])
        back = exchange.collect().view(np.int64)
        assert np.array_equal(back[:, 0], np.arange(tokens))
    ranks.close("large")
    if rank == 0:
        print("right")


main()
