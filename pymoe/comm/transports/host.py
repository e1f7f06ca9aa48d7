"""Any MPI: one message a pair of ranks and payload, cut where it exceeds what one message may carry.

Counts in MPI calls are rows of a contiguous type, never bytes: a message of 3 GB then has a small count, with any MPI.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from pymoe.comm.mpi import load_mpi, mpi_call, mpi_lock
from pymoe.comm.plan import Counts
from pymoe.comm.transports.base import (
    Arena,
    Capabilities,
    FlatTransport,
    Payload,
    Transfer,
    Transport,
    rank_offsets,
    ring,
)
from pymoe.device.copies import Copies, Mark

Array = Any
MESSAGE_BYTES = 1 << 28
"""Most bytes of a message: some MPIs overflow internally above 2**31, and all pipeline a message of this size."""
DEVICE_MESSAGE_BYTES = 1 << 20, 1 << 22
"""Least and most for rows of a device: one message travels while the next is copied from the device, the last to it."""
_PIECES = 8
"""Messages for the rows of one rank, within the limits: more cost more calls, fewer overlap less."""
_TAGS = 16
_LOOKS = 8
"""How often MPI is asked before Python does anything else: some MPIs move bytes only while they are asked."""


class Message(NamedTuple):
    """Rows ``start:stop`` of payload `number`, from `rank` where `comes`, else to it."""

    comes: bool
    rank: int
    number: int
    start: int
    stop: int


class HostTransport(FlatTransport):
    """Rows in host memory over point-to-point messages.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
        For pymoe alone.
    message_bytes : (int, int)
        Least and most bytes of a message.
    allocate : callable, optional
        Returns memory of so many bytes: pinned memory, where rows of a device pass through it.
    """

    name = "host"
    capabilities = Capabilities()
    takes_marks = True

    def __init__(
        self,
        comm: Any,
        message_bytes: tuple[int, int] = (MESSAGE_BYTES, MESSAGE_BYTES),
        allocate: Callable[[int], Array] | None = None,
    ) -> None:
        self.comm = comm
        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        self.message_bytes = message_bytes
        self._arena = Arena() if allocate is None else Arena(allocate)
        self._types: dict[int, Any] = {}

    def open(self, way: int, counts: Counts, widths: Sequence[int]) -> Transfer:
        return HostTransfer(self, way, counts, widths)

    def for_device(self, copies: Copies) -> Transport:
        return HostTransport(self.comm, DEVICE_MESSAGE_BYTES, copies.pinned)

    def row_type(self, width: int) -> Any:
        """Return the MPI type of a row of `width` bytes."""
        if width not in self._types:
            self._types[width] = load_mpi().BYTE.Create_contiguous(width).Commit()
        return self._types[width]

    def rows(self, key: Any, n: int, width: int) -> Array:
        """Return (n, width) bytes of host memory that is used again."""
        return self._arena.rows(key, n, width)

    def messages(self, message: Message, width: int) -> list[Message]:
        """Return `message`, with rows of `width` bytes, cut into those that carry it."""
        start, stop = message.start, message.stop
        least, most = self.message_bytes
        nbytes = (stop - start) * width
        if nbytes <= least:
            return [message] if nbytes else []
        step = max(1, min(max(nbytes // _PIECES, least), most) // width)
        cuts = range(start, stop, step)
        return [message._replace(start=first, stop=min(first + step, stop)) for first in cuts]

    def close(self, call: str, seconds: float, broken: bool) -> None:
        types, self._types = self._types, {}
        self._arena = Arena()
        if not broken:
            for row_type in types.values():
                row_type.Free()


class HostTransfer(Transfer):
    """Messages of one direction."""

    def __init__(self, transport: HostTransport, way: int, counts: Counts, widths: Sequence[int]) -> None:
        self._transport, self._way, self._widths = transport, way, widths
        self._to, self._from = rank_offsets(counts.send).tolist(), rank_offsets(counts.receive).tolist()
        received, sent = self._from[-1], self._to[-1]
        # Memory first: after this nothing can fail for want of it, and every receive below is matched by a send.
        keyed = list(enumerate(widths))
        self.inbox = [transport.rows((way, "in", number), received, width) for number, width in keyed]
        self._staging = [transport.rows((way, "out", number), sent, width) for number, width in keyed]
        self._requests: list[Any] = []
        self._messages: list[Message] = []
        """Of each request."""
        self._waiting: deque[tuple[Mark, Message, Array]] = deque()
        """Messages whose rows are not there yet, in the order in which they will be."""
        self._arrived: list[tuple[int, int]] = []
        self._left: tuple[Counter[int], Counter[int]] = Counter(), Counter()
        """Messages that have not ended, by rank: to it, and from it."""
        self._started = False
        self._held: Sequence[Payload] = ()
        for source in ring(transport.rank, transport.size)[1:]:
            for number, width in keyed:
                whole = Message(True, source, number, self._from[source], self._from[source + 1])
                for message in transport.messages(whole, width):
                    self._post(message, self.inbox[number])

    def send(self, payloads: Sequence[Payload]) -> None:
        self._held = payloads
        try:
            for destination in ring(self._transport.rank, self._transport.size):
                for number, payload in enumerate(payloads):
                    self._send_to(destination, number, payload)
        except BaseException:
            for _, message, _ in self._waiting:
                self._forget(message)
            self._waiting.clear()
            raise

    def _send_to(self, destination: int, number: int, payload: Payload) -> None:
        start, stop = self._to[destination], self._to[destination + 1]
        if start == stop:
            return
        if destination == self._transport.rank:
            payload.keep(start, stop, self.inbox[number], self._from[destination])
            return
        whole = Message(False, destination, number, start, stop)
        for message in self._transport.messages(whole, self._widths[number]):
            rows, mark = payload.ready, None
            if rows is None:
                rows = self._staging[number]
                mark = payload.write(message.start, message.stop, rows[message.start : message.stop])
            if mark is None:
                self._post(message, rows)
            else:
                self._left[False][destination] += 1
                self._waiting.append((mark, message, rows))

    def _post(self, message: Message, rows: Array) -> None:
        transport = self._transport
        row_type = transport.row_type(self._widths[message.number])
        buffer = [rows[message.start : message.stop], message.stop - message.start, row_type]
        tag = _TAGS * (1 + self._way) + message.number
        with mpi_call("rows"), mpi_lock():
            call = transport.comm.Irecv if message.comes else transport.comm.Isend
            self._requests.append(call(buffer, message.rank, tag))
        self._messages.append(message)
        self._left[message.comes][message.rank] += 1
        self._started |= not message.comes

    def _forget(self, message: Message) -> None:
        left = self._left[message.comes]
        left[message.rank] -= 1
        if not left[message.rank]:
            del left[message.rank]

    def started(self) -> bool:
        return self._started

    def missing(self) -> list[int]:
        self._progress()
        return sorted(self._left[True])

    def arrived(self) -> list[tuple[int, int]]:
        arrived, self._arrived = self._arrived, []
        return arrived

    def unsettled(self) -> list[int]:
        self._progress()
        if not self._left[False]:
            self._held = ()
        return sorted(self._left[False])

    def _progress(self) -> None:
        """Send what is ready, and let MPI move bytes."""
        while self._waiting and self._waiting[0][0].done:
            _, message, rows = self._waiting.popleft()
            self._post(message, rows)
            self._forget(message)  # as one that waits
        done: Sequence[int] = ()
        with mpi_call("rows"), mpi_lock():
            for _ in range(_LOOKS if self._requests else 0):
                done = self._requests[0].Testsome(self._requests) or ()
                if done:
                    break
        if done:
            ended = [self._messages[number] for number in sorted(done)]
            self._arrived += [(m.start, m.stop) for m in ended if m.comes and m.number == 0]
            self._end(set(done))

    def _end(self, numbers: set[int]) -> None:
        """Forget the requests with these numbers."""
        for number in numbers:
            self._forget(self._messages[number])
        rest = [number for number in range(len(self._requests)) if number not in numbers]
        self._requests = [self._requests[number] for number in rest]
        self._messages = [self._messages[number] for number in rest]

    def cancel(self, ranks: Sequence[int]) -> None:
        stopped = [n for n, message in enumerate(self._messages) if message.comes and message.rank in ranks]
        with mpi_lock():
            for number in stopped:
                self._requests[number].Cancel()
                self._requests[number].Wait()
        self._end(set(stopped))
