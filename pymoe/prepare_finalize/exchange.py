"""One call's way over the ranks and back, in steps that a synchronous and an asynchronous pair take alike.

announce   headers and counts leave            (nobody has waited yet)
send       counts are here; rows leave
receive    rows are here                       -> the experts' input
give_back  the experts' rows leave             (nobody has waited yet)
collect    everybody's rows are here           -> rows to sum, and which are whose
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pymoe.comm import Ranks
from pymoe.comm.header import TOKENS, Header, Kind
from pymoe.comm.plan import Counts, DispatchPlan, as_bytes, check_counts
from pymoe.comm.transports.base import Payload, Transfer
from pymoe.device.arrays import is_cuda

Array = Any


class Exchange:
    """Rows of one call.

    Parameters
    ----------
    ranks : Ranks
    plan : DispatchPlan
    back : ndarray, (R,)
        Rows that each rank returns to this one.
    payloads : sequence of Payload
        What travels for each row of the plan.  Rows of a device come first, and alone; what comes back is there too.
    width : int
        Bytes of a row that comes back.
    reducible : bool
        Whether what comes back is one float32 row for each row sent, to be summed by token.
    """

    def __init__(
        self,
        ranks: Ranks,
        plan: DispatchPlan,
        back: Array,
        payloads: Sequence[Payload],
        width: int,
        reducible: bool = True,
    ) -> None:
        self.ranks, self.plan, self.payloads, self.width = ranks, plan, payloads, width
        self._reducible = reducible
        self.back = back
        self._on_device = is_cuda(payloads[0].rows)
        self._transport = ranks.group.transport_for(payloads[0].rows)
        self._dispatch: Transfer | None = None
        self._combine: Transfer | None = None

    def announce(self, call: str, tokens: int, values: dict[str, int], names: dict[str, str]) -> None:
        """Send headers: what all ranks must agree on, and how many rows go where."""
        self._call = call
        self.ranks.group.ready()
        # What follows from the others comes last, so that the cause is named.
        row_bytes = str(sum(payload.rows.shape[1] for payload in self.payloads))
        names = names | {"device": "CUDA" if self._on_device else "the host", "row bytes": row_bytes}
        header = Header(Kind.CALL, tokens=tokens, values={"layer": self.ranks.number} | values, names=names)
        self.ranks.group.post(header, np.stack([self.plan.counts, self.back], axis=1))

    def send(self) -> None:
        """Wait for everybody's header, then send the rows."""
        group = self.ranks.group
        table, there, back = group.collect("in the count exchange")
        check_counts(self._call, there.receive, table[:, TOKENS])
        self.counts: Counts = there
        self._combine_counts = back
        # Both ways are opened before anything is sent: opening may be collective, and sending may fail.
        widths = [payload.rows.shape[1] for payload in self.payloads]
        self._dispatch = group.track(self._transport.open_dispatch(self.plan, there, widths))
        self._combine = group.track(self._transport.open_combine(self.plan, back, self.width, self._reducible))
        group.send(self._dispatch, self.payloads)

    def receive(self) -> list[Array]:
        """Wait for the rows; return one (rows, b) uint8 array a payload, in the order of their ranks."""
        assert self._dispatch is not None
        group = self.ranks.group
        group.arrive(self._dispatch, "while rows are dispatched")
        group.settle(self._dispatch, "while rows are dispatched")
        self.payloads = ()
        return self._dispatch.inbox

    def give_back(self, rows: Array) -> None:
        """Send the experts' rows, in the order of the ranks that they are for, and say that all went well here."""
        assert self._combine is not None
        self.ranks.group.send(self._combine, [Payload(as_bytes(rows))])
        self.ranks.group.post(Header(Kind.COMBINE, tokens=1))

    def collect(self) -> Array:
        """Wait for everybody's word and rows; return the rows that came back, (rows, width) uint8."""
        assert self._combine is not None
        group = self.ranks.group
        group.collect("after the experts")
        group.arrive(self._combine, "while rows are combined")
        group.settle(self._combine, "while rows are combined")
        return self._combine.inbox[0]

    @property
    def row_of_token(self) -> Array:
        """Places (M, w) of each token's rows among those collected."""
        assert self._combine is not None
        found = self._combine.row_of_token
        return self.plan.row_of_token if found is None else found
