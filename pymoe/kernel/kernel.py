"""The object that users build: it joins a pair, checks every call, and passes it on by keyword."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

from pymoe import checks
from pymoe.activations import ActivationConfig, MoEActivation, RegisteredActivation
from pymoe.config import resolve_activation
from pymoe.contracts import (
    FusedMoEExperts,
    FusedMoEExpertsModular,
    FusedMoEExpertsMonolithic,
    FusedMoEPrepareAndFinalize,
    FusedMoEPrepareAndFinalizeModular,
    FusedMoEPrepareAndFinalizeMonolithic,
)
from pymoe.device.arrays import as_array, as_given, as_it_came, device_of, is_cuda, namespace
from pymoe.errors import ArgumentError, UnsupportedError, complaint
from pymoe.kernel.modular import FusedMoEKernelModularImpl
from pymoe.kernel.monolithic import FusedMoEKernelMonolithicImpl
from pymoe.kernel.stages import guarded

Array = Any
Activation = MoEActivation | RegisteredActivation | ActivationConfig | str


class FusedMoEKernel:
    """One prepare/finalize joined with experts of the same kind and activation format.

    Parameters
    ----------
    prepare_finalize : FusedMoEPrepareAndFinalize
    fused_experts : FusedMoEExperts
    shared_experts : callable, optional
        Modular only; `apply` then returns ``(shared, y)``.
    chunk_size : int, optional
        Tokens a call of the experts sees at most; default 16384.

    Raises
    ------
    ArgumentError
        A modular half with a monolithic one, or two activation formats.
    """

    def __init__(
        self,
        prepare_finalize: FusedMoEPrepareAndFinalize,
        fused_experts: FusedMoEExperts,
        shared_experts: Callable[[Array], Array] | None = None,
        *,
        chunk_size: int | None = None,
    ) -> None:
        call = "FusedMoEKernel"
        pair = f"{type(prepare_finalize).__name__} with {type(fused_experts).__name__}"
        self.prepare_finalize = prepare_finalize
        self.fused_experts = fused_experts
        self._accepted: tuple[Any, ...] = ()
        self.impl: FusedMoEKernelModularImpl | FusedMoEKernelMonolithicImpl
        if isinstance(prepare_finalize, FusedMoEPrepareAndFinalizeModular) and isinstance(
            fused_experts, FusedMoEExpertsModular
        ):
            self.impl = FusedMoEKernelModularImpl(prepare_finalize, fused_experts, shared_experts, chunk_size)
        elif isinstance(prepare_finalize, FusedMoEPrepareAndFinalizeMonolithic) and isinstance(
            fused_experts, FusedMoEExpertsMonolithic
        ):
            if shared_experts is not None:
                raise ArgumentError(complaint(call, "shared_experts", "be None for a monolithic pair", pair))
            self.impl = FusedMoEKernelMonolithicImpl(prepare_finalize, fused_experts)
        else:
            rule = "both be modular or both be monolithic"
            raise ArgumentError(complaint(call, "prepare_finalize and fused_experts", rule, pair))
        self._post_init_setup()

    def _post_init_setup(self) -> None:
        """Let prepare/finalize settle what depends on the experts, then check that the formats agree."""
        self.prepare_finalize.post_init_setup(self.fused_experts)
        formats = (self.prepare_finalize.activation_format, self.fused_experts.activation_format())
        if formats[0] is not formats[1]:
            names = f"{type(self.prepare_finalize).__name__} {formats[0].name}, "
            names += f"{type(self.fused_experts).__name__} {formats[1].name}"
            rule = "have one activation format"
            raise ArgumentError(complaint("FusedMoEKernel", "prepare_finalize and fused_experts", rule, names))

    @property
    def is_monolithic(self) -> bool:
        """Whether the pair takes router logits."""
        return isinstance(self.impl, FusedMoEKernelMonolithicImpl)

    def output_is_reduced(self) -> bool:
        """Whether the output is already summed over all ranks."""
        return self.prepare_finalize.output_is_reduced()

    def workspace_bytes(self, M: int) -> int:
        """Return the bytes that a call allocates for workspaces at most; 0 for a monolithic pair.

        `M` counts the tokens that reach the experts here, over ranks those of all ranks at most.  An `out` that is not
        C-contiguous may take (M, K) more.
        """
        if isinstance(self.impl, FusedMoEKernelMonolithicImpl):
            return 0
        M = checks.integer("FusedMoEKernel.workspace_bytes", "M", M, 0)
        return self.impl.workspace_bytes(M, self.fused_experts.moe_config.in_dtype)

    def apply(
        self,
        hidden_states: Array,
        w1: Array,
        w2: Array,
        *,
        topk_weights: Array,
        topk_ids: Array,
        activation: Activation = MoEActivation.SILU,
        global_num_experts: int = -1,
        expert_map: Array | None = None,
        apply_router_weight_on_input: bool = False,
        shared_experts_input: Array | None = None,
        out: Array | None = None,
    ) -> Array | tuple[Array, Array]:
        """Run the layer on tokens `hidden_states` (M, K); return y (M, K), or ``(shared, y)`` with shared experts.

        Arguments as in `fused_experts`; `shared_experts_input` replaces the tokens for the shared experts (latent
        MoE).
        """
        y = self.apply_as(
            "FusedMoEKernel.apply",
            hidden_states,
            w1,
            w2,
            topk_weights=topk_weights,
            topk_ids=topk_ids,
            activation=activation,
            global_num_experts=global_num_experts,
            expert_map=expert_map,
            apply_router_weight_on_input=apply_router_weight_on_input,
            shared_experts_input=shared_experts_input,
            out=out,
        )
        if out is None:
            return as_given(y, hidden_states)
        out = as_it_came(out)
        return (as_given(y[0], hidden_states), out) if isinstance(y, tuple) else out

    @guarded
    def apply_as(
        self,
        call: str,
        hidden_states: Array,
        w1: Array,
        w2: Array,
        *,
        topk_weights: Array,
        topk_ids: Array,
        activation: Activation,
        global_num_experts: int,
        expert_map: Array | None,
        apply_router_weight_on_input: bool,
        shared_experts_input: Array | None = None,
        out: Array | None = None,
        out_dtype: Any = None,
    ) -> Array | tuple[Array, Array]:
        """Do what `apply` does, with errors that speak for `call` and NumPy or CuPy arrays for an answer.

        `out_dtype` keeps float32 for a later sum.
        """
        if not isinstance(self.impl, FusedMoEKernelModularImpl):
            raise UnsupportedError(f"{call}: a monolithic pair takes router logits. Use apply_monolithic.")
        act = self._activation(call, activation)
        x, w1, w2, mapping, G = self._checked_weights(call, hidden_states, w1, w2, act, global_num_experts, expert_map)
        given = as_array(call, "topk_weights", topk_weights), as_array(call, "topk_ids", topk_ids)
        weights, ids = checks.topk_arrays(call, *given, x.shape[0])
        checks.one_device(call, hidden_states=x, topk_weights=weights, topk_ids=ids)
        checks.weight_on_input(call, apply_router_weight_on_input, ids.shape[1])
        ids = checks.legal_ids(call, ids, G)
        if not is_cuda(ids):
            ids = ids.astype(self.prepare_finalize.topk_indices_dtype() or np.int32, copy=False)
        if out is not None:
            inputs = {"hidden_states": x, "w1": w1, "w2": w2, "topk_weights": given[0], "topk_ids": given[1]}
            out = as_array(call, "out", out)
            checks.one_device(call, hidden_states=x, out=out)
            checks.output(call, out, x.shape[0], x.shape[1], x.dtype, inputs)
        with device_of(x):
            if out is None and out_dtype is not None:
                out = namespace(x).empty(x.shape, out_dtype)
            return self.impl.apply(
                hidden_states=namespace(x).ascontiguousarray(x),
                w1=w1,
                w2=w2,
                topk_ids=ids,
                topk_weights=weights,
                activation=act,
                global_num_experts=G,
                expert_map=mapping,
                apply_router_weight_on_input=bool(apply_router_weight_on_input),
                shared_experts_input=shared_experts_input,
                output=out,
            )

    @guarded
    def apply_monolithic(
        self,
        hidden_states: Array,
        w1: Array,
        w2: Array,
        *,
        router_logits: Array,
        activation: Activation = MoEActivation.SILU,
        global_num_experts: int = -1,
        expert_map: Array | None = None,
        apply_router_weight_on_input: bool = False,
        num_expert_group: int | None = None,
        e_score_correction_bias: Array | None = None,
        routed_scaling_factor: float | None = None,
        topk_group: int | None = None,
    ) -> Array:
        """Run the layer from router logits (M, global experts); topk and method are `moe_config.routing`'s."""
        call = "FusedMoEKernel.apply_monolithic"
        if not isinstance(self.impl, FusedMoEKernelMonolithicImpl):
            raise UnsupportedError(f"{call}: a modular pair takes ids and weights. Use apply.")
        act = self._activation(call, activation)
        x, w1, w2, mapping, G = self._checked_weights(call, hidden_states, w1, w2, act, global_num_experts, expert_map)
        logits = as_array(call, "router_logits", router_logits)
        checks.shape(call, "router_logits", logits, (x.shape[0], G))
        checks.float_dtype(call, "router_logits", logits)
        checks.one_device(call, hidden_states=x, router_logits=logits)
        checks.weight_on_input(call, apply_router_weight_on_input, self.fused_experts.moe_config.experts_per_token)
        with device_of(x):
            y = self.impl.apply(
                hidden_states=namespace(x).ascontiguousarray(x),
                w1=w1,
                w2=w2,
                router_logits=logits,
                activation=act,
                global_num_experts=G,
                expert_map=mapping,
                apply_router_weight_on_input=bool(apply_router_weight_on_input),
                num_expert_group=num_expert_group,
                e_score_correction_bias=e_score_correction_bias,
                routed_scaling_factor=routed_scaling_factor,
                topk_group=topk_group,
            )
        return as_given(y, hidden_states)

    def _activation(self, call: str, activation: Activation) -> ActivationConfig:
        """Join the argument with the parameters that the layer's config has for the same activation."""
        own = self.fused_experts.moe_config.activation
        act = resolve_activation(call, activation, self.fused_experts.quant_config)
        return own if not isinstance(activation, ActivationConfig) and own.activation == act.activation else act

    def _checked_weights(
        self, call: str, hidden_states: Any, w1: Any, w2: Any, act: ActivationConfig, G: int, expert_map: Any
    ) -> tuple[Array, Array, Array, Array | None, int]:
        """Return tokens, weights, the int32 expert map and the number of global experts."""
        x = as_array(call, "hidden_states", hidden_states)
        w1, w2 = as_array(call, "w1", w1), as_array(call, "w2", w2)
        checks.hidden(call, "hidden_states", x)
        self._check_scheme(call, w1, w2, x.shape[1], act)
        mapping = None if expert_map is None else as_array(call, "expert_map", expert_map)
        mapping, G = checks.expert_map(call, mapping, G, w1.shape[0])
        checks.one_device(call, hidden_states=x, w1=w1, w2=w2, expert_map=mapping)
        if mapping is not None and not self.fused_experts.supports_expert_map():
            rule = f"be None for {type(self.fused_experts).__name__}"
            raise UnsupportedError(complaint(call, "expert_map", rule, f"a map of {G} experts"))
        return x, w1, w2, mapping, G

    def _check_scheme(self, call: str, w1: Array, w2: Array, K: int, act: ActivationConfig) -> None:
        """Check weights, scheme and activation against each other, once for the same three and K."""
        known = self._accepted
        if known and known[0]() is w1 and known[1]() is w2 and known[2:] == (K, act):
            return
        _, N, width = checks.weights(call, w1, w2, K, act, self.fused_experts.quant_config)
        checks.quant_config(call, self.fused_experts.quant_config, w1, N, K, width)
        self._accepted = (weakref.ref(w1), weakref.ref(w2), K, act)
