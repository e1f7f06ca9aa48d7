"""Several nodes: a row crosses to a node once and is handed on inside it; what comes back is summed there first.

    source ──► gateway: the other node's rank with the source's place in it ──► every rank there that needs the row
    source ◄── gateway: sums the rows of its node, in rank order            ◄── experts

With 8 ranks a node, 8 experts a token and 16 ranks, a row goes to 2.0 nodes in place of 6.5 ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pymoe.comm.plan import Counts, DispatchPlan, rank_offsets, rows_of_tokens
from pymoe.comm.transports.base import Arena, Capabilities, FlatTransport, Payload, Transfer, Transport

Array = Any
SIZES, OUT, OUT_ONCE, IN, BACK_IN, BACK_OUT = range(2, 8)
"""Ways of the flat transport below, which has memory and tags for each."""


class HierTransport(Transport):
    """Two steps of a flat transport.

    Parameters
    ----------
    flat : FlatTransport
        Between all ranks; needs no start of rows.
    node_of_rank : ndarray, (R,)
        Ranks with the same number share a node.
    """

    name = "hier"
    capabilities = Capabilities(zero_copy_receive=False)
    recoverable = False

    def __init__(self, flat: FlatTransport, rank: int, node_of_rank: Array) -> None:
        self.flat, self.rank, self.size = flat, rank, len(node_of_rank)
        self.arena = Arena()
        numbers, node = np.unique(node_of_rank, return_inverse=True)
        self.nodes = [np.flatnonzero(node == number).tolist() for number in range(len(numbers))]
        self.here = self.nodes[node[rank]]
        place = [self.nodes[node[r]].index(r) for r in range(self.size)]
        self.gateways = [self._gateway(rank, members, place[rank]) for members in self.nodes]
        """Gateway of each node for what this rank sends."""
        self.sources = [r for r in range(self.size) if self._gateway(r, self.here, place[r]) == rank]
        """Ranks for which this one is the gateway of its node."""
        self.gateway_here = [self._gateway(r, self.here, place[r]) for r in range(self.size)]
        """Gateway of this node for each source."""
        self.dispatched: HierDispatch | None = None

    @staticmethod
    def _gateway(source: int, members: list[int], place: int) -> int:
        return source if source in members else members[place % len(members)]

    def open_dispatch(self, plan: DispatchPlan, counts: Counts, widths: Sequence[int]) -> Transfer:
        self.dispatched = HierDispatch(self, plan, counts, widths)
        return self.dispatched

    def open_combine(self, plan: DispatchPlan, counts: Counts, width: int, reducible: bool) -> Transfer:
        assert self.dispatched is not None
        self.dispatched.back = counts
        return HierCombine(self, self.dispatched, counts, width, reducible)

    def counts(self, send: dict[int, int], receive: dict[int, int]) -> Counts:
        """Return the counts of one step."""
        out, into = np.zeros(self.size, np.int64), np.zeros(self.size, np.int64)
        for rank, rows in send.items():
            out[rank] = rows
        for rank, rows in receive.items():
            into[rank] = rows
        return Counts(out, into)

    def close(self, call: str, seconds: float, broken: bool) -> None:
        self.dispatched = None
        self.arena = Arena()


class Steps(Transfer):
    """Transfers of the flat transport one after another; each step begins when the one before has arrived."""

    def __init__(self, transport: HierTransport) -> None:
        self._transport = transport
        self._waiting: list[Transfer] = []
        self._sent: list[Transfer] = []
        self._next: list[Any] = []
        self._begun = False

    def run(self, way: int, counts: Counts, rows: Sequence[Array]) -> Transfer:
        """Start one step with rows in the order of their ranks."""
        transfer = self._transport.flat.open(way, counts, [part.shape[1] for part in rows])
        transfer.send([Payload(part) for part in rows])
        self._waiting.append(transfer)
        self._sent.append(transfer)
        return transfer

    def started(self) -> bool:
        return self._begun

    def missing(self) -> list[int]:
        while self._begun:
            for transfer in self._waiting:
                transfer.unsettled()
            late = sorted({rank for transfer in self._waiting for rank in transfer.missing()})
            if late:
                return late
            self._waiting = []
            if not self._next:
                return []
            self._next.pop(0)()
        return [self._transport.rank]

    def unsettled(self) -> list[int]:
        return sorted({rank for transfer in self._sent for rank in transfer.unsettled()})

    def cancel(self, ranks: Sequence[int]) -> None:
        """Nothing: after an error the steps of several ranks are in each other's way, and the group is given up."""


