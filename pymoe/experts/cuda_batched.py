"""The GPU's experts in the batched format: slabs of rows, of which a count on the device says how many are valid."""

from __future__ import annotations

from typing import Any

import numpy as np

from pymoe.activations import ActivationConfig
from pymoe.contracts import ExpertTokensMetadata, FusedMoEActivationFormat, FusedMoEExpertsModular, TopKWeightAndReduce
from pymoe.contracts.experts import Activation
from pymoe.device.arena import Arenas, padded
from pymoe.errors import ArgumentError, complaint
from pymoe.experts.cuda_weights import CudaAbilities, WeightsCache, intermediate_bytes
from pymoe.weight_and_reduce import TopKWeightAndReduceDelegate

__all__ = ["CudaBatchedExperts"]

Array = Any

_TILE_ROWS = 64
"""Slabs are for few tokens an expert; how many, only the device knows."""


class CudaBatchedExperts(CudaAbilities, FusedMoEExpertsModular):
    """Experts on slabs (E_local, rows, K) of which the first ``expert_num_tokens[e]`` rows are valid.

    Routed rows leave in float32, unweighed and unsummed; finalize sums them in slot order.  Rows that are not valid
    reach no result and are not written.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._weights = WeightsCache()
        self._arenas = Arenas()

    @staticmethod
    def activation_format() -> FusedMoEActivationFormat:
        return FusedMoEActivationFormat.BatchedExperts

    def supports_chunking(self) -> bool:
        return False

    def workspace_dtype(self, act_dtype: Any) -> Any:
        return "uint8"

    def routed_dtype(self, out_dtype: Any) -> Any:
        return "float32"

    def workspace_shapes(
        self,
        M: int,
        N: int,
        K: int,
        topk: int,
        global_num_experts: int,
        local_num_experts: int,
        expert_tokens_meta: ExpertTokensMetadata | None,
        activation: Activation | ActivationConfig,
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Workspace2 holds everything, in bytes; workspace13 may share its memory with the output."""
        assert self.max_num_tokens is not None and self.num_dispatchers is not None
        slab_rows = self.max_num_tokens * self.num_dispatchers
        rows, width = local_num_experts * slab_rows, self.adjust_N_for_activation(N, activation)
        tiles = padded((local_num_experts * -(-slab_rows // _TILE_ROWS), 4), np.int32) + padded((1,), np.int32)
        intermediate = intermediate_bytes(rows, width, self.quant_config, self.moe_config.in_dtype)
        return (0,), (intermediate + tiles,), (local_num_experts, slab_rows, K)

    def finalize_weight_and_reduce_impl(self) -> TopKWeightAndReduce:
        return TopKWeightAndReduceDelegate()

    def apply(
        self,
        output: Array,
        hidden_states: Array,
        w1: Array,
        w2: Array,
        topk_weights: Array,
        topk_ids: Array,
        activation: Activation | ActivationConfig,
        global_num_experts: int,
        expert_map: Array | None,
        a1q_scale: Array | None,
        a2_scale: Array | None,
        workspace13: Array,
        workspace2: Array,
        expert_tokens_meta: ExpertTokensMetadata | None,
        apply_router_weight_on_input: bool,
    ) -> None:
        from pymoe.ops.grouped_gemm._cuda import TileList
        from pymoe.ops.permute import _cuda as sort

        if expert_tokens_meta is None:
            rule = "be given: it says which rows are valid"
            raise ArgumentError(complaint("CudaBatchedExperts.apply", "expert_tokens_meta", rule, None))
        E_local, slab_rows = hidden_states.shape[:2]
        if not E_local:
            return
        arena = self._arenas.of(workspace2)
        tiles = sort.work_list(expert_tokens_meta.expert_num_tokens, slab_rows, _TILE_ROWS, empty=arena.empty)
        if a1q_scale is not None and a1q_scale.ndim == 3:
            a1q_scale = a1q_scale.reshape(E_local * slab_rows, -1)
        weights = self._weights.of(w1, w2, activation, self.quant_config, self.moe_config.in_dtype)
        weights.routed_rows(
            hidden_states.reshape(E_local * slab_rows, -1),
            a1q_scale,
            TileList(*tiles, _TILE_ROWS),
            output.reshape(E_local * slab_rows, -1),
            live_rows=expert_tokens_meta.expert_num_tokens,
            empty=arena.empty,
        )
