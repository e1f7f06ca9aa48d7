"""What a layer knows of its ranks: the group, which expert is where, and its own number among the group's layers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from pymoe.comm.connect import open_group
from pymoe.comm.eplb import ExpertPlan
from pymoe.comm.group import Group
from pymoe.comm.header import Header, Kind
from pymoe.comm.placement import Placement, PlannedPlacement, experts_of
from pymoe.comm.plan import as_bytes
from pymoe.errors import ArgumentError, complaint

Array = Any


class Ranks:
    """The ranks that share a layer.

    Parameters
    ----------
    group : Group
    placement : Placement
        Which rank holds which expert.
    number : int
        Of the layer, the same on all ranks.

    Attributes
    ----------
    expert_num_tokens : (E_local,) int64
        Rows that each expert here computed in the last call.
    """

    def __init__(self, group: Group, placement: Placement, number: int) -> None:
        self.group, self.placement, self.number = group, placement, number
        self.rank, self.size = group.rank, group.size
        self.expert_map = placement.expert_map(self.rank)
        self.experts = placement.experts(self.rank)
        self.expert_num_tokens = np.zeros(len(self.experts), np.int64)
        self._open = True

    @property
    def num_experts(self) -> int:
        """E, global."""
        return self.placement.num_experts

    def load(self) -> Array:
        """Return the rows that each global expert computed here in the last call, (E,) int64, read-only."""
        load = np.zeros(self.num_experts, np.int64)
        load[self.experts] = self.expert_num_tokens
        load.flags.writeable = False
        return load

    def close(self, call: str) -> None:
        """Leave the group, on all ranks together; the last layer on it closes it.

        Where other ranks do something else, all raise, and the layer stays open; a group that is broken is left.
        """
        if not self._open:
            return
        group = self.group
        agreed = False
        try:
            if group.broken is None:
                with group.guard(call, 1):
                    group.post(Header(Kind.CLOSE, values={"layer": self.number}))
                    group.collect("at close")
            agreed = True
        finally:
            if agreed or group.broken is not None:
                self._open = False
                release(call, group)


@contextlib.contextmanager
def connecting(call: str, comm: Any, transport: str, keep: bool = True) -> Iterator[Group]:
    """Surround the building of a layer: yields the group of `comm`; an error inside is raised by every rank.

    Inside, `place` and then `agree` must be called once each.  The group is left at the end, unless a layer is to
    `keep` it.
    """
    group = open_group(call, comm, transport)
    try:
        with group.guard(call):
            yield group
    except BaseException:
        release(call, group)
        raise
    if not keep:
        release(call, group)


def release(call: str, group: Group) -> None:
    """Give up one use of a group; the last one closes it, on all ranks."""
    group.users -= 1
    if group.users <= 0:
        group.close(call)


def place(call: str, group: Group, placement: Any, num_experts: int | None, E_local: int) -> Ranks:
    """Tell all ranks which experts are here, and learn which are there; collective.

    Parameters
    ----------
    placement : "linear", "round_robin", ExpertPlan or sequence of int
        As in `experts_of`.
    num_experts : int, optional
        Default: those of the plan, else the sum of all ranks' experts.
    E_local : int
        Experts that this rank brings.
    """
    number = group.layers
    planned = isinstance(placement, ExpertPlan)
    named = isinstance(placement, str) or planned
    ids = [] if named else experts_of(call, placement, 0, group.size, group.rank)
    if not named and len(ids) != E_local:
        raise ArgumentError(complaint(call, "placement", f"name the {E_local} experts of w1", f"{len(ids)} ids"))
    values = {"layer": number, "num_experts": -1 if num_experts is None else num_experts}
    if planned:
        num_experts = placement.num_logical if num_experts is None else num_experts
        if num_experts != placement.num_logical:
            got = f"one of {placement.num_logical}"
            raise ArgumentError(complaint(call, "placement", f"be a plan of {num_experts} experts", got))
    names = {"placement": str(placement) if named else "explicit"}
    group.post(Header(Kind.PLACE, values=values, names=names), np.full((group.size, 2), E_local, np.int64))
    _, there, _ = group.collect("while ranks tell their experts")
    group.layers += 1
    E = int(there.receive.sum()) if num_experts is None else num_experts
    if named:
        if planned:
            found: Placement = PlannedPlacement.by(call, placement, group.size, group.rank)
        else:
            found = Placement.of(call, placement, E, group.size)
        for rank, here in enumerate(there.receive):
            due = len(found.experts(rank))
            if here != due:
                rule = f"hold {due} of {E} experts on rank {rank} with placement {placement}"
                raise ArgumentError(complaint(call, "w1", rule, f"{here} experts"))
    else:
        raw = group.gather(as_bytes(np.asarray(ids, np.int64).reshape(-1, 1)), there)
        found = Placement.from_ids(call, [rows.view(np.int64).reshape(-1).tolist() for rows in raw], E)
    return Ranks(group, found, number)


def agree(call: str, ranks: Ranks, values: dict[str, int], names: dict[str, str]) -> None:
    """End the building of a layer: all ranks built it, and built the same; collective."""
    ranks.group.post(Header(Kind.AGREE, values={"layer": ranks.number} | values, names=names))
    ranks.group.collect("at the end of building")
