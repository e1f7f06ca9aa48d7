"""The kernel for experts that take router logits."""

from __future__ import annotations

from typing import Any

from pymoe.contracts import FusedMoEExpertsMonolithic, FusedMoEPrepareAndFinalizeMonolithic
from pymoe.kernel.stages import note_stage

Array = Any


class FusedMoEKernelMonolithicImpl:
    """The kernel for experts that take router logits: no workspaces, chunks or shared experts."""

    def __init__(
        self, prepare_finalize: FusedMoEPrepareAndFinalizeMonolithic, fused_experts: FusedMoEExpertsMonolithic
    ) -> None:
        self.prepare_finalize = prepare_finalize
        self.fused_experts = fused_experts

    def apply(
        self,
        hidden_states: Array,
        w1: Array,
        w2: Array,
        router_logits: Array,
        activation: Any,
        global_num_experts: int,
        expert_map: Array | None,
        apply_router_weight_on_input: bool,
        num_expert_group: int | None = None,
        e_score_correction_bias: Array | None = None,
        routed_scaling_factor: float | None = None,
        topk_group: int | None = None,
    ) -> Array:
        """Run the layer from router logits; None leaves a routing parameter as `moe_config.routing` has it."""
        with note_stage("prepare", self):
            a1q, a1q_scale, router_logits = self.prepare_finalize.prepare(
                hidden_states,
                router_logits,
                self.fused_experts.quant_config,
                self.fused_experts.expects_unquantized_inputs,
            )
        with note_stage("experts", self):
            fused_out = self.fused_experts.apply(
                a1q, w1, w2, router_logits, activation, global_num_experts, expert_map, a1q_scale,
                apply_router_weight_on_input, num_expert_group, e_score_correction_bias, routed_scaling_factor,
                topk_group,
            )  # fmt: skip
        with note_stage("finalize", self):
            return self.prepare_finalize.finalize(fused_out)
