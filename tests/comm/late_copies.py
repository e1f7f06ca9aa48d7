"""Copies of a device that does not exist: every one happens as late as it may, so that a missing wait is seen.

A copy or a gather is queued; it runs when somebody waits for a mark behind it, or has asked often enough.
Memory of the device is NumPy's too, filled with a byte that no row has, so that rows which were read too early differ.
"""

from __future__ import annotations

import numpy as np

NOTHING = 0xEE
ASKED = 3
"""How often a mark is asked before it is done."""


class Mark:
    def __init__(self, queue):
        self._queue, self._end, self._asked = queue, len(queue.works), 0

    @property
    def done(self):
        self._asked += 1
        if self._asked > ASKED:
            self.synchronize()
        return self._queue.ran >= self._end

    def synchronize(self):
        self._queue.run(self._end)


class Queue:
    """Work in its order, run as far as somebody has waited."""

    def __init__(self):
        self.works, self.ran = [], 0

    def put(self, work):
        self.works.append(work)

    def run(self, end):
        while self.ran < end:
            self.works[self.ran]()
            self.works[self.ran] = None
            self.ran += 1


class LateCopies:
    """`pymoe.device.copies.Copies`, over NumPy and with two queues for its streams.

    What it is asked for is checked: rows are contiguous bytes of the right shape, and `follow` comes before copies.
    """

    made: list[LateCopies] = []

    def __init__(self):
        self.out, self.into = Queue(), Queue()
        self.followed, self.allocated, self.registered, self.led = 0, 0, {}, (0, 0)
        LateCopies.made.append(self)

    def pinned(self, nbytes):
        self.allocated += nbytes
        return np.full(nbytes, NOTHING, np.uint8)

    def empty(self, n, width):
        return np.full((n, width), NOTHING, np.uint8)

    def follow(self):
        self.followed += 1

    def lead(self):
        self.led = len(self.out.works), len(self.into.works)

    def user_stream(self, led):
        """Do what the user's stream waits for before it reads, when that is: `led` is `lead`'s answer at that time."""
        self.out.run(led[0])
        self.into.run(led[1])

    def gather(self, rows, order):
        assert self.followed
        out, order = self.empty(len(order), rows.shape[1]), np.array(order)
        self.check(out, rows)

        def work():
            out[...] = rows[order]

        self.out.put(work)
        return out

    def within(self, rows, out):
        self._copy(self.out, out, rows)

    def to_host(self, rows, out):
        self._copy(self.out, out, rows)

    def to_device(self, rows, out):
        self._copy(self.into, out, rows)

    def _copy(self, queue, out, rows):
        assert self.followed and out.shape == rows.shape and out.dtype == rows.dtype
        self.check(out, rows)

        def work():
            out[...] = rows

        queue.put(work)

    @staticmethod
    def check(*arrays):
        assert all(x.flags.c_contiguous for x in arrays)

    def left(self):
        return Mark(self.out)

    def came(self):
        return Mark(self.into)

    def register(self, memory):
        assert memory.ctypes.data not in self.registered
        self.registered[memory.ctypes.data] = memory.nbytes

    def unregister(self, memory):
        self.user_stream((len(self.out.works), len(self.into.works)))
        assert self.registered.pop(memory.ctypes.data) == memory.nbytes
