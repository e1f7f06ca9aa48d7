"""gpt-oss: all experts of a projection in one tensor, mxfp4 blocks or transposed floats, biases everywhere.

Gate and up rows alternate, even rows gate; the router picks the largest logits and takes the softmax of those.
Source: transformers ``GptOssMLP``, ``convert_moe_packed_tensors``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pymoe.activations import ActivationConfig
from pymoe.checkpoint.family import Family
from pymoe.checkpoint.fields import FLOATS, Config, config_of, expect, number
from pymoe.checkpoint.safetensors import SafetensorsFolder, fail
from pymoe.checkpoint.stored import FusedFloats, PackedMxfp4, StoredExperts
from pymoe.config import RoutingConfig
from pymoe.dense import Gate

Array = Any

PARTS = ("gate_up_proj", "down_proj")
SWIGLUOAI = (1.702, 7.0)
"""Alpha and limit that the activation swigluoai has; with others the rows are put in halves for its general form."""


class GptOssFamily(Family):
    """The family's names and shapes."""

    quantization = {"quant_method": ("mxfp4",)}
    counts = ("num_local_experts",)

    @property
    def _router(self) -> str:
        return _name("{layer}", "router.weight")

    def _stored(
        self, tensors: SafetensorsFolder, config: Config, layer: int, E: int, checked: Sequence[int]
    ) -> StoredExperts:
        _, K = expect(tensors, _name(layer, "router.weight"), (E, None), FLOATS)
        expect(tensors, _name(layer, "router.bias"), (E,), FLOATS)
        _, N = expect(tensors, _name(layer, "experts.gate_up_proj_bias"), (E, None), FLOATS)
        expect(tensors, _name(layer, "experts.down_proj_bias"), (E, K), FLOATS)
        names = [_name(layer, f"experts.{part}") for part in PARTS]
        rows = _rows(tensors, config, N)
        if f"{names[0]}_blocks" in tensors:
            return PackedMxfp4(tensors, names, (E, K), N, rows)
        stored = FusedFloats(tensors, names, (E, K), transposed=True, rows=rows)
        if 2 * stored.I != N:
            raise fail(tensors.folder, f"hold {names[0]} in shape {(E, K, N)}", (E, K, 2 * stored.I))
        return stored

    def _routing(self, tensors: SafetensorsFolder, config: Config, layer: int, sizes: tuple[int, int]) -> RoutingConfig:
        return RoutingConfig(sizes[1], routing_method="Renormalize")

    def _activation(self, tensors: SafetensorsFolder, config: Config) -> ActivationConfig:
        alpha, limit = _parameters(tensors, config)
        if (alpha, limit) == SWIGLUOAI:
            return ActivationConfig("swigluoai")
        return ActivationConfig("swigluoai_uninterleave", clamp_limit=limit, alpha=alpha, beta=1.0)

    def _gate(self, tensors: SafetensorsFolder, layer: int) -> Gate:
        return Gate(*(tensors[_name(layer, f"router.{part}")].copy() for part in ("weight", "bias")))

    def _dtype(self, tensors: SafetensorsFolder, layer: int, stored: StoredExperts) -> np.dtype:
        is_packed = isinstance(stored, PackedMxfp4)
        return tensors.dtype(_name(layer, "experts.gate_up_proj_bias")) if is_packed else stored.dtype

    def _biases(
        self, tensors: SafetensorsFolder, config: Config, layer: int, chosen: Sequence[int]
    ) -> tuple[Array, Array]:
        b1, b2 = (tensors[_name(layer, f"experts.{part}_bias")][list(chosen)].astype(np.float32) for part in PARTS)
        rows = _rows(tensors, config, b1.shape[1])
        return (b1 if rows is None else b1[:, rows]), b2


def _parameters(tensors: SafetensorsFolder, config: Config) -> tuple[float, float]:
    """Return alpha and the limit of the activation."""
    alpha = number(tensors, config, "swiglu_alpha", SWIGLUOAI[0])
    limit = number(tensors, config, "swiglu_limit", SWIGLUOAI[1])
    if limit <= 0:
        raise fail(config_of(tensors), "give swiglu_limit above 0", limit)
    return alpha, limit


def _rows(tensors: SafetensorsFolder, config: Config, N: int) -> Array | None:
    """Return the order of w1's rows: as they are, or all of gate before all of up."""
    if _parameters(tensors, config) == SWIGLUOAI:
        return None
    return np.concatenate([np.arange(0, N, 2), np.arange(1, N, 2)])


def _name(layer: int | str, part: str) -> str:
    return f"model.layers.{layer}.mlp.{part}"


GPT_OSS = GptOssFamily()
