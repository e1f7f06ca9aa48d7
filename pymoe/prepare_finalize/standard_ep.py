"""Expert parallelism in the standard format: a token's row travels once to each rank that owns one of its experts.

Each rank sums what its own experts make of a token, in float32; the token's rank sums those partial sums in rank
order, and rounds once.  That order is the declared one: it differs from the order of the slots, in which one process
sums, by the rounding of float32 and by nothing else.
"""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np

from pymoe import checks
from pymoe.comm import Ranks
from pymoe.comm.plan import DispatchPlan, as_bytes, pack_meta, plan_all, plan_dispatch, unpack_meta
from pymoe.comm.transports.base import Payload
from pymoe.contracts import (
    ExpertTokensMetadata,
    FusedMoEActivationFormat,
    FusedMoEExperts,
    FusedMoEPrepareAndFinalizeModular,
    PrepareResult,
    RowMap,
    TopKWeightAndReduce,
)
from pymoe.errors import ArgumentError, complaint
from pymoe.ops.quantize import quantize_activations
from pymoe.ops.unpermute import unpermute
from pymoe.prepare_finalize.exchange import Exchange
from pymoe.quantization import FusedMoEQuantConfig
from pymoe.tokens import live_tokens, weigh_input
from pymoe.weight_and_reduce import TopKWeightAndReduceContiguous, TopKWeightAndReduceDelegate

Array = Any


class StandardEpPrepareAndFinalize(FusedMoEPrepareAndFinalizeModular):
    """Dispatch rows to the ranks of their experts, combine partial sums in rank order.

    Activations with a scale for each token or group, or with a static one, are quantized before they travel, scales
    beside the rows.  One dynamic scale for all rows is taken of the rows that a rank receives.

    Parameters
    ----------
    ranks : Ranks
        With the placement of the experts; ids in calls are global.
    asynchronous : bool
        Offer prepare_async and finalize_async, each with a hook and a receiver.
    """

    def __init__(self, ranks: Ranks, *, asynchronous: bool = False) -> None:
        self.ranks = ranks
        self._asynchronous = bool(asynchronous)
        self._pair = type(self).__name__
        self._exchange: Exchange | None = None

    def post_init_setup(self, fused_experts: FusedMoEExperts) -> None:
        self._pair = f"{type(self).__name__} with {type(fused_experts).__name__}"
        if fused_experts.moe_config.num_experts != self.ranks.num_experts:
            rule = f"count the {self.ranks.num_experts} experts of the placement"
            got = fused_experts.moe_config.num_experts
            raise ArgumentError(complaint(type(self).__name__, "moe_config.num_experts", rule, got))

    @property
    def activation_format(self) -> FusedMoEActivationFormat:
        return FusedMoEActivationFormat.Standard

    def topk_indices_dtype(self) -> Any:
        return None

    def max_num_tokens_per_rank(self) -> int | None:
        return None

    def num_dispatchers(self) -> int:
        return self.ranks.size

    def output_is_reduced(self) -> bool:
        return True

    def supports_async(self) -> bool:
        return self._asynchronous

    def guard(self, call: str) -> contextlib.AbstractContextManager[None]:
        return self.ranks.group.guard(call)

    def localizes_ids(self) -> bool:
        return True

    def combine_dtype(self, out_dtype: Any) -> Any:
        return np.dtype("float32")

    def prepare(self, *args: Any, **kwargs: Any) -> PrepareResult:
        hook, receiver = self.prepare_async(*args, **kwargs)
        hook()
        return receiver()

    def prepare_async(
        self,
        a1: Array,
        topk_weights: Array,
        topk_ids: Array,
        num_experts: int,
        expert_map: Array | None,
        apply_router_weight_on_input: bool,
        quant_config: FusedMoEQuantConfig,
        defer_input_quant: bool = False,
    ) -> Any:
        call = f"{type(self).__name__}.prepare"
        a1 = weigh_input(call, a1, topk_weights, apply_router_weight_on_input)
        owner, local = self.ranks.placement.find(topk_ids)
        plan = self._plan(owner)
        quantized = quant_config.quant_dtype is not None and not defer_input_quant
        early = quantized and not quant_config.is_dynamic_per_tensor
        rows, scale = quantize_activations(a1, quant_config, "a1") if early else (a1, None)
        key = quant_config.activation_key
        shared_scale = scale is not None and key is not None and key.scale.group_shape.row == -1
        row_scale = None if shared_scale or scale is None else scale
        weights = None if apply_router_weight_on_input else topk_weights
        # Ids of other ranks' experts are nobody's there.
        ids = np.where(owner[plan.token] == plan.destination()[:, None], local[plan.token], -1).astype(np.int32)
        meta = pack_meta(
            ids,
            None if weights is None else weights[plan.token].astype(np.float32, copy=False),
            None if row_scale is None else row_scale[plan.token],
        )
        payloads = [Payload(as_bytes(rows), plan.token), Payload(meta)]
        exchange = Exchange(self.ranks, plan, plan.counts, payloads, 4 * a1.shape[1])
        values = {"num_experts": num_experts, "topk": topk_ids.shape[1], "K": a1.shape[1]}
        exchange.announce(call, len(a1), values, {"pair": self._pair, "dtype": rows.dtype.name})
        self._exchange = exchange
        topk, scale_dtype = topk_ids.shape[1], None if row_scale is None else row_scale.dtype

        def receive() -> PrepareResult:
            raw, meta = exchange.receive()
            received = raw.view(rows.dtype)
            ids, weights, scales = unpack_meta(meta, topk, not apply_router_weight_on_input, scale_dtype)
            if weights is None:
                weights = np.ones(ids.shape, np.float32)
            if quantized and not early:
                live = live_tokens(ids, len(self.ranks.experts), None)
                received, scales = quantize_activations(received, quant_config, "a1", live=live)
            counts = np.bincount(ids[ids >= 0], minlength=len(self.ranks.experts))
            self.ranks.expert_num_tokens = counts
            meta_counts = ExpertTokensMetadata.make_from_list(counts.tolist())
            return PrepareResult(received, scale if shared_scale else scales, meta_counts, ids, weights)

        return exchange.send, receive

    def _plan(self, owner: Array) -> DispatchPlan:
        return plan_dispatch(owner, self.ranks.size)

    def finalize(self, *args: Any, **kwargs: Any) -> None:
        self.finalize_async(*args, **kwargs)()

    def finalize_async(
        self,
        output: Array,
        fused_expert_output: Array,
        topk_weights: Array,
        topk_ids: Array,
        apply_router_weight_on_input: bool,
        weight_and_reduce_impl: TopKWeightAndReduce,
    ) -> Any:
        exchange = self._exchange
        assert exchange is not None
        self._exchange = None
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
            sum_rows(exchange.collect().view(np.float32), exchange.plan.row_of_token, output)

        return receive


class AllGatherPrepareAndFinalize(StandardEpPrepareAndFinalize):
    """Every token goes to every rank, and every rank returns a partial sum of each: for few ranks and small calls.

    Counts do not depend on the routing.  The bits are those of `StandardEpPrepareAndFinalize`.
    """

    def _plan(self, owner: Array) -> DispatchPlan:
        return plan_all(len(owner), self.ranks.size)


def sum_rows(rows: Array, row_of_token: Array, output: Array) -> None:
    """Write each token's float32 sum of `rows`, in the order of `row_of_token` (M, w), rounded once to `output`."""
    empty = np.zeros(0, np.int64)
    checks.shape("finalize", "output", output, (len(row_of_token), rows.shape[1]))
    unpermute(rows, RowMap(np.array([0, len(rows)]), empty, row_of_token), out=output)
