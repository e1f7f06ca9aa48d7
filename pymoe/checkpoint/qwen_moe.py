"""Qwen3-MoE and Qwen2-MoE: softmax over all experts, top-k, renormalized where ``norm_topk_prob`` says so.

Qwen2-MoE adds a shared expert under a sigmoid gate of its own.  Layers without ``mlp.gate`` are dense.
Source: transformers ``Qwen3MoeSparseMoeBlock``, ``Qwen2MoeSparseMoeBlock``.
"""

from __future__ import annotations

from pymoe.checkpoint.fields import Config, flag
from pymoe.checkpoint.per_expert import PerExpertFamily
from pymoe.checkpoint.safetensors import SafetensorsFolder
from pymoe.config import RoutingConfig


class QwenMoEFamily(PerExpertFamily):
    """The families' router."""

    def _routing(self, tensors: SafetensorsFolder, config: Config, layer: int, sizes: tuple[int, int]) -> RoutingConfig:
        # Both families' configurations leave the chosen weights as they are unless they say otherwise.
        renormalize = flag(tensors, config, "norm_topk_prob", False)
        return RoutingConfig(sizes[1], routing_method="Renormalize" if renormalize else "Default")


# transformers 5 writes num_local_experts for Qwen3-MoE, older versions and the published models num_experts.
_NAMES = (("mlp",), ("gate_proj", "up_proj", "down_proj"), ("num_experts", "num_local_experts"))

QWEN3_MOE = QwenMoEFamily(*_NAMES)
QWEN2_MOE = QwenMoEFamily(*_NAMES, shared="shared_expert", shared_gate=True)
