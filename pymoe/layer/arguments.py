"""Checks of a layer's constructor, made before anything is built."""

from __future__ import annotations

from typing import Any

import numpy as np

from pymoe import checks
from pymoe.comm.eplb import ExpertPlan
from pymoe.comm.placement import STRATEGIES, PlannedPlacement
from pymoe.config import RoutingConfig
from pymoe.dense import Gate
from pymoe.device.arrays import as_array
from pymoe.errors import ArgumentError, DTypeError, ShapeError, complaint
from pymoe.quantization import FusedMoEQuantConfig

Array = Any


def arrays_of(call: str, **arrays: Any) -> dict[str, Array | None]:
    """Return the arguments as NumPy or CuPy arrays, by their names; None stays."""
    return {label: None if x is None else as_array(call, label, x) for label, x in arrays.items()}


def most_tokens(call: str, max_num_tokens: Any) -> int | None:
    """Return the limit of tokens a call, or None for none."""
    return None if max_num_tokens is None else checks.integer(call, "max_num_tokens", max_num_tokens, 1)


def deterministic_of(call: str, deterministic: Any, batch_invariant: Any, quant_config: FusedMoEQuantConfig) -> bool:
    """Return whether sums keep their order, or refuse what is no flag, or flags that cannot hold."""
    if not isinstance(deterministic, bool | np.bool_):
        raise DTypeError(complaint(call, "deterministic", "be True or False", repr(deterministic)))
    if batch_invariant is not None and not isinstance(batch_invariant, bool | np.bool_):
        raise DTypeError(complaint(call, "batch_invariant", "be True, False or None", repr(batch_invariant)))
    if batch_invariant and not deterministic:
        rule = "not be True with deterministic=False, whose sums have no order"
        raise ArgumentError(complaint(call, "batch_invariant", rule, batch_invariant))
    if batch_invariant and quant_config.is_dynamic_per_tensor:
        rule = "not be True with one dynamic scale of the activations, which all rows share"
        raise ArgumentError(complaint(call, "batch_invariant", rule, batch_invariant))
    return bool(deterministic)


def topk_of(call: str, topk: Any, num_experts: int) -> int:
    """Return topk as int, or refuse it."""
    topk = checks.integer(call, "topk", topk, 1)
    if topk > num_experts:
        raise ArgumentError(complaint(call, "topk", f"be at most the {num_experts} experts", topk))
    return topk


def routing_of(call: str, routing: Any, topk: int, num_experts: int) -> RoutingConfig:
    """Return the routing, the default one for None, or refuse one for another topk or number of experts."""
    if routing is None:
        return RoutingConfig(topk)
    if not isinstance(routing, RoutingConfig):
        raise DTypeError(complaint(call, "routing", "be a RoutingConfig or None", type(routing).__name__))
    if routing.topk != topk:
        raise ArgumentError(complaint(call, "routing.topk", f"equal topk = {topk}", routing.topk))
    if routing.e_score_correction_bias is not None:
        bias = as_array(call, "e_score_correction_bias", routing.e_score_correction_bias)
        checks.shape(call, "e_score_correction_bias", bias, (num_experts,))
    return routing


def gate_of(call: str, gate: Array | Gate, num_experts: int, K: int) -> Gate:
    """Return the gate as a `Gate`, or refuse one of another shape."""
    if not isinstance(gate, Gate):
        gate = Gate(as_array(call, "gate", gate))
    if gate.weight.shape != (num_experts, K):
        raise ShapeError(complaint(call, "gate", f"have shape ({num_experts}, {K})", gate.weight.shape))
    return gate


def expert_map_of(call: str, placement: Any, num_experts: int, E_local: int) -> Array | None:
    """Return the (num_experts,) int32 map for the global ids in `placement`; None where each expert is in its place."""
    if isinstance(placement, str):
        if placement not in STRATEGIES:
            rule = f"be {' or '.join(map(repr, STRATEGIES))}, or global ids"
            raise ArgumentError(complaint(call, "placement", rule, repr(placement)))
        if num_experts != E_local:
            rule = f"equal w1's {E_local} experts with a {placement} placement"
            raise ArgumentError(complaint(call, "num_experts", rule, num_experts, "Give placement as global ids"))
        return None
    if isinstance(placement, ExpertPlan):
        placement = PlannedPlacement.by(call, placement, 1, 0).experts(0)
    ids = [checks.integer(call, "placement", expert, 0) for expert in placement]
    if len(ids) != E_local or len(set(ids)) != len(ids) or any(expert >= num_experts for expert in ids):
        rule = f"name {E_local} different global experts in 0..{num_experts - 1}"
        raise ArgumentError(complaint(call, "placement", rule, ids))
    if ids == list(range(num_experts)):
        return None
    mapping = np.full(num_experts, -1, np.int32)
    mapping[ids] = np.arange(E_local, dtype=np.int32)
    return mapping


def settings_of(weights: Any) -> dict[str, Any]:
    """Return the keywords of a layer that a checkpoint's weights settle."""
    return {
        "topk": weights.topk,
        "num_experts": weights.num_experts,
        "quant_config": weights.quant_config,
        "gate": weights.gate,
        "activation": weights.activation,
        "routing": weights.routing,
        "shared_experts": weights.shared_experts,
        "placement": list(weights.experts),
    }
