"""Rows of a device by way of the host, with copies that come as late as they may: argv is the transport.

No GPU takes part: NumPy arrays stand for the device's, `LateCopies` for the copies beside the stream.
"""

from __future__ import annotations

import json
import sys
import types

import numpy as np
from mpi4py import MPI

import pymoe
from pymoe.comm import agree, connecting, group, place
from pymoe.comm.plan import DispatchPlan, plan_all, plan_dispatch
from pymoe.comm.transports import host
from pymoe.comm.transports.base import Payload
from pymoe.prepare_finalize import exchange
from pymoe.prepare_finalize.exchange import Exchange
from tests.comm.late_copies import NOTHING, LateCopies

comm = MPI.COMM_WORLD
rank, ranks = comm.Get_rank(), comm.Get_size()
ROUNDS = 60


class DeviceArray(np.ndarray):
    """An array that counts as one of a device."""

    device = types.SimpleNamespace(id=0)


def on_device(x):
    return x.view(DeviceArray)


def stamp(owner, tokens, width):
    """Return rows (tokens, width) that say whose they are; none of their bytes is the filler."""
    rows = (np.arange(tokens)[:, None] * 7 + np.arange(width) * 3 + 11 * owner) % NOTHING
    return rows.astype(np.uint8)


def plans(number):
    """Return every rank's plan: some to all, some by a routing with holes, with ranks that have no tokens."""
    made = []
    for owner in range(ranks):
        rng = np.random.default_rng([number, owner])
        tokens = 0 if rng.random() < 0.2 else int(rng.integers(1, 40))
        if number % 5 == 0:
            made.append(plan_all(tokens, ranks))
        elif number % 5 == 1:
            made.append(plan_dispatch(np.full((tokens, 2), -1), ranks))
        else:
            made.append(plan_dispatch(rng.integers(-1, ranks, (tokens, 3)), ranks))
    return made


def run_round(members, number, width, device, fault=None):
    """Send stamped rows there and back; return checks of what came, for when the user's stream gets there.

    `fault` says after which step this rank raises.
    """
    made = plans(number)
    plan: DispatchPlan = made[rank]
    tokens = len(plan.row_of_token)
    x = stamp(rank, tokens, width)
    beside = stamp(rank + 100, len(plan.token), 12)
    kind = on_device if device else np.asarray
    way = Exchange(members, plan, plan.counts, [Payload(kind(x.copy()), plan.token), Payload(beside)], 4 * 8)
    way.announce("test", tokens, {}, {"pair": "test", "dtype": "uint8"})
    way.send()
    if fault == "sent":
        raise RuntimeError("planted")
    rows, meta = way.receive()
    if fault == "received":
        raise RuntimeError("planted")
    led = LateCopies.made[-1].led if device else (0, 0)
    parts = []
    for owner, theirs in enumerate(made):
        start = int(theirs.counts[:rank].sum())
        mine = theirs.token[start : start + theirs.counts[rank]]
        parts.append((stamp(owner, len(theirs.row_of_token), width)[mine],
                      stamp(owner + 100, len(theirs.token), 12)[start : start + len(mine)]))  # fmt: skip
    came = np.concatenate([part[0] for part in parts])
    wrong = [] if np.array_equal(meta, np.concatenate([part[1] for part in parts])) else ["what is beside them"]

    def check_rows(rows=rows):
        LateCopies.made and LateCopies.made[-1].user_stream(led)
        return [] if np.array_equal(rows, came) else ["rows"]

    later = [check_rows]
    if not device:
        wrong, later = wrong + check_rows(), []  # the host's inbox is used again
    # Whole numbers that float32 adds exactly, in any order, so that sums on the way are seen too.
    way.give_back(kind(came[:, :8].astype(np.float32) + rank))
    raw, places = way.collect(), way.row_of_token
    led_back = LateCopies.made[-1].led if device else (0, 0)

    def check_sums():
        LateCopies.made and LateCopies.made[-1].user_stream(led_back)
        back = np.ascontiguousarray(raw).view(np.float32)
        back = np.concatenate([back, np.zeros((1, back.shape[1]), np.float32)])  # the row at -1
        total = np.where((places >= 0)[:, :, None], back[places], 0).sum(axis=1)
        goes = np.zeros((tokens, ranks), bool)
        goes[plan.token, plan.destination()] = True
        expected = goes.sum(axis=1)[:, None] * x[:, :8].astype(np.float32)
        expected += (goes * np.arange(ranks)).sum(axis=1)[:, None]
        return [] if np.array_equal(total, expected) else ["sums"]

    if not device:
        wrong, later = wrong + check_sums(), []
    return wrong, [*later, *([check_sums] if device else [])]


def run_faulty(members, found, number):
    """Let one rank raise in the middle of a call; return what is wrong with the error that all see."""
    victim, text = number % ranks, ""
    fault = ("sent", "received")[number % 2] if rank == victim else None
    try:
        with found.guard("test"):
            run_round(members, number, 64, True, fault)
    except pymoe.CommError as error:
        text = str(error)
    everywhere = comm.allgather(text)
    right = len(set(everywhere)) == 1 and f"rank {victim} must complete the call" in text and "planted" in text
    return [] if right else [f"errors {everywhere}"]


def main():
    is_device = lambda x: isinstance(x, DeviceArray)  # noqa: E731
    exchange.is_cuda = group.is_cuda = is_device
    group.Copies = LateCopies
    host.DEVICE_MESSAGE_BYTES = 300, 300  # one row, or a few
    with connecting("test", comm, sys.argv[1]) as found:
        members = place("test", found, "linear", ranks, 1)
        agree("test", members, {}, {})
    wrong, later = [], []
    for number in range(ROUNDS):
        if found.transport.recoverable and number % 7 == 6 and ranks > 1:
            later = []  # nobody reads what came before an error
            wrong += [f"round {number}: {text}" for text in run_faulty(members, found, number)]
        # Calls of the host's arrays in between use the same messages and windows.
        with found.guard("test"):
            at_once, checks = run_round(members, number, (64, 9)[number % 2], number % 3)
        # The user's stream reads what came in one call after the next call, or at once.
        due, later = (later + checks, []) if number % 4 == 3 else (later, checks)
        wrong += [f"round {number}: {text}" for text in at_once + [text for check in due for text in check()]]
    copies = LateCopies.made[-1]
    wrong += [] if len(LateCopies.made) == 1 else [f"{len(LateCopies.made)} sets of copies"]
    members.close("test")
    wrong += ["memory stays pinned"] if copies.registered else []
    everywhere = comm.gather(wrong)
    if rank == 0:
        print(json.dumps({"cases": ROUNDS, "wrong": [w for w in everywhere if w]}))


main()
