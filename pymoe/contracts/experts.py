"""The experts' side of the contract: permute, GEMM1, activation, GEMM2, unpermute."""

from __future__ import annotations

import abc
from typing import Any

import numpy as np

from pymoe.activations import ActivationConfig, MoEActivation, RegisteredActivation
from pymoe.config import FusedMoEConfig, FusedMoEParallelConfig, RoutingMethodType
from pymoe.contracts.results import ExpertTokensMetadata, FusedMoEActivationFormat
from pymoe.contracts.weight_and_reduce import TopKWeightAndReduce
from pymoe.errors import ArgumentError, ShapeError, complaint
from pymoe.quantization import FusedMoEQuantConfig, QuantKey, kTf32

Array = Any
Activation = MoEActivation | RegisteredActivation


class FusedMoEExperts(abc.ABC):
    """Common part of modular and monolithic experts.

    Parameters
    ----------
    moe_config : FusedMoEConfig
        Sizes of the layer.
    quant_config : FusedMoEQuantConfig
        Scheme and scales.
    max_num_tokens, num_dispatchers : int, optional
        Both required by the batched format, both forbidden in the standard one.
    """

    def __init__(
        self,
        moe_config: FusedMoEConfig,
        quant_config: FusedMoEQuantConfig,
        max_num_tokens: int | None = None,
        num_dispatchers: int | None = None,
    ) -> None:
        batched = self.activation_format() is FusedMoEActivationFormat.BatchedExperts
        for name, value in (("max_num_tokens", max_num_tokens), ("num_dispatchers", num_dispatchers)):
            rule = "be at least 1 for batched experts" if batched else "be None for standard experts"
            if (value is None) == batched or (value is not None and value < 1):
                raise ArgumentError(complaint(type(self).__name__, name, rule, value))
        self.moe_config = moe_config
        self.quant_config = quant_config
        self.max_num_tokens = max_num_tokens
        self.num_dispatchers = num_dispatchers

    @property
    def expects_unquantized_inputs(self) -> bool:
        """Whether prepare leaves quantization of the input to these experts."""
        return False

    @staticmethod
    def is_monolithic() -> bool:
        """Whether `apply` takes router logits."""
        return False

    @staticmethod
    @abc.abstractmethod
    def activation_format() -> FusedMoEActivationFormat:
        """Format of the activations that `apply` takes."""

    @abc.abstractmethod
    def supports_chunking(self) -> bool:
        """Whether tokens may be processed in several calls of `apply`."""

    @abc.abstractmethod
    def supports_expert_map(self) -> bool:
        """Whether `apply` takes an expert map."""

    @staticmethod
    @abc.abstractmethod
    def _supports_current_device() -> bool:
        """Whether the device of this process can run these experts."""

    @staticmethod
    @abc.abstractmethod
    def _supports_no_act_and_mul() -> bool:
        """Whether non-gated activations are supported."""

    @staticmethod
    @abc.abstractmethod
    def _supports_activation(activation: Activation) -> bool:
        """Whether `activation` is supported."""

    @staticmethod
    @abc.abstractmethod
    def _supports_quant_scheme(weight_key: QuantKey | None, activation_key: QuantKey | None) -> bool:
        """Whether weights under `weight_key` can be multiplied with activations under `activation_key`."""

    @staticmethod
    @abc.abstractmethod
    def _supports_parallel_config(moe_parallel_config: FusedMoEParallelConfig) -> bool:
        """Whether this layout of ranks is supported."""

    @staticmethod
    def _supports_routing_method(
        routing_method: RoutingMethodType, weight_key: QuantKey | None, activation_key: QuantKey | None
    ) -> bool:
        """Whether the router's method is supported; experts that do not route support all."""
        return True

    @staticmethod
    def _supports_router_logits_dtype(router_logits_dtype: Any, routing_method: RoutingMethodType) -> bool:
        """Whether logits of this dtype are supported; experts that do not route support all."""
        return True

    @staticmethod
    def _supports_shape(hidden_dim: int) -> bool:
        """Whether this K is supported."""
        return True

    @classmethod
    def is_supported_config(
        cls,
        moe_config: FusedMoEConfig,
        weight_key: QuantKey | None,
        activation_key: QuantKey | None,
        activation_format: FusedMoEActivationFormat,
    ) -> tuple[bool, str | None]:
        """Ask every predicate in the contract's order; return (True, None) or (False, the first reason)."""
        method = moe_config.routing_method
        activation = moe_config.activation.activation
        assert isinstance(activation, MoEActivation | RegisteredActivation)
        logits_dtype = moe_config.router_logits_dtype
        parallel = moe_config.moe_parallel_config
        keys = tuple(None if key is None else key.name for key in (weight_key, activation_key))
        questions = (
            (lambda: cls._supports_current_device(), "the current device"),
            (lambda: moe_config.is_act_and_mul or cls._supports_no_act_and_mul(), "non-gated activations"),
            (lambda: cls._supports_activation(activation), f"activation {activation.value}"),
            (lambda: cls._supports_quant_scheme(weight_key, activation_key), f"quant scheme {keys[0]} x {keys[1]}"),
            (
                lambda: weight_key != kTf32 or moe_config.in_dtype == np.float32,
                f"quant scheme kTf32 with tokens of dtype {moe_config.in_dtype}",
            ),
            (lambda: cls._supports_parallel_config(parallel), f"parallel config {parallel}"),
            (lambda: cls._supports_routing_method(method, weight_key, activation_key), f"routing method {method.name}"),
            (
                lambda: cls._supports_router_logits_dtype(logits_dtype, method),
                f"router logits of dtype {logits_dtype} with routing method {method.name}",
            ),
            (lambda: cls._supports_shape(moe_config.hidden_dim), f"hidden dimension {moe_config.hidden_dim}"),
            (lambda: cls.activation_format() is activation_format, f"activation format {activation_format.name}"),
        )
        for supported, subject in questions:
            if not supported():
                return False, f"kernel does not support {subject}"
        return True, None


