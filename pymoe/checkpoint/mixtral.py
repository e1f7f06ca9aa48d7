"""Mixtral: w1 is the gate projection, w3 the up projection, w2 the down projection; softmax, top-k, renormalized.

Source: transformers ``MixtralSparseMoeBlock``.
"""

from __future__ import annotations

from pymoe.checkpoint.fields import Config
from pymoe.checkpoint.per_expert import PerExpertFamily
from pymoe.checkpoint.safetensors import SafetensorsFolder
from pymoe.config import RoutingConfig


class MixtralFamily(PerExpertFamily):
    """The family's router."""

    def _routing(self, tensors: SafetensorsFolder, config: Config, layer: int, sizes: tuple[int, int]) -> RoutingConfig:
        return RoutingConfig(sizes[1], routing_method="Renormalize")


# The block is called mlp where all experts of a projection are one tensor.
MIXTRAL = MixtralFamily(("block_sparse_moe", "mlp"), ("w1", "w3", "w2"), ("num_local_experts",))
