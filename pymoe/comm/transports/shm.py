"""One node: rows are stored straight into the receiver's part of a shared window of MPI, and read where they lie.

No rank makes progress for another, and no message is sent: the control's table tells where each rank's rows start at
every receiver, and a word per rank tells that they are all there.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import platform
from collections.abc import Sequence
from typing import Any

import numpy as np

from pymoe import environment
from pymoe.comm.control import Control
from pymoe.comm.header import SEQUENCE, WORDS
from pymoe.comm.mpi import bounded, load_mpi, mpi_lock
from pymoe.comm.plan import Counts, counts_of
from pymoe.comm.transports.base import (
    COMBINE,
    DISPATCH,
    Capabilities,
    FlatTransport,
    Payload,
    Transfer,
    Transport,
    ring,
)
from pymoe.comm.waiting import Wait
from pymoe.device.copies import Copies, Mark
from pymoe.errors import CommError, complaint

Array = Any
LINE = 64
"""Bytes of a cache line: what different ranks write is never in one."""
_FOLDER = "/dev/shm"
_ORDERED = platform.machine() in ("x86_64", "AMD64")


class SharedWindow:
    """Memory that all ranks of a node can read and write.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
        Of one node, for pymoe alone.
    size : int
        Bytes of each rank; collective.
    """

    def __init__(self, call: str, comm: Any, size: int, seconds: float) -> None:
        MPI = load_mpi()

        def allocate() -> Any:
            window = MPI.Win.Allocate_shared(size, 1, MPI.INFO_NULL, comm)
            # Stores of others are seen after MPI_Win_sync only, which is legal in such an epoch only.
            window.Lock_all(MPI.MODE_NOCHECK)
            return window

        self._window = bounded(call, "a shared window", seconds, allocate)
        query = self._window.Shared_query
        self.parts = [np.frombuffer(query(rank)[0], np.uint8)[:size] for rank in range(comm.Get_size())]
        self.size = size
        self._pinned_by: Copies | None = None

    def pin(self, copies: Copies) -> None:
        """Let copies between a device and any part go straight; where that is refused, CUDA copies in two steps."""
        first, last = self.parts[0], self.parts[-1]
        nbytes = last.ctypes.data + last.nbytes - first.ctypes.data
        if nbytes != sum(part.nbytes for part in self.parts):
            environment.logger.warning("shared memory in %d pieces is not pinned for CUDA", len(self.parts))
            return
        whole = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(first.ctypes.data))
        try:
            copies.register(whole)
        except RuntimeError as error:  # CuPy's errors of CUDA are such
            environment.logger.warning("shared memory is not pinned for CUDA: %s", error)
            return
        self._pinned_by, self._pinned = copies, whole

    def sync(self) -> None:
        """Order this rank's loads and stores before and after it.

        The memory of x86 orders stores with stores and loads with loads by itself; elsewhere MPI has the instruction.
        """
        if not _ORDERED:
            with mpi_lock():
                self._window.Sync()

    def close(self, call: str, seconds: float, broken: bool) -> None:
        """Free the window, collective; a broken one stays until the process ends."""
        if self._pinned_by is not None:
            self._pinned_by.unregister(self._pinned)
            del self._pinned
        self.parts = []

        def free() -> None:
            self._window.Unlock_all()
            self._window.Free()

        if not broken:
            bounded(call, "the end of a shared window", seconds, free)


def _word(words: Array) -> Any:
    """Return the first of `words` (int64) as one that Python reads and writes five times faster than NumPy's."""
    return ctypes.c_int64.from_address(words.ctypes.data)


