"""gpt-oss: all experts of a projection in one tensor, mxfp4 blocks or transposed floats, biases everywhere.

Gate and up rows alternate, even rows gate, which is the activation swigluoai; the router picks the largest logits and
takes the softmax of those.  Source: transformers ``GptOssMLP``, ``convert_moe_packed_tensors``.
"""

from __future__ import annotations

import re
import reprlib
from typing import Any

import numpy as np

from pymoe.activations import ActivationConfig
from pymoe.checkpoint.family import Family
from pymoe.checkpoint.per_expert import FLOATS, Array, expect, requested, sizes, transposed
from pymoe.checkpoint.safetensors import SafetensorsFolder, fail
from pymoe.checkpoint.weights import LayerSummary, LayerWeights
from pymoe.config import RoutingConfig
from pymoe.dense import Gate
from pymoe.quantization import FusedMoEQuantConfig

GROUP = 32
"""Weights that share an mx scale; 16 bytes of two codes."""
_ROUTER = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,5})\.mlp\.router\.weight")


class GptOssLayout(Family):
    """The family's names and shapes."""

    quantization = {"quant_method": "mxfp4"}

    def load(
        self,
        tensors: SafetensorsFolder,
        config: dict[str, Any],
        layer: int,
        experts: list[int] | None,
        dtype: np.dtype | None,
    ) -> LayerWeights:
        E, topk = sizes(tensors, config, "num_local_experts")
        chosen = requested(tensors, _name(layer, "router.weight"), layer, self._numbers(tensors), E, experts)
        self._check_activation(tensors, config)
        K, width, packed = self._geometry(tensors, layer, E)
        router = Gate(tensors[_name(layer, "router.weight")].copy(), tensors[_name(layer, "router.bias")].copy())
        biases = {f"w{i}_bias": tensors[_name(layer, f"experts.{part}_bias")][chosen].astype(np.float32)
                  for i, part in ((1, "gate_up_proj"), (2, "down_proj"))}  # fmt: skip
        own = tensors.dtype(_name(layer, "experts.gate_up_proj_bias" if packed else "experts.gate_up_proj"))
        target = own if dtype is None else dtype
        if packed:
            w1, w2 = (self._codes(tensors, layer, part, chosen) for part in ("gate_up_proj", "down_proj"))
            scales = [tensors[_name(layer, f"experts.{part}_scales")][chosen] for part in ("gate_up_proj", "down_proj")]
            quant_config = FusedMoEQuantConfig.mxfp4_w4a16(w1_scale=scales[0], w2_scale=scales[1], **biases)
        else:
            w1, w2 = (
                transposed(tensors[_name(layer, f"experts.{part}")], chosen, target)
                for part in ("gate_up_proj", "down_proj")
            )
            quant_config = FusedMoEQuantConfig.biased(**biases)
        routing = RoutingConfig(topk, routing_method="Renormalize")
        activation = ActivationConfig("swigluoai")
        return LayerWeights(
            w1, w2, router, E, topk, tuple(chosen), routing, activation, target.name, quant_config
        )  # fmt: skip

    def _numbers(self, tensors: SafetensorsFolder) -> list[int]:
        return sorted(int(match[1]) for name in tensors if (match := _ROUTER.fullmatch(name)))

    def _summary(self, tensors: SafetensorsFolder, config: dict[str, Any], layer: int) -> LayerSummary:
        E, topk = sizes(tensors, config, "num_local_experts")
        K, width, packed = self._geometry(tensors, layer, E)
        stored = ("_blocks", "_scales") if packed else ("",)
        names = [_name(layer, f"experts.{part}{end}") for part in ("gate_up_proj", "down_proj") for end in stored]
        dtype = "mxfp4" if packed else tensors.dtype(names[0]).name
        return LayerSummary(layer, E, topk, K, width, dtype, sum(tensors.nbytes(name) for name in names))

    def _geometry(self, tensors: SafetensorsFolder, layer: int, E: int) -> tuple[int, int, bool]:
        """Return (K, I, whether packed) after checking every header; which layout it is, the names say."""
        _, K = expect(tensors, _name(layer, "router.weight"), (E, None), FLOATS)
        expect(tensors, _name(layer, "router.bias"), (E,), FLOATS)
        _, N = expect(tensors, _name(layer, "experts.gate_up_proj_bias"), (E, None), FLOATS)
        expect(tensors, _name(layer, "experts.down_proj_bias"), (E, K), FLOATS)
        packed = _name(layer, "experts.gate_up_proj_blocks") in tensors
        for part, rows, columns in (("gate_up_proj", N, K), ("down_proj", K, N // 2)):
            name = _name(layer, f"experts.{part}")
            if not packed:
                expect(tensors, name, (E, columns, rows), FLOATS)
                continue
            if columns % GROUP or N % 2:
                raise fail(tensors.folder, f"hold {name} of a multiple of {GROUP} columns", (E, rows, columns))
            expect(tensors, f"{name}_blocks", (E, rows, columns // GROUP, GROUP // 2), ("uint8",))
            expect(tensors, f"{name}_scales", (E, rows, columns // GROUP), ("uint8", "float8_e8m0fnu"))
        return K, N // 2, packed

    def _codes(self, tensors: SafetensorsFolder, layer: int, part: str, chosen: list[int]) -> Array:
        """Return (experts, rows, columns / 2) bytes: the files' nibble order is pymoe's own."""
        blocks = tensors[_name(layer, f"experts.{part}_blocks")]
        return blocks[chosen].reshape(len(chosen), blocks.shape[1], -1)

    def _check_activation(self, tensors: SafetensorsFolder, config: dict[str, Any]) -> None:
        path = tensors.folder / "config.json"
        limit = config.get("swiglu_limit", 7.0)
        if limit != 7.0 or isinstance(limit, bool):
            raise fail(path, "give swiglu_limit 7, the limit of swigluoai", reprlib.repr(limit))


def _name(layer: int, part: str) -> str:
    return f"model.layers.{layer}.mlp.{part}"


GPT_OSS = GptOssLayout()
