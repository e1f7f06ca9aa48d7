"""Virtual ranks: many groups in one process, over mailboxes in memory instead of MPI.

Plans, headers, agreement and the order of rows are those of real ranks; only control and transport are others.  Two
ways to run them: in lockstep, one step of every rank after the other, which reaches 1024 ranks; or with a thread a
rank, which runs whole layers.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np

from pymoe import checks
from pymoe.comm.control import Control
from pymoe.comm.group import Group
from pymoe.comm.header import BACK, COUNT, SEQUENCE, WORDS, Code
from pymoe.comm.plan import Counts, rank_offsets
from pymoe.comm.transports.base import Capabilities, FlatTransport, Payload, Transfer
from pymoe.errors import CommError, complaint

Array = Any

POISON = 0xA5
"""What a byte of an inbox holds before a row arrives there."""


class SimComm:
    """A communicator of virtual ranks.

    Parameters
    ----------
    size : int
        R.

    Attributes
    ----------
    groups : tuple of Group
        One a rank; a `MoELayer` takes a group as its `comm`.

    Examples
    --------
    >>> from pymoe.comm.sim import SimComm
    >>> w1, w2 = np.ones((4, 16, 8), np.float32), np.ones((4, 8, 8), np.float32)
    >>> def program(group):
    ...     mine = slice(2 * group.rank, 2 * group.rank + 2)
    ...     with pymoe.MoELayer(w1[mine], w2[mine], topk=1, num_experts=4, comm=group) as layer:
    ...         return layer(np.zeros((3, 8), np.float32), np.ones((3, 4), np.float32)).shape
    >>> SimComm(2).run(program)
    [(3, 8), (3, 8)]
    """

    def __init__(self, size: int) -> None:
        self.size = checks.integer("SimComm", "size", size, 1)
        self._board = _Board(self.size)
        groups = []
        for rank in range(self.size):
            transport = SimTransport(self._board, rank)
            groups.append(Group(SimControl(self._board, rank), transport, transport))
            groups[-1].users = 1  # so that the last layer on a group does not close it
        self.groups = tuple(groups)

    def lockstep(self, call: str, programs: Sequence[Generator[None, None, Any]]) -> list[Any]:
        """Run one call of every rank in this thread; return what each returned.

        Parameters
        ----------
        call : str
            Name of the call in errors.
        programs : sequence of generator
            One a rank.  It yields before each wait, so that all ranks have said and sent what the wait is for.

        Raises
        ------
        CommError
            A rank waits for what another has not sent: a yield is missing, or the ranks take different ways.
        """
        results: dict[int, Any] = {}
        under_way = dict(enumerate(programs))
        with contextlib.ExitStack() as guards:
            for group in self.groups:
                guards.enter_context(group.guard(call))
            self._board.lockstep = True
            failed: BaseException | None = None
            try:
                while under_way:
                    for rank, program in list(under_way.items()):
                        try:
                            next(program)
                        except StopIteration as end:
                            results[rank] = end.value
                            del under_way[rank]
            except BaseException as error:
                # Guards must not see it: they would tell ranks that nobody steps any more.
                failed = error
            finally:
                self._board.lockstep = False
        if failed is not None:
            raise failed
        return [results[rank] for rank in range(self.size)]

    def run(self, program: Callable[[Group], Any]) -> list[Any]:
        """Call `program` with each rank's group, each in a thread of its own; return the results, or raise an error.

        Where several ranks raise, as they do when they agree on an error, that of the lowest rank is raised.
        """
        results: list[Any] = [None] * self.size
        errors: list[BaseException | None] = [None] * self.size

        def work(rank: int) -> None:
            try:
                results[rank] = program(self.groups[rank])
            except BaseException as error:  # handed to the caller
                errors[rank] = error

        threads = [threading.Thread(target=work, args=(rank,), name=f"rank {rank}") for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for error in errors:
            if error is not None:
                raise error
        return results


class _Exchange:
    """What all ranks posted in one exchange."""

    def __init__(self, size: int) -> None:
        self.words = np.zeros((size, WORDS), np.int64)
        self.counts = np.zeros((size, size, 2), np.int64)
        self.posted = np.zeros(size, bool)
        self.taken = 0


class _Board:
    """Where virtual ranks leave headers and rows for each other."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.lock = threading.Lock()
        self.lockstep = False
        self._exchanges: dict[int, _Exchange] = {}
        self._mail: dict[tuple[int, int, int], list[tuple[int, list[Array]]]] = {}

    def exchange(self, number: int) -> _Exchange:
        """Return the exchange of that number."""
        with self.lock:
            if number not in self._exchanges:
                self._exchanges[number] = _Exchange(self.size)
            return self._exchanges[number]

    def taken(self, number: int) -> None:
        """Note that one more rank has taken an exchange; the last one ends it."""
        with self.lock:
            exchange = self._exchanges[number]
            exchange.taken += 1
            if exchange.taken == self.size:
                del self._exchanges[number]

    def mail(self, way: int, number: int, rank: int, source: int, chunks: list[Array]) -> None:
        """Leave rows of `source` for transfer `number` of `rank`."""
        with self.lock:
            self._mail.setdefault((way, number, rank), []).append((source, chunks))

    def collect(self, way: int, number: int, rank: int) -> list[tuple[int, list[Array]]]:
        """Return what has come since the last look."""
        with self.lock:
            return self._mail.pop((way, number, rank), [])

    def check(self, rank: int, missing: list[int], what: str) -> list[int]:
        """Return `missing`; in lockstep nothing more will come while one rank waits, so that is an error."""
        if missing and self.lockstep:
            rule = f"have {what} before one of them waits"
            raise CommError(complaint("SimComm", "every rank", rule, f"rank {rank} waiting for ranks {missing[:8]}"))
        return missing


