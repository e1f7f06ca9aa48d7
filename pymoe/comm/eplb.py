"""Expert load balancing, the planning side: what was routed where, and which experts stand where, some of them twice.

*Logical* experts are the model's; *physical* experts are the slots that hold their weights.  Slot p is on rank
``p // (P / ranks)``.  A plan says which logical expert each slot holds; `pymoe.comm.rebalance` makes plans from loads.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from pymoe import checks
from pymoe.device.arrays import as_numpy
from pymoe.errors import ArgumentError, DTypeError, complaint

__all__ = ["ExpertPlan", "LoadWindow", "initial_plan", "replica_of_token"]

Array = Any

_GOLDEN = np.uint64(2654435769)
"""2**32 divided by the golden ratio: multiplied by it, consecutive numbers spread evenly over 32 bits."""


@dataclass(frozen=True, eq=False)
class ExpertPlan:
    """Which logical expert each physical slot holds, for every layer.

    Build one with `ExpertPlan.of`, `initial_plan` or `pymoe.comm.rebalance.rebalance`.

    Attributes
    ----------
    physical_to_logical : ndarray, (layers, P), int32
        Logical expert of each slot.
    logical_to_physical : ndarray, (layers, L, most), int32
        Slots of each logical expert, ascending; -1 fills up.
    logical_replica_count : ndarray, (layers, L), int32
        How many there are, at least 1.
    ranks : int
        P is a multiple of it.

    Source
    ------
    vLLM 0.33.0, `EplbState`: the same three maps.
    """

    physical_to_logical: Array
    logical_to_physical: Array
    logical_replica_count: Array
    ranks: int

    @classmethod
    def of(cls, physical_to_logical: Array, num_logical: int, ranks: int) -> ExpertPlan:
        """Return the plan of the map `physical_to_logical` (layers, P), or (P,) for one layer.

        Raises
        ------
        DTypeError, ShapeError, ArgumentError
            Not integers, P is not a multiple of `ranks`, or an expert of 0..num_logical-1 has no slot.
        """
        call = "ExpertPlan"
        L, ranks = checks.integer(call, "num_logical", num_logical, 1), checks.integer(call, "ranks", ranks, 1)
        given = as_numpy(call, "physical_to_logical", physical_to_logical)
        if given.ndim == 1:
            given = given[None]
        checks.shape(call, "physical_to_logical", given, (None, None))
        if given.dtype.kind not in "iu":
            raise DTypeError(complaint(call, "physical_to_logical", "have an integer dtype", given.dtype))
        layers, P = given.shape
        slots_per_rank(call, P, ranks)
        if given.size and (given.min() < 0 or given.max() >= L):
            wrong = given[(given < 0) | (given >= L)][0]
            raise ArgumentError(complaint(call, "physical_to_logical", f"name experts in 0..{L - 1}", wrong))
        held = given.astype(np.int32)
        counts = np.zeros((layers, L), np.int32)
        np.add.at(counts, (np.arange(layers)[:, None], held), 1)
        if layers and np.min(counts) < 1:
            layer, expert = (int(i) for i in np.argwhere(counts < 1)[0])
            got = f"no slot of expert {expert} in layer {layer}"
            raise ArgumentError(complaint(call, "physical_to_logical", "hold every expert", got))
        maps = held, _slots_of_experts(held, counts), counts
        for array in maps:
            array.flags.writeable = False
        return cls(*maps, ranks)

    @property
    def layers(self) -> int:
        """How many layers the plan is for."""
        return int(self.physical_to_logical.shape[0])

    @property
    def num_logical(self) -> int:
        """L: experts of the model."""
        return int(self.logical_replica_count.shape[1])

    @property
    def num_physical(self) -> int:
        """P: slots of all ranks."""
        return int(self.physical_to_logical.shape[1])

    @property
    def slots(self) -> int:
        """Slots of one rank."""
        return self.num_physical // self.ranks

    def __str__(self) -> str:
        """Return sizes and a checksum, by which ranks tell whether they have the same plan."""
        held = zlib.crc32(self.physical_to_logical.tobytes())
        return f"plan of {self.num_logical} experts in {self.num_physical} slots, {held:08x}"

    def layer(self, layer: int) -> ExpertPlan:
        """Return the plan of one layer, such as `MoELayer` takes as its placement."""
        return ExpertPlan.of(self.physical_to_logical[layer], self.num_logical, self.ranks)

    def experts(self, rank: int, layer: int = 0) -> Array:
        """Return the logical experts in the slots of `rank`, (slots,) int32."""
        return self.physical_to_logical[layer, rank * self.slots : (rank + 1) * self.slots]

    def repeats(self) -> Array:
        """Return (layers,) int64: slots that hold an expert that its rank holds already; 0 wherever avoidable."""
        by_rank = np.sort(self.physical_to_logical.reshape(self.layers, self.ranks, self.slots), axis=2)
        return np.count_nonzero(by_rank[:, :, 1:] == by_rank[:, :, :-1], axis=(1, 2))

    def moved_from(self, before: ExpertPlan) -> Array:
        """Return (layers,) int64: slots whose weights must come from another rank when this plan follows `before`."""
        shape = self.layers, self.ranks, self.slots
        now = self.physical_to_logical.reshape(shape)
        held = np.zeros((self.layers, self.ranks, self.num_logical), bool)
        layer, rank = np.arange(self.layers)[:, None, None], np.arange(self.ranks)[None, :, None]
        held[layer, rank, before.physical_to_logical.reshape(self.layers, self.ranks, -1)] = True
        return np.count_nonzero(~held[layer, rank, now], axis=(1, 2))

    def rank_loads(self, loads: Array) -> Array:
        """Return (layers, ranks) float64: the load of each rank when logical `loads` (layers, L) split evenly."""
        share = np.asarray(loads, np.float64) / self.logical_replica_count
        each = np.take_along_axis(share, self.physical_to_logical.astype(np.int64), axis=1)
        return each.reshape(self.layers, self.ranks, self.slots).sum(axis=2)

    def balancedness(self, loads: Array) -> Array:
        """Return (layers,) float64: mean over greatest load of a rank, in 1 / ranks .. 1; 1 where nothing is loaded."""
        by_rank = self.rank_loads(loads)
        most = by_rank.max(axis=1)
        return np.where(most > 0, by_rank.mean(axis=1) / np.where(most > 0, most, 1), 1.0)

    def logical_loads(self, physical_loads: Array) -> Array:
        """Return (layers, L): loads of physical slots (layers, P), such as `MoELayer.last_load`, by logical expert."""
        loads = np.asarray(physical_loads)
        checks.shape("ExpertPlan.logical_loads", "physical_loads", loads, self.physical_to_logical.shape)
        summed = np.zeros((self.layers, self.num_logical), loads.dtype)
        np.add.at(summed, (np.arange(self.layers)[:, None], self.physical_to_logical), loads)
        return summed

    def to_physical(self, topk_ids: Array, layer: int = 0, first_token: int = 0) -> Array:
        """Return the slot that serves each routed slot of a call.

        Parameters
        ----------
        topk_ids : ndarray, (M, topk), integer
            Logical experts; what is outside 0..L-1 becomes -1.
        layer : int
        first_token : int
            Number of the first token.  Ranks that each bring few tokens pass their rank, or all of them would take
            the same replicas.

        Returns
        -------
        ndarray, (M, topk), int32

        Notes
        -----
        The replica depends on the token's number and on how many replicas there are, see `replica_of_token`: the
        same on every rank, at every repetition.
        """
        call = "ExpertPlan.to_physical"
        topk_ids = as_numpy(call, "topk_ids", topk_ids)
        checks.shape(call, "topk_ids", topk_ids, (None, None))
        if topk_ids.dtype.kind not in "iu":
            raise DTypeError(complaint(call, "topk_ids", "have an integer dtype", topk_ids.dtype))
        legal = (topk_ids >= 0) & (topk_ids < self.num_logical)
        ids = np.where(legal, topk_ids, 0).astype(np.int64)
        token = np.arange(first_token, first_token + len(ids))[:, None]
        replica = replica_of_token(token, self.logical_replica_count[layer][ids])
        return np.where(legal, self.logical_to_physical[layer][ids, replica], np.int32(-1))


def replica_of_token(token: Array, replicas: Array) -> Array:
    """Return which of `replicas` serves a token: ``(token * 2654435769 mod 2**32) mod replicas``, int64.

    Source
    ------
    vLLM 0.33.0, its mapping of logical to physical experts: the same number.
    """
    spread = (np.asarray(token).astype(np.uint64) * _GOLDEN) & np.uint64(0xFFFFFFFF)
    return (spread % np.asarray(replicas).astype(np.uint64)).astype(np.int64)


def initial_plan(num_logical: int, num_redundant: int, ranks: int, layers: int = 1) -> ExpertPlan:
    """Return the plan before any load is known: all experts in order, then the first ones again.

    Raises
    ------
    ArgumentError
        The slots do not divide by the ranks.

    Source
    ------
    vLLM 0.33.0: the same map.

    Examples
    --------
    >>> from pymoe.comm.eplb import initial_plan
    >>> initial_plan(4, 2, ranks=2).physical_to_logical.tolist()
    [[0, 1, 2, 3, 0, 1]]
    """
    call = "initial_plan"
    L, more = (
        checks.integer(call, "num_logical", num_logical, 1),
        checks.integer(call, "num_redundant", num_redundant, 0),
    )
    held = np.concatenate([np.arange(L), np.arange(more) % L])
    return ExpertPlan.of(np.tile(held, (checks.integer(call, "layers", layers, 0), 1)), L, ranks)


def slots_per_rank(call: str, num_physical: int, ranks: int) -> int:
    """Return P / ranks, or refuse slots that do not divide."""
    if num_physical % ranks:
        more = -num_physical % ranks
        rule, got = f"divide by {ranks} ranks", f"{num_physical} slots"
        raise ArgumentError(
            complaint(call, "the number of physical experts", rule, got, f"Add {more} redundant experts")
        )
    return num_physical // ranks


class LoadWindow:
    """Rows routed to each logical expert in the last steps.  Not thread-safe.

    Parameters
    ----------
    layers, num_logical : int
    size : int
        Steps that count; memory is ``8 * size * layers * num_logical`` bytes.

    Examples
    --------
    >>> from pymoe.comm.eplb import LoadWindow
    >>> window = LoadWindow(layers=1, num_logical=4, size=2)
    >>> for ids in ([[0, 1]], [[1, 2]], [[1, 3]]):
    ...     window.record(np.array(ids))
    ...     window.step()
    >>> window.total().tolist()
    [[0, 2, 1, 1]]
    """

    def __init__(self, layers: int, num_logical: int, size: int = 1000) -> None:
        call = "LoadWindow"
        named = (("size", size, 1), ("layers", layers, 1), ("num_logical", num_logical, 1))
        shape = tuple(checks.integer(call, name, value, least) for name, value, least in named)
        self._steps = np.zeros(shape, np.int64)
        self._total = np.zeros(shape[1:], np.int64)
        self._now = np.zeros(shape[1:], np.int64)
        self._place = 0

    def record(self, topk_ids: Array, layer: int = 0) -> None:
        """Count the routing of one call, logical ids (M, topk); ids that name no expert do not count."""
        ids = as_numpy("LoadWindow.record", "topk_ids", topk_ids)
        if ids.dtype.kind not in "iu":
            raise DTypeError(complaint("LoadWindow.record", "topk_ids", "have an integer dtype", ids.dtype))
        L = self._now.shape[1]
        ids = ids[(ids >= 0) & (ids < L)].astype(np.int64)
        self._now[layer] += np.bincount(ids, minlength=L)

    def add(self, loads: Array, layer: int = 0) -> None:
        """Add rows counted elsewhere, (L,) integers of at least 0."""
        loads = as_numpy("LoadWindow.add", "loads", loads)
        checks.shape("LoadWindow.add", "loads", loads, (self._now.shape[1],))
        if loads.dtype.kind not in "iu":
            raise DTypeError(complaint("LoadWindow.add", "loads", "have an integer dtype", loads.dtype))
        if loads.size and loads.min() < 0:
            raise ArgumentError(complaint("LoadWindow.add", "loads", "be at least 0", loads.min()))
        self._now[layer] += loads.astype(np.int64)

    def step(self) -> None:
        """End a step: what was recorded since the last one enters the window, and the oldest step leaves it."""
        self._total += self._now - self._steps[self._place]
        self._steps[self._place] = self._now
        self._now[:] = 0
        self._place = (self._place + 1) % len(self._steps)

    def total(self) -> Array:
        """Return (layers, L) int64: the rows of all steps in the window, on this rank."""
        return self._total.copy()

    def clear(self) -> None:
        """Forget everything, as after a change of the plan when old loads shall not count."""
        for array in (self._steps, self._total, self._now):
            array[:] = 0


def _slots_of_experts(held: Array, counts: Array) -> Array:
    """Return (layers, L, most) int32: the slots of each expert, ascending."""
    layers, P = held.shape
    most = int(counts.max(initial=1))
    slots = np.full((layers, counts.shape[1], most), -1, np.int32)
    order = np.argsort(held, axis=1, kind="stable").astype(np.int32)
    expert = np.take_along_axis(held, order.astype(np.int64), axis=1).astype(np.int64)
    first = np.cumsum(counts, axis=1) - counts
    place = np.arange(P) - np.take_along_axis(first, expert, axis=1)
    slots[np.arange(layers)[:, None], expert, place] = order
    return slots
