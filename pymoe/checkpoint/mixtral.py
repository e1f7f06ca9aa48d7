"""Mixtral: w1 is the gate projection, w3 the up projection, w2 the down projection; softmax, top-k, renormalized.

Source: transformers ``MixtralSparseMoeBlock``.
"""

from __future__ import annotations

from typing import Any

from pymoe.checkpoint.per_expert import PerExpertLayout
from pymoe.checkpoint.safetensors import SafetensorsFolder
from pymoe.config import RoutingConfig


class MixtralLayout(PerExpertLayout):
    """The family's names and router."""

    def _routing(self, tensors: SafetensorsFolder, config: dict[str, Any], layer: int, topk: int) -> RoutingConfig:
        return RoutingConfig(topk, routing_method="Renormalize")


MIXTRAL = MixtralLayout("block_sparse_moe", "w1", "w3", "w2", "num_local_experts")
