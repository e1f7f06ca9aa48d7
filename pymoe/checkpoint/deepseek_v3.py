"""DeepSeek-V3: sigmoid scores, a bias for the choice, grouped top-k, shared experts, weights in fp8 blocks or floats.

Source: transformers ``DeepseekV3MoE``, ``DeepseekV3TopkRouter``.
"""

from __future__ import annotations

import reprlib

import numpy as np

from pymoe.checkpoint.fields import FLOATS, Config, config_of, expect, flag, number, whole
from pymoe.checkpoint.per_expert import PerExpertFamily
from pymoe.checkpoint.safetensors import SafetensorsFolder, fail
from pymoe.config import RoutingConfig
from pymoe.errors import UnsupportedError, complaint


class DeepSeekV3Family(PerExpertFamily):
    """The family's router."""

    def _routing(self, tensors: SafetensorsFolder, config: Config, layer: int, sizes: tuple[int, int]) -> RoutingConfig:
        E, topk = sizes
        groups, kept = (whole(tensors, config, field, 1, E) for field in ("n_group", "topk_group"))
        if E % groups or kept > groups or topk > kept * (E // groups):
            rule = f"divide {E} experts into n_group groups, of which topk_group hold {topk}"
            raise fail(config_of(tensors), rule, f"n_group {groups}, topk_group {kept}")
        if config.get("scoring_func", "sigmoid") != "sigmoid":
            path = str(config_of(tensors))
            got = reprlib.repr(config["scoring_func"])
            raise UnsupportedError(complaint("checkpoint", path, "have the scoring_func sigmoid", got))
        name = f"{self._prefix(tensors, layer)}.gate.e_score_correction_bias"
        expect(tensors, name, (E,), FLOATS)
        bias = tensors[name].astype(np.float32)
        if not np.isfinite(bias).all():
            raise fail(tensors.folder, f"hold finite numbers in {name}", bias[~np.isfinite(bias)][0])
        renormalize = flag(tensors, config, "norm_topk_prob", True)
        return RoutingConfig(
            topk,
            renormalize=renormalize,
            scoring_func="sigmoid",
            routing_method="DeepSeekV3" if renormalize else "Unspecified",
            num_expert_group=groups,
            topk_group=kept,
            e_score_correction_bias=bias,
            routed_scaling_factor=number(tensors, config, "routed_scaling_factor", 1.0),
        )


DEEPSEEK_V3 = DeepSeekV3Family(
    ("mlp",),
    ("gate_proj", "up_proj", "down_proj"),
    ("n_routed_experts",),
    shared="shared_experts",
    shared_count="n_shared_experts",
)
