"""Any MPI: one message a pair of ranks and payload, cut where it exceeds what one message may carry.

Counts in MPI calls are rows of a contiguous type, never bytes: a message of 3 GB then has a small count, with any MPI.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pymoe.comm.mpi import load_mpi, mpi_call, mpi_lock
from pymoe.comm.plan import Counts
from pymoe.comm.transports.base import (
    Arena,
    Capabilities,
    FlatTransport,
    Payload,
    Transfer,
    gather,
    rank_offsets,
    ring,
)

Array = Any
MESSAGE_BYTES = 1 << 28
"""Most bytes of a message: some MPIs overflow internally above 2**31, and all pipeline a message of this size."""
_TAGS = 16


class HostTransport(FlatTransport):
    """Rows in host memory over point-to-point messages.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
        For pymoe alone.
    message_bytes : int
        Where to cut.
    """

    name = "host"
    capabilities = Capabilities()

    def __init__(self, comm: Any, message_bytes: int = MESSAGE_BYTES) -> None:
        self.comm = comm
        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        self.message_bytes = message_bytes
        self._arena = Arena()
        self._types: dict[int, Any] = {}

    def open(self, way: int, counts: Counts, widths: Sequence[int]) -> Transfer:
        return HostTransfer(self, way, counts, widths)

    def row_type(self, width: int) -> Any:
        """Return the MPI type of a row of `width` bytes."""
        if width not in self._types:
            self._types[width] = load_mpi().BYTE.Create_contiguous(width).Commit()
        return self._types[width]

    def rows(self, key: Any, n: int, width: int) -> Array:
        """Return (n, width) bytes of host memory that is used again; where device arrays come in, it is pinned."""
        return self._arena.rows(key, n, width)

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
        self._to, self._from = rank_offsets(counts.send), rank_offsets(counts.receive)
        received, sent = int(self._from[-1]), int(self._to[-1])
        # Memory first: after this nothing can fail for want of it, and every receive below is matched by a send.
        keyed = list(enumerate(widths))
        self.inbox = [transport.rows((way, "in", number), received, width) for number, width in keyed]
        self._staging = [transport.rows((way, "out", number), sent, width) for number, width in keyed]
        self._receives: list[tuple[int, Any]] = []
        self._sends: list[tuple[int, Any]] = []
        self._held: Sequence[Payload] = ()
        rank = transport.rank
        with mpi_call("rows"), mpi_lock():
            for source in ring(rank, transport.size)[1:]:
                for number, inbox in enumerate(self.inbox):
                    for message in self._messages(inbox, self._from[source], self._from[source + 1]):
                        request = transport.comm.Irecv(message, source, self._tag(number))
                        self._receives.append((source, request))

    def send(self, payloads: Sequence[Payload]) -> None:
        transport = self._transport
        self._held = payloads
        for destination in ring(transport.rank, transport.size):
            start, stop = int(self._to[destination]), int(self._to[destination + 1])
            if start == stop:
                continue
            for number, (rows, index) in enumerate(payloads):
                if destination == transport.rank:
                    first = int(self._from[destination])
                    gather(rows, index, start, stop, self.inbox[number][first : first + stop - start])
                    continue
                ready = rows
                if index is not None or not rows.flags.c_contiguous:
                    ready = self._staging[number]
                    gather(rows, index, start, stop, ready[start:stop])
                with mpi_call("rows"), mpi_lock():
                    for message in self._messages(ready, start, stop):
                        request = transport.comm.Isend(message, destination, self._tag(number))
                        self._sends.append((destination, request))

    def _tag(self, number: int) -> int:
        return _TAGS * (1 + self._way) + number

    def _messages(self, rows: Array, start: int, stop: int) -> list[Any]:
        """Return the messages that carry ``rows[start:stop]``."""
        width = rows.shape[1]
        step = max(1, self._transport.message_bytes // max(width, 1))
        if width == 0:
            return []
        row_type = self._transport.row_type(width)
        return [
            [rows[first : min(first + step, stop)], min(step, stop - first), row_type]
            for first in range(int(start), int(stop), step)
        ]

    def started(self) -> bool:
        return bool(self._sends)

    def missing(self) -> list[int]:
        self._receives = _under_way(self._receives)
        return sorted({source for source, _ in self._receives})

    def unsettled(self) -> list[int]:
        self._sends = _under_way(self._sends)
        if not self._sends:
            self._held = ()
        return sorted({destination for destination, _ in self._sends})

    def cancel(self, ranks: Sequence[int]) -> None:
        stopped = [request for source, request in self._receives if source in ranks]
        self._receives = [entry for entry in self._receives if entry[0] not in ranks]
        with mpi_lock():
            for request in stopped:
                request.Cancel()
                request.Wait()


def _under_way(entries: list[tuple[int, Any]]) -> list[tuple[int, Any]]:
    """Return those of the requests (by rank) that have not ended."""
    if not entries:
        return entries
    requests = [request for _, request in entries]
    with mpi_call("rows"), mpi_lock():
        done = set(requests[0].Testsome(requests) or [])
    return [entry for number, entry in enumerate(entries) if number not in done]
