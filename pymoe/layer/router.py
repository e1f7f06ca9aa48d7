"""Who computes what in a call of a layer: from the gate, from logits, or as the caller says; and how much each gets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pymoe import checks
from pymoe.config import RoutingConfig
from pymoe.dense import Gate
from pymoe.device.arrays import is_cuda
from pymoe.errors import ArgumentError, complaint
from pymoe.ops.route.router import route_as
from pymoe.tokens import local_ids

Array = Any


@dataclass(frozen=True)
class LayerRouter:
    """The router of one layer."""

    gate: Gate | None
    routing: RoutingConfig
    num_experts: int

    def route(
        self, call: str, x: Array, router_logits: Any, topk_weights: Any, topk_ids: Any, input_ids: Any
    ) -> tuple[Array, Array]:
        """Return checked (weights, ids) from whatever the call brought, else from the gate."""
        if (topk_weights is None) != (topk_ids is None):
            missing, other = ("topk_ids", "topk_weights") if topk_ids is None else ("topk_weights", "topk_ids")
            raise ArgumentError(complaint(call, missing, f"be given with {other}", None))
        if topk_ids is not None:
            if router_logits is not None:
                raise ArgumentError(complaint(call, "router_logits", "be None beside topk arrays", "both"))
            checks.shape(call, "topk_ids", topk_ids, (x.shape[0], self.routing.topk))
            checks.one_device(call, hidden_states=x, topk_weights=topk_weights, topk_ids=topk_ids)
            weights, ids = checks.topk_arrays(call, topk_weights, topk_ids, x.shape[0])
            return weights, checks.legal_ids(call, ids, self.num_experts)
        logits = self._logits(call, x, router_logits)
        weights, ids = route_as(call, logits, self.routing, hidden_states=x, input_ids=input_ids)
        return weights, checks.legal_ids(call, ids, self.num_experts)

    def _logits(self, call: str, x: Array, router_logits: Any) -> Array:
        if router_logits is not None:
            checks.shape(call, "router_logits", router_logits, (x.shape[0], self.num_experts))
            checks.float_dtype(call, "router_logits", router_logits)
            checks.one_device(call, hidden_states=x, router_logits=router_logits)
            return router_logits
        if self.gate is None:
            rule = "be given to a layer without a gate"
            raise ArgumentError(complaint(call, "router_logits", rule, None, "Or give topk_weights and topk_ids"))
        return self.gate(x)


def loads(ids: Array, num_experts: int, expert_map: Array | None) -> Array:
    """Return how many rows each global expert computes here, (num_experts,) int64, read-only; waits for a device."""
    ids = ids.get() if is_cuda(ids) else ids
    expert_map = expert_map.get() if is_cuda(expert_map) else expert_map  # type: ignore[union-attr]
    local = local_ids(ids, num_experts, expert_map)
    load = np.bincount(ids[local >= 0].astype(np.int64), minlength=num_experts)
    load.flags.writeable = False
    return load
