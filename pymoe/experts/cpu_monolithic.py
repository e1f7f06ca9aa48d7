"""Experts that route themselves, on the CPU."""

from __future__ import annotations

from typing import Any

from pymoe.activations import ActivationConfig
from pymoe.contracts.experts import Activation
from pymoe.experts.abilities import CpuAbilities
from pymoe.experts.monolithic import RoutingExperts
from pymoe.experts.routed import ExpertWeights
from pymoe.ops.permute import permute
from pymoe.ops.unpermute import unpermute

Array = Any


class CpuMonolithicExperts(CpuAbilities, RoutingExperts):
    """Route, then the stages of `CpuExperts`, bit for bit."""

    def _run(
        self,
        hidden_states: Array,
        a1: Array,
        a1q_scale: Array | None,
        w1: Array,
        w2: Array,
        activation: Activation | ActivationConfig,
        routed: tuple[Array, Array | None],
        expert_map: Array | None,
    ) -> Array:
        topk_ids, topk_weights = routed
        row_map = permute(topk_ids, w1.shape[0], expert_map=expert_map)
        weights = ExpertWeights.of(w1, w2, activation, self.quant_config, hidden_states.dtype)
        rows = weights.routed_rows(
            a1, a1q_scale, row_map.expert_offsets, row_map.row_to_token, a2_scale=self.quant_config.a2.scale
        )
        return unpermute(rows, row_map, topk_weights=topk_weights, out_dtype=hidden_states.dtype)
