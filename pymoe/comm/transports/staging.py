"""Rows of a device by way of the host: any transport of host memory, with copies at both ends.

    device rows ── gather, copy ──► pinned rows ── transport ──► pinned rows ── copy ──► device rows
                                    (a message, or the receiver's window, as soon as its rows are there)

The first payload of a transfer is in the device's memory, the others, which are small, stay on the host.  Rows for this
rank itself never leave the device.  The transport below says which rows have come, and each piece is copied on at once,
so that copies from the device, messages and copies to the device overlap.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pymoe.comm.plan import Counts, DispatchPlan
from pymoe.comm.transports.base import Arena, Capabilities, Payload, Transfer, Transport
from pymoe.device.copies import Copies, Mark

Array = Any


class DevicePayload(Payload):
    """Rows on a device, in the order of the plan; `landing` is where rows for this rank itself go."""

    def __new__(cls, rows: Array, copies: Copies, landing: Array) -> DevicePayload:
        return super().__new__(cls, rows)

    def __init__(self, rows: Array, copies: Copies, landing: Array) -> None:
        self._copies, self._landing = copies, landing

    @property
    def on_host(self) -> bool:
        return False

    @property
    def ready(self) -> Array | None:
        return None

    def write(self, start: int, stop: int, out: Array) -> Mark | None:
        self._copies.to_host(self.rows[start:stop], out)
        return self._copies.left()

    def keep(self, start: int, stop: int, inbox: Array, place: int) -> None:
        self._copies.within(self.rows[start:stop], self._landing[place : place + stop - start])


class StagedTransport(Transport):
    """A transport of host memory with a device at both ends.

    Parameters
    ----------
    inner : Transport
        What `Transport.for_device` returned for `copies`.
    copies : Copies
        Of the device.
    owned : bool
        Whether `close` closes the inner transport.
    """

    capabilities = Capabilities(zero_copy_receive=False)

    def __init__(self, inner: Transport, copies: Copies, owned: bool) -> None:
        self.name, self.recoverable = inner.name, inner.recoverable
        self.inner, self.copies = inner, copies
        self.arena = Arena(copies.pinned)
        self._owned = owned
        self._came: Mark | None = None
        self.unfinished: set[StagedTransfer] = set()
        """Transfers whose device memory copies may still write: it must not be given back before."""

    def open_dispatch(self, plan: DispatchPlan, counts: Counts, widths: Sequence[int]) -> Transfer:
        inner = self.inner.open_dispatch(plan, counts, widths)
        return StagedTransfer(self, inner, counts, widths[0])

    def open_combine(self, plan: DispatchPlan, counts: Counts, width: int, reducible: bool) -> Transfer:
        inner = self.inner.open_combine(plan, counts, width, reducible)
        return StagedTransfer(self, inner, counts, width)

    def ready(self) -> None:
        """Wait, before a call begins, for copies of an earlier one from memory that others may now write."""
        if self._came is not None:
            self._came.synchronize()
        self._came = None
        self.unfinished.clear()

    def finished(self, transfer: StagedTransfer) -> None:
        """Put what a transfer has copied before all that the current stream does from now on."""
        self.copies.lead()
        self._came = self.copies.came()
        self.unfinished.discard(transfer)

    def close(self, call: str, seconds: float, broken: bool) -> None:
        self.copies.left().synchronize()
        self.copies.came().synchronize()
        self.unfinished.clear()
        self.arena = Arena()
        if self._owned:
            self.inner.close(call, seconds, broken)


class StagedTransfer(Transfer):
    """A transfer of host memory, and copies of its first payload."""

    def __init__(self, transport: StagedTransport, inner: Transfer, counts: Counts, width: int) -> None:
        self._transport, self._inner, self._width = transport, inner, width
        self._followed = self._copied = False
        transport.unfinished.add(self)
        self._landing = None
        if transport.inner.takes_marks:
            self._landing = transport.copies.empty(int(counts.receive.sum()), width)

    def _follow(self) -> None:
        """Let copies wait for what the user's stream did with the rows, and with the memory that others land in."""
        if not self._followed:
            self._transport.copies.follow()
        self._followed = True

    @property
    def inbox(self) -> list[Array]:  # type: ignore[override]
        """The rows of the first payload on the device, the others' on the host."""
        return [self._landing, *self._inner.inbox[1:]]

    @property
    def row_of_token(self) -> Array | None:  # type: ignore[override]
        """As the inner transfer has it, on the host."""
        return self._inner.row_of_token

    def send(self, payloads: Sequence[Payload]) -> None:
        (rows, order), *others = payloads
        copies = self._transport.copies
        self._follow()
        if self._transport.inner.takes_marks:
            in_order = rows if order is None else copies.gather(rows, order)
            first: Payload = DevicePayload(in_order, copies, self._landing)
        else:
            whole = self._transport.arena.rows("whole", *rows.shape)
            copies.to_host(rows, whole)
            copies.left().synchronize()
            first = Payload(whole, order)
        self._inner.send([first, *others])

    def started(self) -> bool:
        return self._inner.started()

    def missing(self) -> list[int]:
        late = self._inner.missing()
        self._copy_arrived()
        if not late and not self._copied:
            self._copied = True
            self._transport.finished(self)
        return late

    def _copy_arrived(self) -> None:
        for start, stop in self._inner.arrived():
            if self._landing is None:
                self._landing = self._transport.copies.empty(len(self._inner.inbox[0]), self._width)
                self._followed = False
            self._follow()
            self._transport.copies.to_device(self._inner.inbox[0][start:stop], self._landing[start:stop])

    def unsettled(self) -> list[int]:
        return self._inner.unsettled()

    def cancel(self, ranks: Sequence[int]) -> None:
        self._inner.cancel(ranks)