class SimControl(Control):
    """Headers on the board; the counts of all ranks are one matrix."""

    def __init__(self, board: _Board, rank: int) -> None:
        self._board = board
        self.rank, self.size = rank, board.size
        self._posted = self._current = 0

    def post(self, words: Array, counts: Array | None = None) -> None:
        exchange = self._board.exchange(self._posted)
        exchange.words[self.rank] = words
        exchange.words[self.rank, SEQUENCE] = self._posted
        if counts is not None:
            exchange.counts[self.rank] = counts
        exchange.posted[self.rank] = True
        self._posted += 1

    def poll(self) -> None:
        pass

    def missing(self) -> list[int]:
        absent = np.flatnonzero(~self._board.exchange(self._current).posted).tolist()
        return self._board.check(self.rank, absent, "posted a header")

    def seen(self) -> Array:
        """Return the headers that tell of trouble; nobody looks at the others before all have come."""
        found = []
        for number in (self._current, self._current + 1):
            exchange = self._board.exchange(number)
            told = exchange.posted & (exchange.words[:, 3] != Code.FINE)
            told[self.rank] = False
            found.append(exchange.words[told])
        return np.concatenate(found)

    def take(self) -> tuple[Array, Counts, Counts]:
        exchange = self._board.exchange(self._current)
        table, here, there = exchange.words.copy(), exchange.counts[self.rank], exchange.counts[:, self.rank].copy()
        table[:, [COUNT, BACK]] = there
        self._board.taken(self._current)
        self._current += 1
        return table, Counts(here[:, 0], there[:, 0]), Counts(there[:, 1], here[:, 1])

    def close(self, broken: bool) -> None:
        pass


class SimTransport(FlatTransport):
    """Rows by mailbox."""

    name = "sim"
    capabilities = Capabilities(one_sided=True, zero_copy_receive=False)

    def __init__(self, board: _Board, rank: int) -> None:
        self._board, self._rank = board, rank
        self._opened = [0, 0]

    def open(self, way: int, counts: Counts, widths: Sequence[int]) -> Transfer:
        number = self._opened[way]
        self._opened[way] += 1
        return SimTransfer(self._board, self._rank, (way, number), counts, widths)

    def close(self, call: str, seconds: float, broken: bool) -> None:
        pass


class SimTransfer(Transfer):
    """The rows of one way of one call."""

    def __init__(self, board: _Board, rank: int, key: tuple[int, int], counts: Counts, widths: Sequence[int]) -> None:
        self._board, self._rank, self._key = board, rank, key
        self._to, self._from = rank_offsets(counts.send), rank_offsets(counts.receive)
        self.inbox = [np.full((int(self._from[-1]), width), POISON, np.uint8) for width in widths]
        self._due = set(np.flatnonzero(counts.receive).tolist())
        self._started = False

    def send(self, payloads: Sequence[Payload]) -> None:
        self._started = True
        for destination in np.flatnonzero(np.diff(self._to)).tolist():
            start, stop = self._to[destination], self._to[destination + 1]
            chunks = [rows[start:stop].copy() if order is None else rows[order[start:stop]] for rows, order in payloads]
            self._board.mail(*self._key, destination, self._rank, chunks)

    def started(self) -> bool:
        return self._started

    def missing(self) -> list[int]:
        for source, chunks in self._board.collect(*self._key, self._rank):
            start, stop = int(self._from[source]), int(self._from[source + 1])
            if source not in self._due or any(len(chunk) != stop - start for chunk in chunks):
                rule = f"send the {stop - start} rows that it announced, once"
                raise CommError(complaint("SimComm", f"rank {source}", rule, f"{len(chunks[0])} for rank {self._rank}"))
            self._due.remove(source)
            for inbox, chunk in zip(self.inbox, chunks, strict=True):
                inbox[start:stop] = chunk
        return self._board.check(self._rank, sorted(self._due), "sent its rows")

    def unsettled(self) -> list[int]:
        return []

    def cancel(self, ranks: Sequence[int]) -> None:
        self._due -= set(ranks)
