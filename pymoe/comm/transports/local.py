"""One rank: rows stay where they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pymoe.comm.plan import Counts
from pymoe.comm.transports.base import Arena, Capabilities, FlatTransport, Payload, Transfer

Array = Any


class LocalTransport(FlatTransport):
    """The transport of a communicator of one rank."""

    name = "local"
    capabilities = Capabilities(stream_ordered=True, one_sided=True)
    takes_marks = True

    def __init__(self) -> None:
        self._arena = Arena()

    def open(self, way: int, counts: Counts, widths: Sequence[int]) -> Transfer:
        n = int(counts.receive.sum())
        return LocalTransfer([self._arena.rows((way, number), n, width) for number, width in enumerate(widths)])

    def close(self, call: str, seconds: float, broken: bool) -> None:
        self._arena = Arena()


class LocalTransfer(Transfer):
    """A copy."""

    def __init__(self, inbox: list[Array]) -> None:
        self.inbox = inbox

    def send(self, payloads: Sequence[Payload]) -> None:
        for payload, inbox in zip(payloads, self.inbox, strict=True):
            payload.keep(0, len(inbox), inbox, 0)

    def started(self) -> bool:
        return False

    def missing(self) -> list[int]:
        return []

    def arrived(self) -> list[tuple[int, int]]:
        return []

    def unsettled(self) -> list[int]:
        return []

    def cancel(self, ranks: Sequence[int]) -> None:
        pass
