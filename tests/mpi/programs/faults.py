"""One rank fails at one stage of its second call: argv is transport, fault, stage, victim.

Every other rank prints what it raises.  After an error that all ranks agree on, a new layer must work.
"""

from __future__ import annotations

import os
import signal
import sys
import time

import numpy as np
from mpi4py import MPI

import pymoe
from pymoe.prepare_finalize.exchange import Exchange
from tests.mpi.problems import problem

comm = MPI.COMM_WORLD
rank, ranks = comm.Get_rank(), comm.Get_size()
transport, fault, stage, victim = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
PLACES = {
    "dispatch": (pymoe.comm.transports.host.HostTransfer, "send"),
    "experts": (pymoe.CpuExperts, "apply"),
    "combine": (Exchange, "give_back"),
    "close": (pymoe.comm.Ranks, "close"),
}
armed = False


def fail():
    """Do what the victim does."""
    say(f"FAULT {time.time()}")
    if fault == "raise":
        raise RuntimeError("planted")
    if fault == "leave":
        sys.exit(0)
    if fault == "exit":
        os._exit(3)
    os.kill(os.getpid(), signal.SIGKILL if fault == "kill" else signal.SIGSTOP)


def plant(owner, name):
    """Let a method fail on the victim once it is armed, before it does anything."""
    method = getattr(owner, name)

    def faulty(*args, **kwargs):
        global armed
        if armed:
            armed = False
            fail()
        return method(*args, **kwargs)

    setattr(owner, name, faulty)


def say(text):
    """Write a line at once and whole: the job may end before a buffer does."""
    os.write(1, f"{text}\n".encode())


def build(p):
    w1, w2, _ = p.experts(rank)
    return pymoe.MoELayer(w1, w2, topk=2, num_experts=8, comm=comm, transport=transport)


def call(layer, p):
    y = layer(p.x[rank], topk_weights=p.weights[rank], topk_ids=p.ids[rank])
    assert np.array_equal(y, p.one_process(rank_order=True)[rank])


def main():
    global armed
    p = problem(ranks, tokens="random")
    layer = build(p)
    call(layer, p)
    if rank == victim and stage in PLACES:
        plant(*PLACES[stage])
        if stage == "dispatch":
            plant(pymoe.comm.transports.shm.ShmTransfer, "send")
        armed = True
    try:
        if stage != "close":
            call(layer, p)
        layer.close()
    except pymoe.CommError as error:
        say(f"RANK {rank} RAISED by={error.rank} {error}")
        if fault in ("stop", "exit", "kill", "leave"):
            raise
        layer.close()
        again = build(p)
        call(again, p)
        again.close()
        say(f"RANK {rank} WORKS AGAIN")


main()
