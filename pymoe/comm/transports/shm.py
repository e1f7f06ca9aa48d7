"""One node: rows are stored straight into the receiver's part of a shared window of MPI, and read where they lie.

No rank makes progress for another, and no message is sent: the control's table tells where each rank's rows start at
every receiver, and a word per rank tells that they are all there.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import platform
from collections.abc import Iterable, Sequence
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
    rank_offsets,
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
_AS_THEY_LIE = np.zeros(0, np.int64)
_BYTE = np.dtype(np.uint8)
_LOOKS = 200
"""At the others' words, some 10 to 40 ns each, before Python looks at anything else."""


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
        self.desk = np.zeros(0, np.int64)
        """What storing rows needs of the window, from its owner."""
        self.desk_address = 0
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
        from pymoe.comm.transports import _numba_rows

        self.kernels, self._desk = _numba_rows.Kernels(), _numba_rows.desk

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
        words = [ctypes.addressof(word) for word in self.control.done[way]]
        window.desk = self._desk(self.rank, window.parts, words)
        window.desk_address = window.desk.ctypes.data
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

    With few ranks and rows a transfer takes microseconds: rows of the host are stored by one call that Python takes no
    part in, and nothing is made here that is not needed.
    """

    def __init__(
        self, transport: ShmTransport, way: int, window: SharedWindow, counts: Counts, parts: list[tuple[int, int]]
    ) -> None:
        self._transport, self._window, self._counts, self._parts = transport, window, counts, parts
        self._number, self._words = transport.number(way), transport.control.done[way]
        self._awaited = counts.receive
        self._looks = _LOOKS
        self._here = False
        self._inbox: list[Array] = []
        self._untold: list[int] | None = None
        self._mark: Mark | None = None

    @property
    def inbox(self) -> list[Array]:  # type: ignore[override]
        """Rows of this rank's part; also of a transfer that sends nothing, after an error."""
        return self._inbox or self._views(self._transport.rank, 0, sum(self._counts.receive.tolist()))

    def send(self, payloads: Sequence[Payload]) -> None:
        if payloads[0].on_host:
            self._store(payloads)
            # Made while the word is on its way.
            self._inbox = self.inbox
            return
        self._looks = 1  # there is more to do between two looks
        self._mark = self._write(payloads)
        if self._mark is None:
            self._tell()

    def _views(self, rank: int, start: int, rows: int) -> list[Array]:
        """Return rows from `start` on in the part of a rank, of each payload."""
        views, part = [], self._window.parts[rank]
        for first, width in self._parts:  # a comprehension would cost as much as an array
            views.append(np.ndarray((rows, width), _BYTE, part, first + start * width))
        return views

    def _store(self, payloads: Sequence[Payload]) -> None:
        """Store rows of the host, and say behind the last that all are stored."""
        send, _, start, _ = self._counts
        store, desk, left = self._transport.kernels.store, self._window.desk_address, len(payloads)
        for (rows, order), (first, _) in zip(payloads, self._parts):  # noqa: B905  asking costs a tenth of a transfer
            left -= 1
            number = 0 if left else self._number
            if not store(desk, rows, _AS_THEY_LIE if order is None else order, send, start, first, number):
                rule = "fit the rows and the memory of their ranks"
                raise CommError(complaint("MoELayer", "counts", rule, send.tolist()))

    def _write(self, payloads: Sequence[Payload]) -> Mark | None:
        """Store rows of a device; return what says when they are there, if they are not yet."""
        transport, last_mark = self._transport, None
        send, starts = self._counts.send.tolist(), self._counts.start.tolist()  # type: ignore[union-attr]
        to = [0, *itertools.accumulate(send)]
        for destination in transport.ring:
            first, rows, start = to[destination], send[destination], starts[destination]
            if not rows:
                continue
            views = None if destination == transport.rank else self._views(destination, start, rows)
            for part, payload in enumerate(payloads):
                if views is None:
                    payload.keep(first, first + rows, self.inbox[part], start)
                    continue
                # Copies of one device are done in their order: the last mark stands for all.
                mark = payload.write(first, first + rows, views[part])
                last_mark = last_mark if mark is None else mark
        return last_mark

    def _tell(self) -> None:
        """Say that all rows are stored."""
        self._window.sync()
        self._words[self._transport.rank].value = self._number
        self._window.sync()

    def started(self) -> bool:
        # Rows that are stored count for nothing until the word behind them is.
        return False

    def missing(self) -> list[int]:
        if self._mark is not None:
            self.unsettled()
        if not self._here:
            kernels, desk = self._transport.kernels, self._window.desk_address
            self._here = kernels.all_here(desk, self._awaited, self._number, self._looks)
        return [] if self._here else self._late(range(self._transport.size))

    def _late(self, ranks: Iterable[int]) -> list[int]:
        """Return which of some ranks have rows for this one and have not stored them."""
        self._window.sync()
        late = [rank for rank in ranks if self._awaited[rank] and self._words[rank].value < self._number]
        self._window.sync()
        return late

    def arrived(self) -> list[tuple[int, int]]:
        before = range(self._transport.size) if self._untold is None else self._untold
        self._untold = self._late(before)
        here = [rank for rank in before if rank not in self._untold and rank != self._transport.rank]
        first = rank_offsets(self._counts.receive).tolist()
        return [(first[rank], first[rank + 1]) for rank in here if self._awaited[rank]]

    def unsettled(self) -> list[int]:
        if self._mark is None:
            return []
        if not self._mark.done:
            return [self._transport.rank]
        self._mark = None
        self._tell()
        return []

    def cancel(self, ranks: Sequence[int]) -> None:
        self._awaited = self._awaited.copy()
        self._awaited[list(ranks)] = 0