class HierDispatch(Steps):
    """Sizes, then rows to the gateways, then rows to their ranks."""

    def __init__(self, transport: HierTransport, plan: DispatchPlan, counts: Counts, widths: Sequence[int]) -> None:
        super().__init__(transport)
        self.plan, self.there, self.back = plan, counts, counts
        received = int(counts.receive.sum())
        self.inbox = [transport.arena.rows(("inbox", n), received, width) for n, width in enumerate(widths)]
        self._next = [self._to_gateways, self._to_ranks, self._arrange]

    def send(self, payloads: Sequence[Payload]) -> None:
        self._begun = True
        self._payloads = payloads
        transport, to = self._transport, rank_offsets(self.there.send)
        self.union: list[Array] = []
        """Tokens that go to each node, ascending."""
        self._rows: list[Array] = []
        self._places: list[Array] = []
        sizes = []
        for members in transport.nodes:
            rows = np.concatenate([np.arange(to[rank], to[rank + 1]) for rank in members])
            tokens, places = np.unique(self.plan.token[rows], return_inverse=True)
            self.union.append(tokens)
            self._rows.append(rows)
            self._places.append(places.astype(np.int32))
            line = np.zeros(1 + 2 * transport.size, np.int64)
            line[0] = len(tokens)
            line[1 : 1 + len(members)] = self.there.send[members]
            line[1 + transport.size : 1 + transport.size + len(members)] = self.back.receive[members]
            sizes.append(line)
        order = np.argsort(transport.gateways)
        ones = transport.counts(dict.fromkeys(transport.gateways, 1), dict.fromkeys(transport.sources, 1))
        self._sizes = self.run(SIZES, ones, [np.stack([sizes[n] for n in order]).view(np.uint8)])

    def _to_gateways(self) -> None:
        """Send each node's rows once, and beside them, for each rank there, which rows it gets and what is its own."""
        transport, members = self._transport, len(self._transport.here)
        lines = self._sizes.inbox[0].view(np.int64)
        self.sizes = lines[:, 0].tolist()
        """Rows from each source that this gateway serves."""
        self.rows_of = lines[:, 1 : 1 + members].copy()
        """(sources, ranks here): rows for each rank."""
        self.back_of = lines[:, 1 + transport.size : 1 + transport.size + members].copy()
        order = np.argsort(transport.gateways)
        once = [payload for payload in self._payloads if payload.order is not None]
        own = [payload for payload in self._payloads if payload.order is None]
        gathered = np.concatenate([self.union[n] for n in order])
        counts = transport.counts(
            {transport.gateways[n]: len(self.union[n]) for n in order},
            dict(zip(transport.sources, self.sizes, strict=True)),
        )
        self._once = self.run(OUT_ONCE, counts, [payload.rows[gathered] for payload in once])
        rows = np.concatenate([self._rows[n] for n in order])
        places = np.concatenate([self._places[n] for n in order]).reshape(-1, 1).view(np.uint8)
        counts = transport.counts(
            {transport.gateways[n]: len(self._rows[n]) for n in order},
            dict(zip(transport.sources, self.rows_of.sum(axis=1).tolist(), strict=True)),
        )
        beside = np.concatenate([places.reshape(len(rows), 4), *(payload.rows[rows] for payload in own)], axis=1)
        self._own = self.run(OUT, counts, [beside])

    def _to_ranks(self) -> None:
        """Hand rows on inside the node, by rank and then by source."""
        transport = self._transport
        base, beside = rank_offsets(np.array(self.sizes, np.int64)), self._own.inbox[0]
        self.place = np.ascontiguousarray(beside[:, :4]).view(np.int32)[:, 0].astype(np.int64)
        """Place of each row among its source's rows, by source and then by rank."""
        starts = rank_offsets(self.rows_of.reshape(-1))[:-1].reshape(self.rows_of.shape)
        self.by_rank = [
            np.arange(starts[s, d], starts[s, d] + self.rows_of[s, d])
            for d in range(len(transport.here)) for s in range(len(transport.sources))
        ]  # fmt: skip
        source = np.repeat(np.arange(len(transport.sources)), self.rows_of.sum(axis=1))
        order = np.concatenate(self.by_rank)
        rows = (base[source] + self.place)[order]
        onwards = dict(zip(transport.here, self.rows_of.sum(axis=0).tolist(), strict=True))
        receive = dict.fromkeys(transport.here, 0)
        for rank, gateway in enumerate(transport.gateway_here):
            receive[gateway] += int(self.there.receive[rank])
        once = [inbox[rows] for inbox in self._once.inbox]
        self._in = self.run(IN, transport.counts(onwards, receive), [*once, beside[order, 4:]])

    def _arrange(self) -> None:
        """Put what came by gateway and source into the order of the sources."""
        gateways = np.array(self._transport.gateway_here)
        by_gateway = np.argsort(gateways, kind="stable")
        lengths = self.there.receive[by_gateway]
        starts = np.zeros(len(gateways), np.int64)
        starts[by_gateway] = rank_offsets(lengths)[:-1]
        self.order = np.concatenate(
            [np.arange(start, start + n) for start, n in zip(starts, self.there.receive, strict=True)]
        )
        """Row, as it came, of each row by source."""
        *once, beside = self._in.inbox
        first = 0
        for inbox, payload in zip(self.inbox, self._payloads, strict=True):
            if payload.order is not None:
                inbox[:] = once.pop(0)[self.order]
            else:
                inbox[:] = beside[self.order, first : first + inbox.shape[1]]
                first += inbox.shape[1]


