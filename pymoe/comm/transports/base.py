"""The one interface of all transports: rows of opaque bytes go out by a plan and come back to where they came from."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from pymoe.comm.plan import Counts, DispatchPlan, rank_offsets
from pymoe.device.copies import Copies, Mark

Array = Any
DISPATCH, COMBINE = 0, 1
"""The two ways; each has its own memory, since rows of a dispatch are still read while those of a combine arrive."""


@dataclass(frozen=True)
class Capabilities:
    """What a transport can do.

    Attributes
    ----------
    device_buffers : bool
        Takes device memory as it is; otherwise device arrays are staged through the host.
    stream_ordered : bool
        Its work takes its place on a stream.
    graph_safe : bool
        Can be captured in a CUDA graph.
    one_sided : bool
        Rows are stored by the sender alone; nobody needs to make progress for them to arrive.
    needs_host_counts : bool
        Counts must be known on the host before rows travel.
    zero_copy_receive : bool
        Received rows are read where they arrived.
    """

    device_buffers: bool = False
    stream_ordered: bool = False
    graph_safe: bool = False
    one_sided: bool = False
    needs_host_counts: bool = True
    zero_copy_receive: bool = True


class Payload(NamedTuple):
    """Rows to send: row i of the plan is ``rows[order[i]]``, or ``rows[i]`` where order is None.

    Rows are (n, b) uint8, order is int64; both C-contiguous.
    """

    rows: Array
    order: Array | None = None

    @property
    def on_host(self) -> bool:
        """Whether the rows are in this process's memory."""
        return True

    @property
    def ready(self) -> Array | None:
        """Rows in the order of the plan that can be sent from where they are, or None."""
        return self.rows if self.order is None and self.rows.flags.c_contiguous else None

    def write(self, start: int, stop: int, out: Array) -> Mark | None:
        """Write rows ``start:stop`` of the plan to `out`; return what says when they are there, None if they are."""
        if self.order is None:
            out[...] = self.rows[start:stop]
        else:
            # Without "clip" NumPy goes through a buffer of its own; plans hold legal indices only.  As a function of
            # NumPy's, not a method, this takes a microsecond more: as much as the copy of 16 KiB.
            self.rows.take(self.order[start:stop], 0, out, "clip")
        return None

    def keep(self, start: int, stop: int, inbox: Array, place: int) -> None:
        """Write rows ``start:stop``, which stay on this rank, to the `inbox` from row `place` on."""
        self.write(start, stop, inbox[place : place + stop - start])


class Transfer(abc.ABC):
    """Rows under way between all ranks in one direction.

    Attributes
    ----------
    inbox : list of ndarray, (rows received, b) uint8
        One a payload, rows in the order of their ranks; complete when `missing` is empty.
    """

    inbox: list[Array]
    row_of_token: Array | None = None
    """Where a combine put the rows of each token, (M, w); None: where the plan says."""
    _told = False

    @abc.abstractmethod
    def send(self, payloads: Sequence[Payload]) -> None:
        """Send all rows; what a payload holds may change once `unsettled` is empty."""

    def started(self) -> bool:
        """Return whether another rank may have got something of an unfinished `send`."""
        return True

    @abc.abstractmethod
    def missing(self) -> list[int]:
        """Make progress; return the ranks whose rows have not all arrived."""

    def arrived(self) -> list[tuple[int, int]]:
        """Return the rows (start, stop) of the first inbox that have come from elsewhere since the last question."""
        if self._told or self.missing():
            return []
        self._told = True
        return [(0, len(self.inbox[0]))]

    @abc.abstractmethod
    def unsettled(self) -> list[int]:
        """Make progress; return the ranks for which something that was sent is still in this rank's memory."""

    @abc.abstractmethod
    def cancel(self, ranks: Sequence[int]) -> None:
        """Stop waiting for rows of `ranks`, which will not send them."""


class Transport(abc.ABC):
    """Moves rows between the ranks of one communicator; never sees a dtype."""

    name: str
    capabilities: Capabilities
    recoverable: bool = True
    """Whether calls can go on after an error in the middle of one."""
    takes_marks: bool = False
    """Whether it sends what `Payload.write` has not finished yet, once that is done; else rows must be there."""

    def for_device(self, copies: Copies) -> Transport:
        """Return the transport for rows that come from a device's memory and go there, by `copies`."""
        return self

    @abc.abstractmethod
    def open_dispatch(self, plan: DispatchPlan, counts: Counts, widths: Sequence[int]) -> Transfer:
        """Get ready to receive payloads with rows of `widths` bytes; those to send are the rows of `plan`."""

    @abc.abstractmethod
    def open_combine(self, plan: DispatchPlan, counts: Counts, width: int, reducible: bool) -> Transfer:
        """Get ready to receive what comes back, rows of `width` bytes; the one payload to send is in rank order.

        `reducible` rows are float32, one for each row of the plan: a transport may sum those of a token on the way.
        """

    @abc.abstractmethod
    def close(self, call: str, seconds: float, broken: bool) -> None:
        """Let go of memory; collective unless broken."""


class FlatTransport(Transport):
    """A transport in which each rank sends to each other directly."""

    @abc.abstractmethod
    def open(self, way: int, counts: Counts, widths: Sequence[int]) -> Transfer:
        """Return a transfer of payloads with rows of `widths` bytes, ready to receive."""

    def open_dispatch(self, plan: DispatchPlan, counts: Counts, widths: Sequence[int]) -> Transfer:
        return self.open(DISPATCH, counts, widths)

    def open_combine(self, plan: DispatchPlan, counts: Counts, width: int, reducible: bool) -> Transfer:
        return self.open(COMBINE, counts, [width])


def ring(rank: int, size: int) -> list[int]:
    """Return all ranks, this one first, then the next ones: so that not everybody starts with rank 0."""
    return [(rank + step) % size for step in range(size)]


class Arena:
    """Memory that grows by doubling and is used again: fresh pages cost more than the copy into them."""

    def __init__(self, allocate: Callable[[int], Array] = lambda size: np.empty(size, np.uint8)) -> None:
        self._allocate = allocate
        self._memory: dict[Any, Array] = {}

    def rows(self, key: Any, n: int, width: int) -> Array:
        """Return (n, width) uint8 of the memory `key`, with whatever it held."""
        size = n * width
        memory = self._memory.get(key)
        if memory is None or len(memory) < size:
            self._memory.pop(key, None)
            self._memory[key] = memory = self._allocate(1 << max(size - 1, 4095).bit_length())
        return memory[:size].reshape(n, width)


__all__ = [
    "COMBINE",
    "DISPATCH",
    "Arena",
    "Capabilities",
    "FlatTransport",
    "Payload",
    "Transfer",
    "Transport",
    "rank_offsets",
    "ring",
]