class ShmControl(Control):
    """Headers and the whole matrix of counts in a shared window.

    Parts of the window, by rank: two blocks of flag, header and counts, which take turns, then a line for each way that
    counts finished transfers.
    """

    def __init__(self, call: str, comm: Any, seconds: float) -> None:
        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        self._seconds = seconds
        line = LINE // 8
        header, counts = line, line + WORDS
        block = -(-(counts + 2 * self.size) // line) * line
        self._window = SharedWindow(call, comm, 8 * (2 * block + 3 * line), seconds)
        words = [part.view(np.int64) for part in self._window.parts]
        blocks = [w[: 2 * block].reshape(2, block) for w in words]
        self._own = blocks[self.rank]
        self._flags = [[b[turn, :1] for b in blocks] for turn in range(2)]
        self._headers = [b[:, header:counts] for b in blocks]
        self._counts = [b[:, counts : counts + 2 * self.size].reshape(2, self.size, 2) for b in blocks]
        self.done = [[_word(w[2 * block + way * line :]) for w in words] for way in (DISPATCH, COMBINE)]
        """Transfers of each way that each rank has finished."""
        self.word = words[0][2 * block + 2 * line :]
        """A few words that rank 0 alone writes."""
        self._posted = self._current = 0
        self.sync = self._window.sync

    def post(self, words: Array, counts: Array | None = None) -> None:
        turn = self._posted % 2
        self._headers[self.rank][turn] = words
        self._headers[self.rank][turn, SEQUENCE] = self._posted
        self._counts[self.rank][turn] = 0 if counts is None else counts
        self.sync()
        self._posted += 1
        self._flags[turn][self.rank][0] = self._posted
        self.sync()

    def poll(self) -> None:
        self.sync()

    def missing(self) -> list[int]:
        due = self._current + 1
        return [rank for rank, flag in enumerate(self._flags[self._current % 2]) if flag[0] != due]

    def seen(self) -> Array:
        found = []
        for sequence in (self._current, self._current + 1):
            for rank, flag in enumerate(self._flags[sequence % 2]):
                if rank != self.rank and flag[0] == sequence + 1:
                    found.append(self._headers[rank][sequence % 2].copy())
        return np.array(found, np.int64).reshape(-1, WORDS)

    def take(self) -> tuple[Array, Counts, Counts]:
        self.sync()
        turn = self._current % 2
        table = np.stack([header[turn] for header in self._headers])
        matrix = np.stack([counts[turn] for counts in self._counts])
        self._current += 1
        # matrix[s, d] holds the rows from s to d, and those that d returns to s.
        return table, counts_of(matrix[:, :, 0], self.rank), counts_of(matrix[:, :, 1].T, self.rank)

    def close(self, broken: bool) -> None:
        self._own = self._flags = self._headers = self._counts = self.done = self.word = None  # type: ignore[assignment]
        self._window.close("MoELayer", self._seconds, broken)


class ShmTransport(FlatTransport):
    """Rows in a shared window; grows, with all ranks of the node, when some rank receives more than ever."""

    name = "shm"
    capabilities = Capabilities(one_sided=True)
    takes_marks = True

    def __init__(self, comm: Any, control: ShmControl, seconds: float) -> None:
        self.comm, self.control, self.seconds = comm, control, seconds
        self.rank, self.size = control.rank, control.size
        self._windows: dict[int, SharedWindow] = {}
        self.ring = ring(self.rank, self.size)
        self._numbers = [0, 0]
        self._grown = 0
        self._copies: Copies | None = None

    def for_device(self, copies: Copies) -> Transport:
        if self._copies is None:
            self._copies = copies
            for window in self._windows.values():
                window.pin(copies)
        return self

    def open(self, way: int, counts: Counts, widths: Sequence[int]) -> Transfer:
        assert counts.start is not None and counts.most is not None
        end, parts = 0, []
        for width in widths:
            parts.append((end, width))
            end += -(-counts.most * width // LINE) * LINE
        window = self._windows.get(way)
        if window is None or window.size < end:
            window = self._grow(way, end)
        self._numbers[way] += 1
        return ShmTransfer(self, way, window, counts, parts)

    def number(self, way: int) -> int:
        """Return how many transfers of a way have been opened."""
        return self._numbers[way]

    def _grow(self, way: int, size: int) -> SharedWindow:
        """Replace the window of a way; all ranks come here together, since all know all counts."""
        old = self._windows.pop(way, None)
        if old is not None:
            old.close("MoELayer", self.seconds, False)
        size = 1 << max(size - 1, 65535).bit_length()
        self._check_room(size * self.size)
        window = self._windows[way] = SharedWindow("MoELayer", self.comm, size, self.seconds)
        if self._copies is not None:
            window.pin(self._copies)
        return window

    def _check_room(self, size: int) -> None:
        """Refuse, on all ranks alike, what the shared memory cannot hold: touching it would end the process."""
        self._grown += 1
        word, control = self.control.word, self.control
        if self.rank == 0:
            room = os.statvfs(_FOLDER)
            word[1] = room.f_bavail * room.f_frsize if os.path.isdir(_FOLDER) else size
            control.sync()
            word[0] = self._grown
        wait = Wait(self.seconds)
        while word[0] != self._grown:
            if wait.over:
                rule = f"answer within {self.seconds:g} s"
                raise CommError(complaint("MoELayer", "rank 0", rule, "no word about shared memory"))
            wait.pause()
            control.sync()
        if int(word[1]) < size:
            rule = f"have {size} bytes free for the rows of this call"
            remedy = "Enlarge it, or use transport='host'"
            raise CommError(complaint("MoELayer", _FOLDER, rule, int(word[1]), remedy))

    def close(self, call: str, seconds: float, broken: bool) -> None:
        windows, self._windows = self._windows, {}
        for _, window in sorted(windows.items()):
            window.close(call, seconds, broken)


class ShmTransfer(Transfer):
    """Stores into the receivers' parts, then one word.

    With few ranks and rows a transfer takes microseconds: it does arithmetic on Python's integers, which small arrays
    would make slower than the copies, and makes no array that is not needed.
    """

    def __init__(
        self, transport: ShmTransport, way: int, window: SharedWindow, counts: Counts, parts: list[tuple[int, int]]
    ) -> None:
        self._transport, self._way, self._window, self._parts = transport, way, window, parts
        self._number = transport.number(way)
        self._done = transport.control.done[way]
        self._send: list[int] = counts.send.tolist()
        self._start: list[int] = counts.start.tolist()  # type: ignore[union-attr]
        self._receive: list[int] = counts.receive.tolist()
        self._waits_for = [rank for rank, rows in enumerate(self._receive) if rows]
        self._untold = self._waits_for
        self._mark: Mark | None = None
        received = sum(self._receive)
        self.inbox = [self._rows(transport.rank, part, 0, received) for part in range(len(parts))]

    def _rows(self, rank: int, part: int, start: int, rows: int) -> Array:
        first, width = self._parts[part]
        return np.ndarray((rows, width), np.uint8, self._window.parts[rank], first + start * width)

    def send(self, payloads: Sequence[Payload]) -> None:
        self._mark = self._write(payloads)
        if self._mark is None:
            self._tell()

    def _write(self, payloads: Sequence[Payload]) -> Mark | None:
        """Store all rows; return what says when they are there, if they are not yet."""
        transport, last_mark = self._transport, None
        to = [0, *itertools.accumulate(self._send)]
        for destination in transport.ring:
            first, rows = to[destination], self._send[destination]
            if not rows:
                continue
            start = self._start[destination]
            for part, payload in enumerate(payloads):
                if destination == transport.rank:
                    payload.keep(first, first + rows, self.inbox[part], start)
                    continue
                # Copies of one device are done in their order: the last mark stands for all.
                mark = payload.write(first, first + rows, self._rows(destination, part, start, rows))
                last_mark = last_mark if mark is None else mark
        return last_mark

    def _tell(self) -> None:
        """Say that all rows are stored."""
        self._window.sync()
        self._done[self._transport.rank].value = self._number
        self._window.sync()

    def started(self) -> bool:
        # Rows that are stored count for nothing until the word behind them is.
        return False

    def missing(self) -> list[int]:
        if self._mark is not None:
            self.unsettled()
        if self._waits_for:
            self._window.sync()
            done, number = self._done, self._number
            self._waits_for = [rank for rank in self._waits_for if done[rank].value < number]
            self._window.sync()
        return self._waits_for

    def arrived(self) -> list[tuple[int, int]]:
        here = [rank for rank in self._untold if rank not in self._waits_for]
        self._untold = self._waits_for
        first = [0, *itertools.accumulate(self._receive)]
        return [(first[rank], first[rank + 1]) for rank in here if rank != self._transport.rank]

    def unsettled(self) -> list[int]:
        if self._mark is None:
            return []
        if not self._mark.done:
            return [self._transport.rank]
        self._mark = None
        self._tell()
        return []

    def cancel(self, ranks: Sequence[int]) -> None:
        self._waits_for = [rank for rank in self._waits_for if rank not in ranks]
        self._untold = [rank for rank in self._untold if rank not in ranks]
