"""Prepare/finalize in the batched format on one GPU: slabs and their counts are made without a look at the device."""

from __future__ import annotations

from typing import Any

import numpy as np

from pymoe.contracts import ExpertTokensMetadata, PrepareResult, TopKWeightAndReduce
from pymoe.device.arrays import namespace
from pymoe.errors import ArgumentError, UnsupportedError, complaint
from pymoe.ops.permute.live import live_tokens
from pymoe.ops.quantize import quantize_activations
from pymoe.prepare_finalize.batched import BatchedPrepareAndFinalize
from pymoe.quantization import FusedMoEQuantConfig
from pymoe.tokens import local_ids, weigh_input
from pymoe.weight_and_reduce import TopKWeightAndReduceDelegate

__all__ = ["CudaBatchedPrepareAndFinalize"]

Array = Any

_TILE_ROWS = 64
"""Of the work list that the sort makes on the way; experts make their own."""


class CudaBatchedPrepareAndFinalize(BatchedPrepareAndFinalize):
    """`BatchedPrepareAndFinalize` for CuPy arrays; rows of a slab that are not valid are not written."""

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
        from pymoe.ops.permute import _cuda as sort

        call = "CudaBatchedPrepareAndFinalize.prepare"
        if defer_input_quant:
            raise UnsupportedError(complaint(call, "defer_input_quant", "be False: rows are quantized here", True))
        if a1.shape[0] > self._max_num_tokens:
            rule = f"have at most max_num_tokens = {self._max_num_tokens} rows"
            raise ArgumentError(complaint(call, "a1", rule, a1.shape[0]))
        a1 = weigh_input(call, a1, topk_weights, apply_router_weight_on_input)
        ids = self._local(topk_ids, num_experts, expert_map)
        scale = None
        if quant_config.quant_dtype is not None:
            live = live_tokens(ids, self._num_local_experts, None) if quant_config.is_dynamic_per_tensor else None
            a1, scale = quantize_activations(a1, quant_config, "a1", live=live)
        slab_map = sort.permute_slabs(ids, self._num_local_experts, None, self._slab_rows, _TILE_ROWS)
        rows = self._slab_of(a1, slab_map.slot_to_row)
        if scale is not None and scale.ndim == 2:
            scale = self._slab_of(scale, slab_map.slot_to_row)
        return PrepareResult(rows, scale, ExpertTokensMetadata(slab_map.expert_num_tokens), ids, None)

    @property
    def _slab_rows(self) -> int:
        return self._max_num_tokens * self._num_dispatchers

    def _local(self, topk_ids: Array, num_experts: int, expert_map: Array | None) -> Array:
        """Return ids in 0..E_local-1, or others for slots that nobody here serves."""
        if expert_map is not None:
            return local_ids(topk_ids, num_experts, expert_map).astype(np.int32)
        if self._rank == 0:
            return topk_ids
        first = self._rank * self._num_local_experts
        local = local_ids(topk_ids, num_experts, None).astype(np.int64) - first
        return namespace(local).maximum(local, -1).astype(np.int32)

    def _slab_of(self, rows: Array, slot_to_row: Array) -> Array:
        from pymoe.ops.permute import _cuda as sort

        slabs = namespace(rows).empty((self._num_local_experts, self._slab_rows, rows.shape[1]), rows.dtype)
        sort.scatter_rows(rows, slot_to_row, slabs.reshape(-1, rows.shape[1]))
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
        """Sum the rows of each token; `topk_ids` are those that `prepare` put in force."""
        from pymoe.ops.permute import _cuda as sort
        from pymoe.ops.unpermute import _cuda as gather

        if not isinstance(weight_and_reduce_impl, TopKWeightAndReduceDelegate):
            weight_and_reduce_impl.apply(
                output, fused_expert_output, topk_weights, topk_ids, apply_router_weight_on_input
            )
            return
        slab_map = sort.permute_slabs(topk_ids, self._num_local_experts, None, self._slab_rows, _TILE_ROWS)
        rows = fused_expert_output.reshape(-1, fused_expert_output.shape[2])
        weights = None if apply_router_weight_on_input else topk_weights
        target = output if output.flags.c_contiguous else namespace(output).empty(output.shape, output.dtype)
        gather.unpermute(rows, slab_map.slot_to_row, weights, target)
        if target is not output:
            output[...] = target
