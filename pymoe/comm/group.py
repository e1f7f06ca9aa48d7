"""The ranks of one communicator: agreement before and after rows travel, deadlines, one error for all.

Layers on one communicator share its group, and with it one duplicate of the communicator and one set of buffers.  As
with every collective of MPI, all ranks must make their calls on one communicator in the same order.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from pymoe import environment
from pymoe.comm import header as words_of
from pymoe.comm.control import Control
from pymoe.comm.header import Code, Header, Kind
from pymoe.comm.mpi import TransportError
from pymoe.comm.plan import Counts, rank_offsets
from pymoe.comm.transports.base import DISPATCH, FlatTransport, Payload, Transfer, Transport
from pymoe.comm.transports.staging import StagedTransport
from pymoe.comm.waiting import MOVING_S, Wait
from pymoe.device.arrays import is_cuda
from pymoe.device.copies import Copies
from pymoe.errors import CommError, complaint

Array = Any
_NOTICE_S = 2.0
"""How long a rank that misses several others waits for one of them to say whom it is waiting for itself."""
_LOOKS = 8
"""Looks for rows between two for headers, which cost more and seldom say anything."""
_LOST = 2
_SENT = {"nothing": 0, "all": 1, "some": _LOST}
"""What a rank with an error says of its rows: none are under way, all are, or nobody can tell which."""
_groups: weakref.WeakSet[Group] = weakref.WeakSet()


class Group:
    """Everything that the layers on one communicator share.

    Parameters
    ----------
    control : Control
    host : FlatTransport
        Always there, for what travels once.
    transport : Transport
        For the rows of calls.
    refused : sequence of (name, reason)
        Transports that are not used, and why.
    """

    def __init__(
        self, control: Control, host: FlatTransport, transport: Transport, refused: Sequence[tuple[str, str]] = ()
    ) -> None:
        self.control, self.host, self.transport = control, host, transport
        self.refused = tuple(refused)
        self.rank, self.size = control.rank, control.size
        self.layers = 0
        self.users = 0
        self.nodes: Any = None
        self.broken: CommError | None = None
        self.on_close: list[Callable[[bool], None]] = []
        self._staged: dict[int, StagedTransport] = {}
        self._lock = threading.RLock()
        self._call = ""
        self._remaining = 0
        self._own: Header | None = None
        self._agreed: BaseException | None = None
        self._transfers: list[Transfer] = []
        self._sending = "nothing"
        self._seconds = environment.timeout_s()
        _groups.add(self)

    @contextlib.contextmanager
    def guard(self, call: str, exchanges: int = 2) -> Iterator[None]:
        """Surround an operation of `exchanges` exchanges: an error inside is raised by every rank.

        Guards nest: the outermost counts.  On this rank the error that the others see is raised from the one that
        happened.
        """
        with self._lock:
            if self._call:
                yield
                return
            self._begin(call, exchanges)
            try:
                yield
            except BaseException as error:
                self._fail(error)
                raise
            finally:
                self._call = ""
                self._transfers = []

    def _begin(self, call: str, exchanges: int) -> None:
        if self.broken is not None:
            rule = "have ranks that answer"
            remedy = "Close it on every rank and build a new one"
            raise CommError(complaint(call, "the layer", rule, f"one that failed before ({self.broken})", remedy))
        self._seconds = environment.timeout_s()
        self._call, self._remaining = call, exchanges
        self._own = self._agreed = None
        self._sending = "nothing"

    def transport_for(self, rows: Array) -> Transport:
        """Return the transport for `rows`: those of a device go by way of the host."""
        if not is_cuda(rows):
            return self.transport
        device = int(rows.device.id)
        if device not in self._staged:
            copies = Copies()
            inner = self.transport.for_device(copies)
            self._staged[device] = StagedTransport(inner, copies, owned=inner is not self.transport)
        return self._staged[device]

    def ready(self) -> None:
        """Wait, before a call begins, for what copies of an earlier one still do with shared memory."""
        for staged in self._staged.values():
            staged.ready()

    def post(self, header: Header, counts: Array | None = None) -> None:
        """Send the header of the next exchange, with (R, 2) rows to and back from each rank."""
        self._own = header
        self.control.post(header.encode(), counts)

    def collect(self, stage: str) -> tuple[Array, Counts, Counts]:
        """Wait for everybody's header; return the table and the counts there and back, or raise what all raise."""
        header = self._own
        assert header is not None
        wait = Wait(self._seconds)
        while True:
            self._poll(stage)
            missing = self.control.missing()
            if not missing:
                break
            self._check_deadline(wait, missing, stage)
            wait.pause()
        table, there, back = self.control.take()
        self._own = None
        self._remaining -= 1
        error = words_of.verdict(self._call, table, header)
        if error is not None:
            self._agreed = error
            if (table[:, 3] == Code.LEFT).any():
                self.broken = error
            elif header.kind is Kind.COMBINE and self._transfers:
                if self.transport.recoverable and not (table[:, words_of.TOKENS] == _LOST).any():
                    self._drain(table)
                else:
                    self.broken = error
            raise error
        return table, there, back

    def track(self, transfer: Transfer) -> Transfer:
        """Note a transfer of this call, so that an error leaves none of its messages behind."""
        self._transfers.append(transfer)
        return transfer

    def send(self, transfer: Transfer, payloads: Sequence[Payload]) -> None:
        """Send all rows of a transfer; after an error before the first message the others can do without them."""
        before, self._sending = self._sending, "some"
        try:
            transfer.send(payloads)
        except BaseException:
            if not transfer.started():
                self._sending = before
            raise
        self._sending = "all"

    def arrive(self, transfer: Transfer, stage: str) -> None:
        """Wait until all rows of a transfer are here; stop early where a rank tells of an error."""
        wait = None
        for look in itertools.count(1):
            missing = transfer.missing()
            if not missing:
                return
            wait = wait or Wait(self._seconds, MOVING_S)
            if look % _LOOKS == 0:
                self._poll(stage)
                if self._remaining and any(words_of.code_of(words) is not Code.FINE for words in self.control.seen()):
                    raise _SawAnError(f"{self._call}: another rank tells of an error {stage}")
            self._check_deadline(wait, missing, stage)
            wait.pause()

    def settle(self, transfer: Transfer, stage: str) -> None:
        """Wait until nothing that was sent needs this rank any more."""
        wait = None
        while missing := transfer.unsettled():
            wait = wait or Wait(self._seconds, MOVING_S)
            self._poll(stage)
            self._check_deadline(wait, missing, stage)
            wait.pause()

    def gather(self, rows: Array, there: Counts) -> list[Array]:
        """Return the rows (n, b) uint8 that each rank sends to all, after an exchange of their counts."""
        index = np.tile(np.arange(len(rows)), self.size)
        transfer = self.track(self.host.open(DISPATCH, there, [rows.shape[1]]))
        transfer.send([Payload(np.ascontiguousarray(rows), index)])
        self.arrive(transfer, "while ranks tell their experts")
        self.settle(transfer, "while ranks tell their experts")
        offsets = rank_offsets(there.receive)
        return [transfer.inbox[0][offsets[r] : offsets[r + 1]].copy() for r in range(self.size)]

    def close(self, call: str) -> None:
        """Let go of everything; all ranks come here together, unless the group is broken and left as it is."""
        with self._lock:
            broken = self.broken is not None
            self.broken = self.broken or CommError(complaint(call, "the group", "be open", "a closed one"))
            self.control.close(broken)
            staged, self._staged = self._staged, {}
            for each in staged.values():
                each.close(call, self._seconds, broken)
            for transport in {id(t): t for t in (self.transport, self.host)}.values():
                transport.close(call, self._seconds, broken)
            for action in self.on_close:
                action(broken)
            _groups.discard(self)

    def leave(self) -> None:
        """Tell the others that this process ends while the group is open; they need not wait for the deadline."""
        if self.broken is None:
            self.broken = CommError(complaint("pymoe", "the process", "go on", "its end"))
            with contextlib.suppress(Exception):
                self.control.post(Header(Kind.CLOSE, Code.LEFT).encode())
                self.control.close(True)

    def _poll(self, stage: str) -> None:
        """Make progress; raise where some rank gave up or left."""
        self.control.poll()
        for words in self.control.seen():
            code = words_of.code_of(words)
            if code is Code.SILENT:
                self._give_up(words_of.blamed_of(words), stage)

    def _check_deadline(self, wait: Wait, missing: list[int], stage: str) -> None:
        """Give up on the first missing rank once the deadline is over."""
        if not wait.over:
            return
        if len(missing) > 1 and wait.seconds == self._seconds:
            # Perhaps one of them only waits for the other: it will say so at its own deadline.
            wait.seconds += min(_NOTICE_S, self._seconds)
            return
        self._give_up(missing[0], stage)

    def _give_up(self, rank: int, stage: str) -> None:
        error = words_of.silence(self._call, rank, self._seconds, stage)
        self._break(error, rank)
        raise error

    def _break(self, error: CommError, blamed: int) -> None:
        """Mark the group unusable and tell the others, who may be waiting for this rank."""
        self.broken = self._agreed = error
        with contextlib.suppress(Exception):
            self.control.post(Header(Kind.COMBINE, Code.SILENT, blamed).encode())

    def _fail(self, error: BaseException) -> None:
        """Tell the other ranks of an error in this one; raise what all raise, or return to let `error` go on."""
        if self.broken is not None or error is self._agreed:
            return
        if isinstance(error, TransportError):
            self.broken = words_of.end_of(self._call, self.control.dead(), error)
            raise self.broken from error
        if not self._remaining:
            return
        if self._own is not None:
            # Interrupted between two steps that belong together: nobody can tell what is under way.
            text = complaint(self._call, f"rank {self.rank}", "complete the call", type(error).__name__)
            self._break(CommError(text), self.rank)
            return
        kind = Kind.COMBINE if self._transfers or self._remaining < 2 else Kind.CALL
        code = Code.SAW_AN_ERROR if isinstance(error, _SawAnError) else Code.RAISED
        text = f"{type(error).__name__}: {error}"
        self.post(Header(kind, code, tokens=_SENT[self._sending], text=text))
        try:
            self.collect("after an error here")
        except CommError as agreed:
            if code is Code.SAW_AN_ERROR:
                raise agreed from None
            if isinstance(error, Exception):
                raise agreed from error

    def _drain(self, table: Array) -> None:
        """Receive what ranks without an error have sent, and expect nothing from the others."""
        fine = table[:, 3] == Code.FINE
        sent = fine | (table[:, words_of.TOKENS] != 0)
        for way, transfer in enumerate(self._transfers):
            transfer.cancel(np.flatnonzero(~(sent if way == DISPATCH else fine)).tolist())
            wait = Wait(self._seconds)
            while missing := (transfer.missing() or transfer.unsettled()):
                self._poll("after an error")
                self._check_deadline(wait, missing, "after an error")
                wait.pause()


class _SawAnError(CommError):
    """Another rank told of an error before its time; it says more in the exchange that follows."""


@atexit.register
def _leave_all() -> None:
    for group in list(_groups):
        group.leave()
