"""The four ways to finish the experts' output: leave it, copy it, or weigh and sum it from one of two layouts."""

from __future__ import annotations

from typing import Any

import numpy as np

from pymoe import checks
from pymoe.contracts import RowMap, TopKWeightAndReduce
from pymoe.device.arrays import as_array, as_numpy, namespace
from pymoe.errors import ShapeError, UnsupportedError, complaint
from pymoe.ops.unpermute import unpermute
from pymoe.ops.weight_reduce import weight_reduce

__all__ = [
    "TopKWeightAndReduceContiguous",
    "TopKWeightAndReduceDelegate",
    "TopKWeightAndReduceNaiveBatched",
    "TopKWeightAndReduceNoOP",
]

Array = Any


class _ByType(TopKWeightAndReduce):
    """Equal to every instance of its own class."""

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self)

    def __hash__(self) -> int:
        return hash(type(self))

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class TopKWeightAndReduceDelegate(_ByType):
    """The experts did neither; prepare/finalize chooses how.  Never applied itself."""

    def apply(
        self,
        output: Array | None,
        fused_expert_output: Array,
        topk_weights: Array,
        topk_ids: Array,
        apply_router_weight_on_input: bool,
    ) -> Array:
        rule = "be replaced by the prepare/finalize before it is applied"
        raise UnsupportedError(complaint("finalize", "weight_and_reduce_impl", rule, repr(self)))


class TopKWeightAndReduceNoOP(_ByType):
    """The experts did both: (M, K) goes through, or is copied where another `output` is given."""

    def apply(
        self,
        output: Array | None,
        fused_expert_output: Array,
        topk_weights: Array,
        topk_ids: Array,
        apply_router_weight_on_input: bool,
    ) -> Array:
        if output is None or output is fused_expert_output:
            return fused_expert_output
        call = f"{type(self).__name__}.apply"
        target = as_array(call, "output", output)
        checks.shape(call, "output", target, fused_expert_output.shape)
        with np.errstate(all="ignore"):
            namespace(target).copyto(target, fused_expert_output, casting="unsafe")
        return output


class TopKWeightAndReduceContiguous(_ByType):
    """Rows (M * topk, K) or (M, topk, K) stand in their slots: weigh, then sum over the slots."""

    def apply(
        self,
        output: Array | None,
        fused_expert_output: Array,
        topk_weights: Array,
        topk_ids: Array,
        apply_router_weight_on_input: bool,
    ) -> Array:
        call = f"{type(self).__name__}.apply"
        M, topk = topk_ids.shape
        rows = as_array(call, "fused_expert_output", fused_expert_output)
        checks.shape(call, "fused_expert_output", rows, (M * topk, None), (M, topk, None))
        weights = None if apply_router_weight_on_input else topk_weights
        return weight_reduce(rows.reshape(M, topk, rows.shape[-1]), weights, topk_ids, out=output)


class TopKWeightAndReduceNaiveBatched(TopKWeightAndReduce):
    """Slabs (E_local, capacity, K): each expert's rows are those of its tokens, in token order.

    Parameters
    ----------
    rank : int
        The slabs are those of the experts ``[E_local * rank, E_local * (rank + 1))``; others contribute 0.

    Notes
    -----
    A token that names an expert twice has one row there, which counts with both weights.
    """

    def __init__(self, rank: int) -> None:
        self.rank = checks.integer(type(self).__name__, "rank", rank, 0)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TopKWeightAndReduceNaiveBatched) and other.rank == self.rank

    def __hash__(self) -> int:
        return hash((type(self), self.rank))

    def __repr__(self) -> str:
        return f"{type(self).__name__}(rank={self.rank})"

    def apply(
        self,
        output: Array | None,
        fused_expert_output: Array,
        topk_weights: Array,
        topk_ids: Array,
        apply_router_weight_on_input: bool,
    ) -> Array:
        call = f"{type(self).__name__}.apply"
        slabs = as_numpy(call, "fused_expert_output", fused_expert_output)
        checks.shape(call, "fused_expert_output", slabs, (None, None, None))
        E_local, capacity, K = slabs.shape
        row_map = _slab_map(call, topk_ids, self.rank * E_local, E_local, capacity)
        weights = None if apply_router_weight_on_input else topk_weights
        return unpermute(slabs.reshape(E_local * capacity, K), row_map, topk_weights=weights, out=output)


def _slab_map(call: str, topk_ids: Array, first: int, E_local: int, capacity: int) -> RowMap:
    """Return the row of each slot when expert ``first + e`` keeps its tokens in order from row ``e * capacity`` on."""
    mine = (topk_ids >= first) & (topk_ids < first + E_local)
    token, slot = np.nonzero(mine)
    local = topk_ids[mine].astype(np.int64) - first
    # One key an expert and token, in the order of the rows: a token that names an expert twice has one row.
    keys, row_of_slot = np.unique(local * max(len(topk_ids), 1) + token, return_inverse=True)
    expert = keys // max(len(topk_ids), 1)
    place: Array = np.arange(len(keys)) - np.searchsorted(expert, expert)
    if len(place) and place.max() >= capacity:
        e = int(expert[np.argmax(place)])
        got = f"capacity {capacity} for the {place.max() + 1} tokens of expert {first + e}"
        raise ShapeError(complaint(call, "fused_expert_output", "have a row for every token", got))
    slot_to_row = np.full(topk_ids.shape, -1, np.int64)
    slot_to_row[mine] = (expert * capacity + place)[row_of_slot]
    row_to_slot = np.full(E_local * capacity, -1, np.int64)
    row_to_slot[slot_to_row[mine]] = token * topk_ids.shape[1] + slot
    return RowMap(np.arange(E_local + 1, dtype=np.int64) * capacity, row_to_slot, slot_to_row)
