"""Control: how headers and counts reach all ranks.  Rows of tokens are the transports' business.

Exchanges are numbered.  A rank posts the header of exchange n, and takes the table of n once every rank's has arrived;
nobody posts n + 2 before everybody has posted n + 1, which bounds what may be under way to two exchanges.
"""

from __future__ import annotations

import abc
from typing import Any

import numpy as np

from pymoe.comm.header import BACK, COUNT, SEQUENCE, WORDS
from pymoe.comm.mpi import mpi_call, mpi_lock
from pymoe.comm.plan import Counts

Array = Any
HEADER_TAG = 1


class Control(abc.ABC):
    """Headers of one communicator.

    Attributes
    ----------
    rank, size : int
    """

    rank: int
    size: int

    @abc.abstractmethod
    def post(self, words: Array, counts: Array | None = None) -> None:
        """Send the header `words` (64,) of the next exchange, with ``counts[d]`` (2,) rows to and back from rank d."""

    @abc.abstractmethod
    def poll(self) -> None:
        """Make progress; raises nothing for what others say."""

    @abc.abstractmethod
    def missing(self) -> list[int]:
        """Return the ranks whose header of the current exchange has not arrived."""

    @abc.abstractmethod
    def seen(self) -> Array:
        """Return the headers (n, 64) of others, of the current exchange and the next, that have arrived already."""

    @abc.abstractmethod
    def take(self) -> tuple[Array, Counts, Counts]:
        """Return the table (R, 64) of the current exchange, the counts there and back, and turn to the next one."""

    def dead(self) -> int | None:
        """Return a rank whose process MPI knows to have ended, if it can tell."""
        return None

    @abc.abstractmethod
    def close(self, broken: bool) -> None:
        """Let go of what the control holds; a broken one may not talk to the others any more."""


class MpiControl(Control):
    """One message a pair, received by requests that are always posted: a header is seen whenever it comes."""

    def __init__(self, comm: Any) -> None:
        self.comm = comm
        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        self._peers = [rank for rank in range(self.size) if rank != self.rank]
        self._landing = np.zeros((self.size, WORDS), np.int64)
        self._tables = np.zeros((2, self.size, WORDS), np.int64)
        self._arrived = np.full((2, self.size), -1, np.int64)
        self._outgoing = [np.zeros((self.size, WORDS), np.int64) for _ in range(2)]
        self._stuck: list[Any] = []
        self._sends: list[list[Any]] = [[], []]
        self._posted = self._current = 0
        with mpi_lock():
            self._receives = [comm.Recv_init(self._landing[peer], peer, HEADER_TAG) for peer in self._peers]
            for request in self._receives:
                request.Start()

    def post(self, words: Array, counts: Array | None = None) -> None:
        place = self._posted % 2
        with mpi_call("header"), mpi_lock():
            if self._sends[place] and not self._sends[place][0].Testall(self._sends[place]):
                # Headers are small and leave at once; towards a rank that stalls they may not, and must stay.
                self._stuck.append((self._outgoing[place], self._sends[place]))
                self._outgoing[place] = np.zeros((self.size, WORDS), np.int64)
            outgoing = self._outgoing[place]
            outgoing[:] = words
            outgoing[:, SEQUENCE] = self._posted
            if counts is not None:
                outgoing[:, COUNT : BACK + 1] = counts
            self._tables[place, self.rank] = outgoing[self.rank]
            self._arrived[place, self.rank] = self._posted
            self._sends[place] = [self.comm.Isend(outgoing[peer], peer, HEADER_TAG) for peer in self._peers]
        self._posted += 1

    def poll(self) -> None:
        if not self._receives:
            return
        with mpi_call("header"), mpi_lock():
            done = self._receives[0].Testsome(self._receives) or []
            for number in done:
                peer = self._peers[number]
                sequence = int(self._landing[peer, SEQUENCE])
                self._tables[sequence % 2, peer] = self._landing[peer]
                self._arrived[sequence % 2, peer] = sequence
                self._receives[number].Start()

    def missing(self) -> list[int]:
        return [int(rank) for rank in np.flatnonzero(self._arrived[self._current % 2] != self._current)]

    def seen(self) -> Array:
        places = np.array([self._current % 2, (self._current + 1) % 2])
        there = self._arrived[places] == np.array([[self._current], [self._current + 1]])
        there[:, self.rank] = False
        return self._tables[places][there]

    def take(self) -> tuple[Array, Counts, Counts]:
        table = self._tables[self._current % 2].copy()
        own = self._outgoing[self._current % 2]
        self._current += 1
        there = Counts(own[:, COUNT].copy(), table[:, COUNT].copy())
        return table, there, Counts(table[:, BACK].copy(), own[:, BACK].copy())

    def dead(self) -> int | None:
        # Only an MPI that goes on after the end of a rank (ULFM) comes to this question.
        try:
            failed, everyone = self.comm.Get_failed(), self.comm.Get_group()
            ranks = failed.Translate_ranks(None, everyone)
        except Exception:  # MPIs without it refuse in several ways
            return None
        return min((int(rank) for rank in ranks), default=None)

    def close(self, broken: bool) -> None:
        receives, self._receives = self._receives, []
        with mpi_lock():
            for request in receives:
                request.Cancel()
            if not broken:
                for request in receives:
                    request.Wait()
                    request.Free()
                for sends in filter(None, self._sends):
                    # They have arrived, but an MPI keeps what belongs to a request until it is asked.
                    sends[0].Testall(sends)
