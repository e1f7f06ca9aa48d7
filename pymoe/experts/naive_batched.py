"""The reference for experts in the batched format: rows already grouped by expert, one slab an expert."""

from __future__ import annotations

from typing import Any

import numpy as np

from pymoe.activations import ActivationConfig
from pymoe.contracts import ExpertTokensMetadata, FusedMoEActivationFormat, FusedMoEExpertsModular, TopKWeightAndReduce
from pymoe.contracts.experts import Activation
from pymoe.errors import ArgumentError, complaint
from pymoe.experts.abilities import CpuAbilities
from pymoe.experts.routed import ExpertWeights
from pymoe.weight_and_reduce import TopKWeightAndReduceDelegate

Array = Any


class NaiveBatchedExperts(CpuAbilities, FusedMoEExpertsModular):
    """Experts on slabs (E_local, rows, K) of which the first ``expert_num_tokens[e]`` rows are valid.

    Routed rows leave in float32, unweighed and unsummed; finalize sums them in slot order.  Unused rows are 0.  An
    expert map has done its work in prepare: rows arrive grouped by local expert.
    """

    @staticmethod
    def activation_format() -> FusedMoEActivationFormat:
        return FusedMoEActivationFormat.BatchedExperts

    def supports_chunking(self) -> bool:
        return False

    def workspace_dtype(self, act_dtype: Any) -> Any:
        return "float32"

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
        """The slabs have room for all dispatchers' rows, whatever M is."""
        assert self.max_num_tokens is not None and self.num_dispatchers is not None
        rows = self.max_num_tokens * self.num_dispatchers
        slabs = (local_num_experts, rows)
        return (*slabs, self.adjust_N_for_activation(N, activation)), (*slabs, max(N, K)), (*slabs, K)

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
        if expert_tokens_meta is None:
            rule = "be given: it says which rows are valid"
            raise ArgumentError(complaint("NaiveBatchedExperts.apply", "expert_tokens_meta", rule, None))
        E_local, capacity = hidden_states.shape[:2]
        counts = expert_tokens_meta.expert_num_tokens.astype(np.int64)
        offsets = np.concatenate([[0], np.cumsum(counts)])
        slab_rows = np.concatenate(
            [np.arange(n, dtype=np.int64) + e * capacity for e, n in enumerate(counts)] or [np.empty(0, np.int64)]
        )
        if a1q_scale is not None and a1q_scale.ndim == 3:
            a1q_scale = a1q_scale.reshape(E_local * capacity, a1q_scale.shape[2])
        weights = ExpertWeights.of(w1, w2, activation, self.quant_config, self.moe_config.in_dtype)
        rows = weights.routed_rows(
            hidden_states.reshape(E_local * capacity, hidden_states.shape[2]),
            a1q_scale,
            offsets,
            slab_rows,
            a2_scale=a2_scale,
            up=workspace2.reshape(-1),
            h=workspace13.reshape(-1),
        )
        output[...] = 0
        output.reshape(E_local * capacity, output.shape[2])[slab_rows] = rows
