"""Mixtral: w1 is the gate projection, w3 the up projection, w2 the down projection; softmax, top-k, renormalized.

Source: transformers ``MixtralSparseMoeBlock``.
"""

from __future__ import annotations

from typing import Any

from pymoe.checkpoint.per_expert import PerExpertLayout
from pymoe.config import RoutingConfig


def _routing(topk: int, config: dict[str, Any], path: Any) -> RoutingConfig:
    return RoutingConfig(topk, routing_method="Renormalize")


MIXTRAL = PerExpertLayout("block_sparse_moe", "w1", "w3", "w2", "num_local_experts", _routing)
