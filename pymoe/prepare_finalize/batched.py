"""The batched format without communication: the reference for dispatchers that group rows by expert."""

from __future__ import annotations

from typing import Any

import numpy as np

from pymoe.contracts import (
    ExpertTokensMetadata,
    FusedMoEActivationFormat,
    FusedMoEPrepareAndFinalizeModular,
    PrepareResult,
    TopKWeightAndReduce,
)
from pymoe.errors import ArgumentError, UnsupportedError, complaint
from pymoe.ops.quantize import quantize_activations
from pymoe.quantization import FusedMoEQuantConfig
from pymoe.tokens import local_ids, weigh_input
from pymoe.weight_and_reduce import TopKWeightAndReduceDelegate, TopKWeightAndReduceNaiveBatched

Array = Any


class BatchedPrepareAndFinalize(FusedMoEPrepareAndFinalizeModular):
    """Group the rows of this process's tokens by expert, in token order; unused rows are zero.

    Parameters
    ----------
    max_num_tokens : int
        Most tokens of a call.
    num_local_experts : int
        Experts here, E_local; without an expert map they are ``rank * E_local`` onwards.
    num_dispatchers : int
        Ranks that the slabs have room for; this reference fills those of one.
    rank : int
        This process's place.
    """

    def __init__(self, max_num_tokens: int, num_local_experts: int, num_dispatchers: int = 1, rank: int = 0) -> None:
        for name, value, least in (
            ("max_num_tokens", max_num_tokens, 1),
            ("num_local_experts", num_local_experts, 0),
            ("num_dispatchers", num_dispatchers, 1),
            ("rank", rank, 0),
        ):
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
                rule = f"be an integer of at least {least}"
                raise ArgumentError(complaint("BatchedPrepareAndFinalize", name, rule, repr(value)))
        self._max_num_tokens = int(max_num_tokens)
        self._num_local_experts = int(num_local_experts)
        self._num_dispatchers = int(num_dispatchers)
        self._rank = int(rank)

    @property
    def activation_format(self) -> FusedMoEActivationFormat:
        return FusedMoEActivationFormat.BatchedExperts

    def topk_indices_dtype(self) -> Any:
        return None

    def max_num_tokens_per_rank(self) -> int | None:
        return self._max_num_tokens

    def num_dispatchers(self) -> int:
        return self._num_dispatchers

    def output_is_reduced(self) -> bool:
        return False

    def prepare(
        self,
        a1: Array,
        topk_weights: Array,
        topk_ids: Array,
        num_experts: int,
        expert_map: Array | None,
        apply_router_weight_on_input: bool,
        quant_config: FusedMoEQuantConfig,
        defer_input_quant: bool = False,
    ) -> PrepareResult:
        call = "BatchedPrepareAndFinalize.prepare"
        if defer_input_quant:
            raise UnsupportedError(complaint(call, "defer_input_quant", "be False: rows are quantized here", True))
        if a1.shape[0] > self._max_num_tokens:
            rule = f"have at most max_num_tokens = {self._max_num_tokens} rows"
            raise ArgumentError(complaint(call, "a1", rule, a1.shape[0]))
        a1 = weigh_input(call, a1, topk_weights, apply_router_weight_on_input)
        first = self._rank * self._num_local_experts
        if expert_map is None:
            local = np.where(topk_ids < num_experts, topk_ids.astype(np.int64) - first, -1)
        else:
            local = local_ids(topk_ids, num_experts, expert_map).astype(np.int64)
        local = np.where((local >= 0) & (local < self._num_local_experts), local, -1)
        a1q, scale = a1, None
        if quant_config.quant_dtype is not None:
            a1q, scale = quantize_activations(a1, quant_config, "a1", live=(local >= 0).any(axis=1))
        tokens = [np.flatnonzero((local == e).any(axis=1)) for e in range(self._num_local_experts)]
        rows = self._slabs(a1q, tokens)
        per_row = scale is not None and scale.ndim == 2 and scale.shape[0] == a1.shape[0] and scale.size != 1
        scales = self._slabs(scale, tokens) if per_row else scale
        meta = ExpertTokensMetadata.make_from_list([len(t) for t in tokens])
        # With a map the ids in force from here on are linear in the local expert, which is what finalize assumes.
        ids = None if expert_map is None else np.where(local >= 0, local + first, -1).astype(np.int32)
        return PrepareResult(rows, scales, meta, ids, None)

    def _slabs(self, rows: Array, tokens: list[Array]) -> Array:
        """Return zero-filled slabs (E_local, capacity, columns) with each expert's rows at the front of its own."""
        capacity = self._max_num_tokens * self._num_dispatchers
        slabs = np.zeros((self._num_local_experts, capacity, rows.shape[1]), rows.dtype)
        for slab, mine in zip(slabs, tokens, strict=True):
            slab[: len(mine)] = rows[mine]
        return slabs

    def finalize(
        self,
        output: Array,
        fused_expert_output: Array,
        topk_weights: Array,
        topk_ids: Array,
        apply_router_weight_on_input: bool,
        weight_and_reduce_impl: TopKWeightAndReduce,
    ) -> None:
        if isinstance(weight_and_reduce_impl, TopKWeightAndReduceDelegate):
            weight_and_reduce_impl = TopKWeightAndReduceNaiveBatched(self._rank)
        weight_and_reduce_impl.apply(output, fused_expert_output, topk_weights, topk_ids, apply_router_weight_on_input)
