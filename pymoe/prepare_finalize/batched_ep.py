"""Expert parallelism in the batched format: fixed slabs a local expert, filled by all ranks.

Rows travel once to each rank, as in the standard format, and are laid out in slabs where they arrive.  What comes back
is one row a slot, neither weighed nor summed: the token's rank sums in the order of the slots, which gives the bits of
one process at the price of more bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pymoe import checks
from pymoe.comm import Ranks
from pymoe.comm.plan import DispatchPlan, from_bytes, rows_of_slots
from pymoe.contracts import ExpertTokensMetadata, FusedMoEActivationFormat, PrepareResult, TopKWeightAndReduce
from pymoe.device.arrays import beside, is_cuda, namespace
from pymoe.errors import ArgumentError, complaint
from pymoe.prepare_finalize.ep import EpPrepareAndFinalize, Received, sum_rows
from pymoe.weight_and_reduce import TopKWeightAndReduceDelegate

Array = Any


class BatchedEpPrepareAndFinalize(EpPrepareAndFinalize):
    """Lay the rows that a rank receives out by expert, in the order of their ranks and tokens; the rest is zero.

    Parameters
    ----------
    ranks, asynchronous
        As in `EpPrepareAndFinalize`.
    max_num_tokens : int
        Most tokens that one rank brings; the same on all ranks.
    """

    _sends_weights = False
    _reducible = False

    def __init__(self, ranks: Ranks, max_num_tokens: int, *, asynchronous: bool = False) -> None:
        super().__init__(ranks, asynchronous=asynchronous)
        self._max_num_tokens = checks.integer(type(self).__name__, "max_num_tokens", max_num_tokens, 1)

    @property
    def activation_format(self) -> FusedMoEActivationFormat:
        return FusedMoEActivationFormat.BatchedExperts

    def max_num_tokens_per_rank(self) -> int | None:
        return self._max_num_tokens

    def _check_tokens(self, call: str, M: int) -> None:
        if M > self._max_num_tokens:
            rule = f"have at most max_num_tokens = {self._max_num_tokens} rows"
            raise ArgumentError(complaint(call, "a1", rule, M))

    def _rows_back(self, plan: DispatchPlan, owner: Array) -> Array:
        return np.bincount(owner[owner >= 0], minlength=self.ranks.size).astype(np.int64)

    def _remember(self, owner: Array, topk_weights: Array) -> None:
        self._slots = rows_of_slots(owner), topk_weights

    def _arrange(self, received: Received) -> PrepareResult:
        rows, scale, ids, _ = received
        E_local, M = len(self.ranks.experts), max(len(rows), 1)
        capacity = self._max_num_tokens * self.ranks.size
        row, slot = np.nonzero(ids >= 0)
        # One key an expert and row, ascending: a token that names an expert twice has one row there.
        keys, place_of_slot = np.unique(ids[row, slot].astype(np.int64) * M + row, return_inverse=True)
        expert = keys // M
        place: Array = expert * capacity + np.arange(len(keys)) - np.searchsorted(expert, expert)
        self._slab_of_slot = place[place_of_slot]

        slots = np.full(ids.shape, -1, np.int32)
        slots[row, slot] = self._slab_of_slot
        by_row = scale is not None and scale.ndim == 2 and len(scale) == len(rows)
        counts = np.bincount(expert, minlength=E_local).astype(np.int32)
        meta = ExpertTokensMetadata(beside(rows, counts), counts)
        shape = E_local, capacity
        scales = _slabs(scale, slots, shape) if by_row else scale
        return PrepareResult(_slabs(rows, slots, shape), scales, meta, None, None)

    def finalize_async(
        self,
        output: Array,
        fused_expert_output: Array,
        topk_weights: Array,
        topk_ids: Array,
        apply_router_weight_on_input: bool,
        weight_and_reduce_impl: TopKWeightAndReduce,
    ) -> Any:
        exchange = self._take_exchange()
        if not isinstance(weight_and_reduce_impl, TopKWeightAndReduceDelegate):
            rule = "leave weighing and summing to this pair"
            got = repr(weight_and_reduce_impl)
            raise ArgumentError(complaint(f"{type(self).__name__}.finalize", "weight_and_reduce_impl", rule, got))
        K = fused_expert_output.shape[-1]
        slabs = fused_expert_output.reshape(int(np.prod(fused_expert_output.shape[:-1])), K)
        rows = slabs[beside(slabs, self._slab_of_slot)]
        exchange.give_back(rows.astype(np.float32, copy=False))
        places, weights = self._slots

        def receive() -> None:
            back = from_bytes(exchange.collect(), np.float32)
            sum_rows(back, places, output, None if apply_router_weight_on_input else weights)

        return receive


def _slabs(rows: Array, slots: Array, shape: tuple[int, int]) -> Array:
    """Return slabs (E_local, capacity, columns) with row i at each place in ``slots[i]`` (topk,); -1 is no place.

    On the host the rest is zero; on a device it is whatever the memory held, since the experts do not read it.
    """
    n = shape[0] * shape[1]
    if is_cuda(rows):
        from pymoe.ops.permute import _cuda

        laid = namespace(rows).empty((n, rows.shape[1]), rows.dtype)
        _cuda.scatter_rows(namespace(rows).ascontiguousarray(rows), beside(rows, slots), laid)
    else:
        laid = np.zeros((n, rows.shape[1]), rows.dtype)
        row, slot = np.nonzero(slots >= 0)
        laid[slots[row, slot]] = rows[row]
    return laid.reshape(*shape, rows.shape[1])
