"""Which rank owns which expert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pymoe import checks
from pymoe.comm.eplb import ExpertPlan
from pymoe.errors import ArgumentError, DTypeError, complaint

Array = Any

STRATEGIES = ("linear", "round_robin")


@dataclass(frozen=True)
class Placement:
    """Owner and local number of each global expert.

    Attributes
    ----------
    owner : (E,) int32
        Rank that holds the expert; -1 where none does, and its slots contribute 0.
    local : (E,) int32
        Its number there; -1 where `owner` is.
    """

    owner: Array
    local: Array

    @classmethod
    def from_ids(cls, call: str, ids_by_rank: Sequence[Sequence[int]], num_experts: int) -> Placement:
        """Return the placement of the global ids that each rank lists, or refuse an expert with two owners."""
        owner = np.full(num_experts, -1, np.int32)
        local = np.full(num_experts, -1, np.int32)
        for rank, ids in enumerate(ids_by_rank):
            for number, expert in enumerate(ids):
                if not 0 <= expert < num_experts:
                    got = f"{expert} on rank {rank}"
                    raise ArgumentError(complaint(call, "placement", f"name experts in 0..{num_experts - 1}", got))
                if owner[expert] >= 0:
                    got = f"expert {expert} on ranks {owner[expert]} and {rank}"
                    raise ArgumentError(complaint(call, "placement", "give each expert to one rank", got))
                owner[expert], local[expert] = rank, number
        return cls(owner, local)

    @classmethod
    def of(cls, call: str, strategy: str, num_experts: int, ranks: int) -> Placement:
        """Return the placement that a strategy makes of `num_experts` on `ranks`."""
        return cls.from_ids(
            call, [experts_of(call, strategy, num_experts, ranks, r) for r in range(ranks)], num_experts
        )

    @property
    def num_experts(self) -> int:
        """E, global."""
        return len(self.owner)

    def expert_map(self, rank: int) -> Array:
        """Return (E,) int32: the local number of each expert on `rank`, -1 for those of others."""
        return np.where(self.owner == rank, self.local, -1).astype(np.int32)

    def experts(self, rank: int) -> Array:
        """Return the global ids that `rank` holds, by local number."""
        mine = np.flatnonzero(self.owner == rank)
        return mine[np.argsort(self.local[mine], kind="stable")]

    def find(self, topk_ids: Array) -> tuple[Array, Array]:
        """Return (owner, local number) of each slot, -1 where no rank has its expert."""
        legal = (topk_ids >= 0) & (topk_ids < self.num_experts)
        if not self.num_experts:
            nobody = np.full(topk_ids.shape, -1, np.int32)
            return nobody, nobody
        ids = np.where(legal, topk_ids, 0)
        return np.where(legal, self.owner[ids], -1), np.where(legal, self.local[ids], -1)


@dataclass(frozen=True)
class PlannedPlacement(Placement):
    """Owners by a plan of redundant experts, as one rank uses it.

    An expert may be on several ranks; the number of a token, counted from this rank's own, says which of them serves it
    (`ExpertPlan.to_physical`).  `owner` and `local` are those of the first.

    Attributes
    ----------
    plan : ExpertPlan
        Of one layer.
    rank : int
        Whose tokens `find` is asked about.
    """

    plan: ExpertPlan
    rank: int

    @classmethod
    def by(cls, call: str, plan: ExpertPlan, ranks: int, rank: int) -> PlannedPlacement:
        """Return the placement of `plan`, or refuse one for other ranks, for several layers, or with a wasted slot."""
        if plan.layers != 1:
            remedy = "Use ExpertPlan.layer"
            raise ArgumentError(complaint(call, "placement", "be a plan of one layer", f"{plan.layers} layers", remedy))
        if plan.ranks != ranks:
            raise ArgumentError(complaint(call, "placement", f"be a plan for {ranks} ranks", f"one for {plan.ranks}"))
        if plan.repeats().any():
            rule = "hold no expert twice on a rank"
            raise ArgumentError(complaint(call, "placement", rule, f"{plan.repeats()[0]} such slots"))
        first = plan.logical_to_physical[0, :, 0]
        return cls(first // plan.slots, first % plan.slots, plan, rank)

    def expert_map(self, rank: int) -> Array:
        mapping = np.full(self.num_experts, -1, np.int32)
        mapping[self.experts(rank)] = np.arange(self.plan.slots, dtype=np.int32)
        return mapping

    def experts(self, rank: int) -> Array:
        return self.plan.experts(rank)

    def find(self, topk_ids: Array) -> tuple[Array, Array]:
        slot = self.plan.to_physical(topk_ids, first_token=self.rank)
        return np.where(slot >= 0, slot // self.plan.slots, -1), np.where(slot >= 0, slot % self.plan.slots, -1)


def experts_of(call: str, placement: Any, num_experts: int, ranks: int, rank: int) -> list[int]:
    """Return the global ids that `placement` gives to `rank`.

    Parameters
    ----------
    placement : "linear", "round_robin", ExpertPlan or sequence of int
        "linear": blocks of E // R experts in rank order, one more on each of the first E % R ranks; "round_robin":
        ``rank, rank + R, ...``; a plan: what it puts there; else this rank's own ids, one for each expert here.
    """
    if isinstance(placement, ExpertPlan):
        return PlannedPlacement.by(call, placement, ranks, rank).experts(rank).tolist()
    if isinstance(placement, str):
        if placement == "linear":
            base, more = divmod(num_experts, ranks)
            start = rank * base + min(rank, more)
            return list(range(start, start + base + (rank < more)))
        if placement == "round_robin":
            return list(range(rank, num_experts, ranks))
        rule = f"be one of {', '.join(STRATEGIES)}, or global ids"
        raise ArgumentError(complaint(call, "placement", rule, repr(placement)))
    try:
        ids = [checks.integer(call, "placement", expert, 0) for expert in placement]
    except TypeError as error:
        if isinstance(error, DTypeError):
            raise
        rule = "be a strategy, a plan or a sequence of global ids"
        raise DTypeError(complaint(call, "placement", rule, type(placement).__name__)) from None
    return ids
