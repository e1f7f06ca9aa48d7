"""What experts that route themselves share: the contract's answers, the router, and quantization of the input."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any

import numpy as np

from pymoe.activations import ActivationConfig
from pymoe.config import FusedMoEConfig, FusedMoEParallelConfig, RoutingConfig, RoutingMethodType
from pymoe.contracts import FusedMoEActivationFormat, FusedMoEExpertsMonolithic
from pymoe.contracts.experts import Activation
from pymoe.errors import ArgumentError, complaint
from pymoe.ops.permute.live import live_tokens
from pymoe.ops.quantize import quantize_activations
from pymoe.ops.route import route
from pymoe.quantization import FusedMoEQuantConfig, QuantKey
from pymoe.tokens import weigh_input

Array = Any

# Custom routing functions and simulated routing stay with the caller: they are not a function of the logits.
_METHODS = frozenset(RoutingMethodType) - {RoutingMethodType.Custom, RoutingMethodType.Simulated}
_LOGITS_DTYPES = (None, "float32", "float16", "bfloat16")


class RoutingExperts(FusedMoEExpertsMonolithic):
    """Route, then the stages of the modular experts, bit for bit; quantizes its input once it knows who is routed.

    Parameters
    ----------
    moe_config : FusedMoEConfig
        Its `routing` says topk and method, and must be given.
    quant_config : FusedMoEQuantConfig
    """

    def __init__(self, moe_config: FusedMoEConfig, quant_config: FusedMoEQuantConfig, *args: Any) -> None:
        super().__init__(moe_config, quant_config, *args)
        if moe_config.routing is None:
            rule = "be given: topk and method come from it"
            raise ArgumentError(complaint(type(self).__name__, "moe_config.routing", rule, None))

    @property
    def expects_unquantized_inputs(self) -> bool:
        return True

    @staticmethod
    def activation_format() -> FusedMoEActivationFormat:
        return FusedMoEActivationFormat.Standard

    def supports_chunking(self) -> bool:
        return False

    @staticmethod
    def _supports_parallel_config(moe_parallel_config: FusedMoEParallelConfig) -> bool:
        # Routing needs a token's logits where its experts are: all tokens go everywhere, or none travels.
        gathers = moe_parallel_config.all2all_backend == "allgather_reducescatter"
        return gathers or not moe_parallel_config.use_all2all_kernels

    @staticmethod
    def _supports_routing_method(
        routing_method: RoutingMethodType, weight_key: QuantKey | None, activation_key: QuantKey | None
    ) -> bool:
        return routing_method in _METHODS

    @staticmethod
    def _supports_router_logits_dtype(router_logits_dtype: Any, routing_method: RoutingMethodType) -> bool:
        return router_logits_dtype is None or np.dtype(router_logits_dtype).name in _LOGITS_DTYPES

    def apply(
        self,
        hidden_states: Array,
        w1: Array,
        w2: Array,
        router_logits: Array,
        activation: Activation | ActivationConfig,
        global_num_experts: int,
        expert_map: Array | None,
        a1q_scale: Array | None,
        apply_router_weight_on_input: bool,
        num_expert_group: int | None = None,
        e_score_correction_bias: Array | None = None,
        routed_scaling_factor: float | None = None,
        topk_group: int | None = None,
    ) -> Array:
        routing = self._routing(num_expert_group, e_score_correction_bias, routed_scaling_factor, topk_group)
        topk_weights, topk_ids = route(router_logits, routing, hidden_states=hidden_states)
        a1 = weigh_input(f"{type(self).__name__}.apply", hidden_states, topk_weights, apply_router_weight_on_input)
        if self.quant_config.quant_dtype is not None:
            live = (
                live_tokens(topk_ids, global_num_experts, expert_map)
                if self.quant_config.is_dynamic_per_tensor
                else None
            )
            a1, a1q_scale = quantize_activations(a1, self.quant_config, "a1", live=live)
        weights = None if apply_router_weight_on_input else topk_weights
        return self._run(hidden_states, a1, a1q_scale, w1, w2, activation, (topk_ids, weights), expert_map)

    @abc.abstractmethod
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
        """Return (M, K) in the dtype of `hidden_states` from the prepared tokens `a1`; `routed` is (ids, weights)."""

    def _routing(
        self,
        num_expert_group: int | None,
        e_score_correction_bias: Array | None,
        routed_scaling_factor: float | None,
        topk_group: int | None,
    ) -> RoutingConfig:
        """Return the layer's routing with the call's parameters in place of its own."""
        given: dict[str, Any] = {
            "num_expert_group": num_expert_group,
            "e_score_correction_bias": e_score_correction_bias,
            "routed_scaling_factor": routed_scaling_factor,
            "topk_group": topk_group,
        }
        given = {name: value for name, value in given.items() if value is not None}
        routing = self.moe_config.routing
        assert routing is not None
        return dataclasses.replace(routing, **given) if given else routing
