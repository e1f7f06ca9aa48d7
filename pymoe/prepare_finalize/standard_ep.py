"""Expert parallelism in the standard format: a token's row travels once to each rank that owns one of its experts.

Each rank sums what its own experts make of a token, in float32; the token's rank sums those partial sums in rank
order, and rounds once.  That order is the declared one: it differs from the order of the slots, in which one process
sums, by the rounding of float32 and by nothing else.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pymoe.comm.plan import DispatchPlan, from_bytes, plan_all
from pymoe.contracts import ExpertTokensMetadata, FusedMoEActivationFormat, PrepareResult, TopKWeightAndReduce
from pymoe.device.arrays import beside, is_cuda
from pymoe.prepare_finalize.ep import EpPrepareAndFinalize, Received, sum_rows
from pymoe.weight_and_reduce import TopKWeightAndReduceContiguous, TopKWeightAndReduceDelegate

Array = Any


class StandardEpPrepareAndFinalize(EpPrepareAndFinalize):
    """Dispatch a token once to each rank of its experts, combine partial sums in rank order.

    Parameters as in `EpPrepareAndFinalize`.
    """

    @property
    def activation_format(self) -> FusedMoEActivationFormat:
        return FusedMoEActivationFormat.Standard

    def _arrange(self, received: Received) -> PrepareResult:
        rows, scale, ids, weights = received
        if weights is None:
            weights = np.ones(ids.shape, np.float32)
        meta = None  # on a device the experts count for themselves
        if not is_cuda(rows):
            meta = ExpertTokensMetadata.make_from_list(self.ranks.expert_num_tokens.tolist())
        return PrepareResult(rows, scale, meta, beside(rows, ids), beside(rows, weights))

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
        if isinstance(weight_and_reduce_impl, TopKWeightAndReduceDelegate):
            weight_and_reduce_impl = TopKWeightAndReduceContiguous()
        partial = fused_expert_output
        if len(topk_ids):
            # Without rows there is nothing to reduce; this rank takes part in what follows all the same.
            partial = weight_and_reduce_impl.apply(
                None, fused_expert_output, topk_weights, topk_ids, apply_router_weight_on_input
            )
        exchange.give_back(partial.astype(np.float32, copy=False))

        def receive() -> None:
            rows = from_bytes(exchange.collect(), np.float32)
            sum_rows(rows, exchange.row_of_token, output)

        return receive


class AllGatherPrepareAndFinalize(StandardEpPrepareAndFinalize):
    """Every token goes to every rank, and every rank returns a partial sum of each: for few ranks and small calls.

    What travels does not depend on the routing.  The bits are those of `StandardEpPrepareAndFinalize`.
    """

    def _plan(self, owner: Array) -> DispatchPlan:
        return plan_all(len(owner), self.ranks.size)
