"""Any MPI: one message a pair of ranks and payload, cut where it exceeds what one message may carry.

Counts in MPI calls are rows of a contiguous type, never bytes: a message of 3 GB then has a small count, with any MPI.
"""

from __future__ import annotations

from collections import deque
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
DEVICE_MESSAGE_BYTES = 1 << 20
"""The same for rows of a device: one message travels while the next is copied from the device and the last to it."""
_TAGS = 16


class Message(NamedTuple):
    """Rows ``start:stop`` of payload `number`, to or from `rank`."""

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
    message_bytes : int
        Where to cut.
    allocate : callable, optional
        Returns memory of so many bytes: pinned memory, where rows of a device pass through it.
    """

    name = "host"
    capabilities = Capabilities()
    takes_marks = True

    def __init__(
        self, comm: Any, message_bytes: int = MESSAGE_BYTES, allocate: Callable[[int], Array] | None = None
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

    def messages(self, rank: int, number: int, start: int, stop: int, width: int) -> list[Message]:
        """Return the messages that carry rows ``start:stop`` of `width` bytes."""
        step = max(1, self.message_bytes // max(width, 1))
        cuts = range(start, stop, step) if width else range(0)
        return [Message(rank, number, first, min(first + step, stop)) for first in cuts]

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
        self._receives: list[tuple[Message, Any]] = []
        self._sends: list[tuple[Message, Any]] = []
        self._waiting: deque[tuple[Mark, Message, Array]] = deque()
        """Messages whose rows are not there yet, in the order in which they will be."""
        self._arrived: list[tuple[int, int]] = []
        self._held: Sequence[Payload] = ()
        with mpi_call("rows"), mpi_lock():
            for source in ring(transport.rank, transport.size)[1:]:
                for number, width in keyed:
                    start, stop = self._from[source], self._from[source + 1]
                    for message in transport.messages(source, number, start, stop, width):
                        request = transport.comm.Irecv(
                            self._buffer(message, self.inbox[number]), source, self._tag(number)
                        )
                        self._receives.append((message, request))

    def send(self, payloads: Sequence[Payload]) -> None:
        self._held = payloads
        try:
            for destination in ring(self._transport.rank, self._transport.size):
                for number, payload in enumerate(payloads):
                    self._send_to(destination, number, payload)
        except BaseException:
            self._waiting.clear()
            raise

    def _send_to(self, destination: int, number: int, payload: Payload) -> None:
        start, stop = self._to[destination], self._to[destination + 1]
        if start == stop:
            return
        if destination == self._transport.rank:
            payload.keep(start, stop, self.inbox[number], self._from[destination])
            return
        for message in self._transport.messages(destination, number, start, stop, self._widths[number]):
            rows, mark = payload.ready, None
            if rows is None:
                rows = self._staging[number]
                mark = payload.write(message.start, message.stop, rows[message.start : message.stop])
            if mark is None:
                self._post(message, rows)
            else:
                self._waiting.append((mark, message, rows))

    def _post(self, message: Message, rows: Array) -> None:
        with mpi_call("rows"), mpi_lock():
            buffer = self._buffer(message, rows)
            request = self._transport.comm.Isend(buffer, message.rank, self._tag(message.number))
        self._sends.append((message, request))

    def _tag(self, number: int) -> int:
        return _TAGS * (1 + self._way) + number

    def _buffer(self, message: Message, rows: Array) -> list[Any]:
        row_type = self._transport.row_type(self._widths[message.number])
        return [rows[message.start : message.stop], message.stop - message.start, row_type]

    def started(self) -> bool:
        return bool(self._sends)

    def missing(self) -> list[int]:
        self._post_waiting()
        self._receives, ended = _under_way(self._receives)
        self._arrived += [(message.start, message.stop) for message in ended if message.number == 0]
        return sorted({message.rank for message, _ in self._receives})

    def arrived(self) -> list[tuple[int, int]]:
        arrived, self._arrived = self._arrived, []
        return arrived

    def unsettled(self) -> list[int]:
        self._post_waiting()
        self._sends, _ = _under_way(self._sends)
        if not self._sends and not self._waiting:
            self._held = ()
        return sorted({message.rank for message, _ in self._sends} | {message.rank for _, message, _ in self._waiting})

    def _post_waiting(self) -> None:
        while self._waiting and self._waiting[0][0].done:
            _, message, rows = self._waiting.popleft()
            self._post(message, rows)

    def cancel(self, ranks: Sequence[int]) -> None:
        stopped = [request for message, request in self._receives if message.rank in ranks]
        self._receives = [entry for entry in self._receives if entry[0].rank not in ranks]
        with mpi_lock():
            for request in stopped:
                request.Cancel()
                request.Wait()


def _under_way(entries: list[tuple[Message, Any]]) -> tuple[list[tuple[Message, Any]], list[Message]]:
    """Return those of the messages, with their requests, that have not ended, and those that have."""
    if not entries:
        return entries, []
    requests = [request for _, request in entries]
    with mpi_call("rows"), mpi_lock():
        done = set(requests[0].Testsome(requests) or [])
    rest = [entry for number, entry in enumerate(entries) if number not in done]
    return rest, [message for number, (message, _) in enumerate(entries) if number in done]