class HierCombine(Steps):
    """Rows to the gateways of their tokens' ranks, then one sum a node home; or all rows where sums are not wanted."""

    def __init__(
        self, transport: HierTransport, dispatched: HierDispatch, counts: Counts, width: int, reducible: bool
    ) -> None:
        super().__init__(transport)
        self._dispatched, self._counts, self._width, self._reducible = dispatched, counts, width, reducible
        self.inbox = []
        self._next = [self._home, self._arrange]

    def send(self, payloads: Sequence[Payload]) -> None:
        self._begun = True
        transport = self._transport
        (payload,) = payloads
        starts = rank_offsets(self._counts.send)
        by_gateway = np.argsort(transport.gateway_here, kind="stable")
        order = np.concatenate([np.arange(starts[rank], starts[rank + 1]) for rank in by_gateway])
        send = dict.fromkeys(transport.here, 0)
        for rank, gateway in enumerate(transport.gateway_here):
            send[gateway] += int(self._counts.send[rank])
        receive = dict(zip(transport.here, self._sizes().sum(axis=0).tolist(), strict=True))
        self._in = self.run(BACK_IN, transport.counts(send, receive), [payload.rows[order]])

    def _sizes(self) -> Array:
        """Return (sources, ranks here): rows that come back from each rank for each source."""
        return self._dispatched.rows_of if self._reducible else self._dispatched.back_of

    def _home(self) -> None:
        """Sum the node's rows of each source, rank by rank; or put them in the order of source and rank."""
        transport, sizes = self._transport, self._sizes()
        rows = self._in.inbox[0]
        # They came by rank and then by source.
        starts = rank_offsets(sizes.T.reshape(-1))[:-1].reshape(sizes.T.shape)
        parts = []
        places = np.split(self._dispatched.place, np.cumsum(self._dispatched.rows_of.reshape(-1))[:-1])
        for s in range(len(transport.sources)):
            pieces = [rows[starts[d, s] : starts[d, s] + sizes[s, d]] for d in range(len(transport.here))]
            if not self._reducible:
                parts.extend(pieces)
                continue
            total = np.zeros((self._dispatched.sizes[s], self._width // 4), np.float32)
            with np.errstate(all="ignore"):
                for d, piece in enumerate(pieces):
                    # A rank returns one row a token: no place occurs twice in a piece.
                    total[places[s * len(transport.here) + d]] += piece.view(np.float32)
            parts.append(total.view(np.uint8))
        home = self._dispatched.sizes if self._reducible else sizes.sum(axis=1).tolist()
        due = {
            gateway: len(tokens) if self._reducible else int(self._counts.receive[members].sum())
            for gateway, tokens, members in zip(
                transport.gateways, self._dispatched.union, transport.nodes, strict=True
            )
        }
        counts = transport.counts(dict(zip(transport.sources, home, strict=True)), due)
        self._out = self.run(BACK_OUT, counts, [np.concatenate(parts)])

    def _arrange(self) -> None:
        """Say which rows are whose, or put them in the order of their ranks."""
        transport = self._transport
        (rows,) = self._out.inbox
        order = np.argsort(transport.gateways)
        if self._reducible:
            self.inbox = [rows]
            tokens = np.concatenate([self._dispatched.union[n] for n in order])
            self.row_of_token = rows_of_tokens(tokens, self._dispatched.plan.row_of_token.shape[0])
            return
        members = np.concatenate([transport.nodes[n] for n in order])
        starts = np.zeros(transport.size, np.int64)
        starts[members] = rank_offsets(self._counts.receive[members])[:-1]
        back = [np.arange(start, start + n) for start, n in zip(starts, self._counts.receive, strict=True)]
        self.inbox = [rows[np.concatenate(back)]]
