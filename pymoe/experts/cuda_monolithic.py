"""Experts that route themselves, on a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np

from pymoe.activations import ActivationConfig
from pymoe.contracts.experts import Activation
from pymoe.device.arena import Arenas
from pymoe.device.arrays import namespace
from pymoe.device.workspace import Workspaces, plan_workspace
from pymoe.experts.cuda_grouped import Routing, grouped_experts, row_bytes
from pymoe.experts.cuda_weights import CudaAbilities, WeightsCache, intermediate_bytes
from pymoe.experts.monolithic import RoutingExperts

__all__ = ["CudaMonolithicExperts"]

Array = Any


class CudaMonolithicExperts(CudaAbilities, RoutingExperts):
    """Route, then the stages of `CudaGroupedExperts`, bit for bit."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._weights = WeightsCache()
        self._arenas = Arenas()
        self._workspaces = Workspaces()

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
        output = namespace(hidden_states).empty(hidden_states.shape, hidden_states.dtype)
        weights = self._weights.of(w1, w2, activation, self.quant_config, hidden_states.dtype)
        num_experts = w1.shape[0] if expert_map is None else expert_map.shape[0]
        M, topk = routed[0].shape
        if M == 0:
            return output
        width = weights.activation.width(w1.shape[1])
        rows = row_bytes(M, w2.shape[1], topk, w1.shape[0], num_experts, self.moe_config)
        with self._workspaces.current() as workspace:
            arrays = workspace.arrays(
                plan_workspace(
                    ("rows", (rows,), np.dtype("uint8")),
                    (
                        "intermediate",
                        (intermediate_bytes(M * topk, width, self.quant_config, hidden_states.dtype),),
                        np.dtype("uint8"),
                    ),
                )
            )
            arenas = self._arenas.of(arrays["intermediate"]), self._arenas.of(arrays["rows"])
            routing = Routing(*routed, expert_map, num_experts)
            grouped_experts(weights, a1, a1q_scale, routing, output, self.moe_config, arenas)
        return output
