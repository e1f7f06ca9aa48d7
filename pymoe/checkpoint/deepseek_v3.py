"""DeepSeek-V3: sigmoid scores, a bias for the choice, grouped top-k, shared experts, weights in fp8 blocks or floats.

An fp8 weight stands beside its ``weight_scale_inv``, which despite its name multiplies: one float32 for each
block of 128 by 128, perhaps in another shard.  Source: transformers ``DeepseekV3MoE``, ``DeepseekV3TopkRouter``.
"""

from __future__ import annotations

import math
import reprlib
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np

from pymoe.checkpoint.per_expert import FLOATS, Array, PerExpertLayout, expect
from pymoe.checkpoint.safetensors import SafetensorsFolder, fail
from pymoe.checkpoint.weights import LayerWeights
from pymoe.config import RoutingConfig
from pymoe.dense import SharedExperts
from pymoe.errors import UnsupportedError, complaint
from pymoe.quantization import FusedMoEQuantConfig

FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
BLOCK = 128
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class DeepSeekV3Layout(PerExpertLayout):
    """The family's names, with its router's bias and its blocks."""

    quantization = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}

    def load(
        self,
        tensors: SafetensorsFolder,
        config: dict[str, Any],
        layer: int,
        experts: list[int] | None,
        dtype: np.dtype | None,
    ) -> LayerWeights:
        E, _, chosen = self._request(tensors, config, layer, experts)
        width, K, own = self._geometry(tensors, layer, E, chosen)
        if own != FP8:
            return super().load(tensors, config, layer, experts, dtype)
        if width % BLOCK:
            path = str(tensors.folder)
            rule = f"have experts whose width is a multiple of {BLOCK}, so that blocks of gate and up do not share rows"
            raise UnsupportedError(complaint("checkpoint", path, rule, width))
        for e in chosen:
            for part, rows, columns in ((self.gate, width, K), (self.up, width, K), (self.down, K, width)):
                self._expect_scale(tensors, self._name(layer, part, e), rows, columns)
        # Codes pass through a cast to themselves; everything else that the base class does holds for them too.
        loaded = super().load(tensors, config, layer, experts, FP8)
        scales = [
            np.stack([np.concatenate([tensors[self._name(layer, part, e) + "_scale_inv"] for part in parts])
                      for e in chosen]) if chosen else np.empty((0, *_blocks(*size)), np.float32)
            for parts, size in (((self.gate, self.up), (2 * width, K)), ((self.down,), (K, width)))
        ]  # fmt: skip
        quant_config = FusedMoEQuantConfig.fp8_w8a8(w1_scale=scales[0], w2_scale=scales[1], block_shape=(BLOCK, BLOCK))
        name = (_BFLOAT16 if dtype is None else dtype).name
        return replace(
            loaded, w1=loaded.w1.view(np.uint8), w2=loaded.w2.view(np.uint8), dtype=name, quant_config=quant_config
        )

    def _shared(
        self, tensors: SafetensorsFolder, layer: int, K: int, own: Any, target: Any, activation: Any
    ) -> SharedExperts | None:
        # Shared experts stay out of the blocks: they are computed in bfloat16.
        return super()._shared(tensors, layer, K, own, _BFLOAT16 if target == FP8 else target, activation)

    def _values(self, tensors: SafetensorsFolder, name: str, target: np.dtype) -> Array:
        values = tensors[name]
        if values.dtype != FP8:
            return values.astype(target)
        self._expect_scale(tensors, name, *values.shape)
        scale = np.repeat(np.repeat(tensors[name + "_scale_inv"], BLOCK, axis=0), BLOCK, axis=1)
        return (values.astype(np.float32) * scale[: values.shape[0], : values.shape[1]]).astype(target)

    def _expect_scale(self, tensors: SafetensorsFolder, name: str, rows: int, columns: int) -> None:
        expect(tensors, name + "_scale_inv", _blocks(rows, columns), ("float32",))

    def _routing(self, tensors: SafetensorsFolder, config: dict[str, Any], layer: int, topk: int) -> RoutingConfig:
        path = tensors.folder / "config.json"
        groups = [config.get(field) for field in ("n_group", "topk_group")]
        if any(type(value) is not int or value < 1 for value in groups):
            raise fail(path, "give n_group and topk_group as integers above 0", reprlib.repr(groups))
        factor = config.get("routed_scaling_factor", 1.0)
        if type(factor) not in (int, float) or not math.isfinite(factor):
            raise fail(path, "give routed_scaling_factor as a number", reprlib.repr(factor))
        if config.get("norm_topk_prob", True) is not True or config.get("scoring_func", "sigmoid") != "sigmoid":
            got = {field: config.get(field) for field in ("norm_topk_prob", "scoring_func")}
            rule = "have sigmoid scores, renormalized"
            raise UnsupportedError(complaint("checkpoint", str(path), rule, reprlib.repr(got)))
        name = f"model.layers.{layer}.{self.block}.gate.e_score_correction_bias"
        E = tensors.shape(self._name(layer, "gate"))[0]
        expect(tensors, name, (E,), FLOATS)
        return RoutingConfig(
            topk,
            routing_method="DeepSeekV3",
            num_expert_group=groups[0],
            topk_group=groups[1],
            e_score_correction_bias=tensors[name].astype(np.float32),
            routed_scaling_factor=float(factor),
        )


def _blocks(rows: int, columns: int) -> tuple[int, int]:
    return -(-rows // BLOCK), -(-columns // BLOCK)


DEEPSEEK_V3 = DeepSeekV3Layout(
    "mlp", "gate_proj", "up_proj", "down_proj", "n_routed_experts", "shared_experts", False, (*FLOATS, FP8.name)
)