class FusedMoEExpertsModular(FusedMoEExperts):
    """Experts that take ids and weights: permute, GEMM1, activation, GEMM2, unpermute."""

    def enable_chunking(self) -> bool:
        """Whether chunking is in force."""
        return self.supports_chunking()

    def moe_problem_size(self, a1: Array, w1: Array, w2: Array, topk_ids: Array) -> tuple[int, int, int, int, int]:
        """Return (E_local, M, N, K, topk).

        K is the number of rows of w2, the one extent that neither packed weights nor packed activations halve.  M is
        the number of tokens, or the rows of one expert's slab in the batched format.
        """
        call = f"{type(self).__name__}.moe_problem_size"
        if w1.ndim != 3 or w2.ndim != 3:
            raise ShapeError(complaint(call, "w1 and w2", "have 3 axes", (w1.shape, w2.shape)))
        E_local, N = w1.shape[:2]
        K = w2.shape[1]
        if a1.ndim == 2:
            if topk_ids.shape[0] != a1.shape[0]:
                raise ShapeError(complaint(call, "topk_ids", f"have {a1.shape[0]} rows like a1", topk_ids.shape))
            M = a1.shape[0]
        elif a1.ndim == 3 and a1.shape[0] == E_local:
            M = a1.shape[1]
        else:
            raise ShapeError(complaint(call, "a1", f"be (M, K) or ({E_local}, M, K)", a1.shape))
        return E_local, M, N, K, topk_ids.shape[1]

    def workspace_dtype(self, act_dtype: Any) -> Any:
        """Element type in which `workspace_shapes` counts workspaces 13 and 2."""
        return act_dtype

    def routed_dtype(self, out_dtype: Any) -> Any:
        """Element type of the output of `apply`; differs from `out_dtype` where unreduced rows need more bits."""
        return out_dtype

    @abc.abstractmethod
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
        """Return the shapes of workspace13, workspace2 and the output for a chunk of M tokens.

        A shape may be ``(0,)``; metadata None asks for the worst case.  For chunking the first extent of workspaces
        is M.
        """

    @staticmethod
    def adjust_N_for_activation(N: int, activation: Activation | ActivationConfig) -> int:
        """Return I, the width after the activation: N // 2 when gated, N otherwise."""
        return N // 2 if activation.is_gated else N

    @abc.abstractmethod
    def finalize_weight_and_reduce_impl(self) -> TopKWeightAndReduce:
        """Say what is left to do to the output of `apply`."""

    @abc.abstractmethod
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
        """Write `output` from `hidden_states` (quantized by prepare unless `expects_unquantized_inputs`).

        `workspace13` and `output` may share memory: nothing needed may live in workspace13 when `output` is written.
        Workspaces are uninitialised.
        """


class FusedMoEExpertsMonolithic(FusedMoEExperts):
    """Experts that take router logits and route themselves; they opt in to routing methods and logits dtypes."""

    @staticmethod
    def is_monolithic() -> bool:
        return True

    @staticmethod
    def _supports_routing_method(
        routing_method: RoutingMethodType, weight_key: QuantKey | None, activation_key: QuantKey | None
    ) -> bool:
        return False

    @staticmethod
    def _supports_router_logits_dtype(router_logits_dtype: Any, routing_method: RoutingMethodType) -> bool:
        return False

    @abc.abstractmethod
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
        """Route, compute and reduce; return (M, K).  topk and the method come from `moe_config.routing`."""
