"""Expert parallelism for experts that route themselves: all tokens and logits to all ranks, partial sums back."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np

from pymoe.comm import Ranks
from pymoe.comm.plan import as_bytes, from_bytes, plan_all
from pymoe.comm.transports.base import Payload
from pymoe.contracts import (
    FusedMoEActivationFormat,
    FusedMoEExperts,
    FusedMoEPrepareAndFinalizeMonolithic,
    PrepareMonolithicResult,
)
from pymoe.device.arrays import beside, namespace, to_host
from pymoe.ops.quantize import quantize_activations
from pymoe.prepare_finalize.ep import check_placement, quantize_to_send, sum_rows
from pymoe.prepare_finalize.exchange import Exchange
from pymoe.quantization import FusedMoEQuantConfig

Array = Any


class AllGatherMonolithicPrepareAndFinalize(FusedMoEPrepareAndFinalizeMonolithic):
    """Gather tokens with their logits on every rank; sum what the ranks' experts make of them, in rank order.

    The experts' own rounding to the hidden dtype comes before the sum over ranks, and one more after it.

    Parameters
    ----------
    ranks : Ranks
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._pair = type(self).__name__
        self._exchange: Exchange | None = None

    def post_init_setup(self, fused_experts: FusedMoEExperts) -> None:
        self._pair = f"{type(self).__name__} with {type(fused_experts).__name__}"
        check_placement(type(self).__name__, self.ranks, fused_experts)

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

    def guard(self, call: str) -> contextlib.AbstractContextManager[None]:
        return self.ranks.group.guard(call)

    def prepare(
        self,
        a1: Array,
        router_logits: Array,
        quant_config: FusedMoEQuantConfig,
        defer_input_quant: bool = False,
    ) -> PrepareMonolithicResult:
        call = f"{type(self).__name__}.prepare"
        plan = plan_all(len(a1), self.ranks.size)
        sent = quantize_to_send(a1, quant_config, defer_input_quant)
        parts = [sent.rows, to_host(router_logits)] + ([] if sent.row_scale is None else [to_host(sent.row_scale)])
        payloads = [Payload(as_bytes(part), plan.token) for part in parts]
        exchange = Exchange(self.ranks, plan, plan.counts, payloads, 4 * a1.shape[1])
        values = {"num_experts": router_logits.shape[1], "K": a1.shape[1], "scales": len(parts)}
        dtypes = f"{sent.rows.dtype.name} {router_logits.dtype.name}"
        exchange.announce(call, len(a1), values, {"pair": self._pair, "dtype": dtypes})
        self._exchange = exchange
        exchange.send()
        raw = exchange.receive()
        rows, *others = (from_bytes(received, part.dtype) for received, part in zip(raw, parts, strict=True))
        logits, *scales = (beside(rows, part) for part in others)
        scale = scales[0] if scales else sent.shared_scale
        if sent.late:
            rows, scale = quantize_activations(rows, quant_config, "a1")
        return PrepareMonolithicResult(rows, scale, logits)

    def finalize(self, fused_expert_output: Array) -> Array:
        exchange, self._exchange = self._exchange, None
        assert exchange is not None
        exchange.give_back(fused_expert_output.astype(np.float32))
        rows = from_bytes(exchange.collect(), np.float32)
        places = exchange.row_of_token
        output = namespace(rows).empty((len(places), fused_expert_output.shape[1]), fused_expert_output.dtype)
        sum_rows(rows, places, output)
        return output
