"""Qwen3-MoE and Qwen2-MoE: softmax over all experts, top-k, renormalized where ``norm_topk_prob`` says so.

Qwen2-MoE adds a shared expert under a sigmoid gate of its own.  Layers without ``mlp.gate`` are dense.
Source: transformers ``Qwen3MoeSparseMoeBlock``, ``Qwen2MoeSparseMoeBlock``.
"""

from __future__ import annotations

import reprlib
from typing import Any

from pymoe.checkpoint.per_expert import PerExpertLayout
from pymoe.checkpoint.safetensors import SafetensorsFolder, fail
from pymoe.config import RoutingConfig


class QwenMoELayout(PerExpertLayout):
    """The families' names and router."""

    def _routing(self, tensors: SafetensorsFolder, config: dict[str, Any], layer: int, topk: int) -> RoutingConfig:
        # Both families' configurations leave the chosen weights as they are unless they say otherwise.
        renormalize = config.get("norm_topk_prob", False)
        if not isinstance(renormalize, bool):
            path = tensors.folder / "config.json"
            raise fail(path, "give norm_topk_prob as true or false", reprlib.repr(renormalize))
        return RoutingConfig(topk, routing_method="Renormalize" if renormalize else "Default")


_NAMES = ("mlp", "gate_proj", "up_proj", "down_proj", "num_experts")

QWEN3_MOE = QwenMoELayout(*_NAMES)
QWEN2_MOE = QwenMoELayout(*_NAMES, shared="shared_expert")
