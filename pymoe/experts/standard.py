"""What the CPU's experts in the standard format share; they differ in the backend of the ops."""

from __future__ import annotations

from typing import Any

from pymoe.activations import ActivationConfig
from pymoe.contracts import ExpertTokensMetadata, FusedMoEActivationFormat, FusedMoEExpertsModular, TopKWeightAndReduce
from pymoe.contracts.experts import Activation
from pymoe.experts.abilities import CpuAbilities
from pymoe.experts.routed import ExpertWeights
from pymoe.ops.permute import permute
from pymoe.ops.unpermute import unpermute
from pymoe.weight_and_reduce import TopKWeightAndReduceNoOP

Array = Any


class StandardExperts(CpuAbilities, FusedMoEExpertsModular):
    """Permute, GEMM1, activation, GEMM2, unpermute; every pair of schemes, activation and shape.

    Routed rows stay in float32 until they are weighed and summed, so that nothing is left to finalize.
    """

    _backend: str | None

    @staticmethod
    def activation_format() -> FusedMoEActivationFormat:
        return FusedMoEActivationFormat.Standard

    def supports_chunking(self) -> bool:
        # One scale over all rows of the intermediate would become one scale a chunk.
        return not self.quant_config.is_dynamic_per_tensor

    def workspace_dtype(self, act_dtype: Any) -> Any:
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
        """Workspace13 holds the intermediate, workspace2 the output of GEMM1 and then of GEMM2."""
        return (M, topk, self.adjust_N_for_activation(N, activation)), (M, topk, max(N, K)), (M, K)

    def finalize_weight_and_reduce_impl(self) -> TopKWeightAndReduce:
        return TopKWeightAndReduceNoOP()

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
        weights = ExpertWeights.of(w1, w2, activation, self.quant_config, self.moe_config.in_dtype, self._backend)
        row_map = permute(topk_ids, w1.shape[0], expert_map=expert_map, backend=self._backend)
        rows = weights.routed_rows(
            hidden_states,
            a1q_scale,
            row_map.expert_offsets,
            row_map.row_to_token,
            a2_scale=a2_scale,
            up=workspace2.reshape(-1),
            h=workspace13.reshape(-1),
        )
        unpermute(
            rows,
            row_map,
            topk_weights=None if apply_router_weight_on_input else topk_weights,
            out=output,
            backend=self._backend,
        )
