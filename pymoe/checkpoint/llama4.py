"""Llama 4: transposed experts in one tensor a projection, a sigmoid router whose weight goes on the input, top-1.

The shared expert is added to the routed one.  Layers without a router are dense.
Source: transformers ``Llama4TextMoe``, ``Llama4Router``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pymoe.activations import ActivationConfig
from pymoe.checkpoint.family import Family
from pymoe.checkpoint.fields import FLOATS, Config, activation_of, config_of, expect
from pymoe.checkpoint.safetensors import SafetensorsFolder, fail
from pymoe.checkpoint.stored import FusedFloats, StoredExperts
from pymoe.config import RoutingConfig
from pymoe.dense import SharedExperts
from pymoe.errors import UnsupportedError, complaint

Array = Any


class Llama4Family(Family):
    """The family's names under `prefix`, and the section of config.json that describes the text model.

    Parameters
    ----------
    prefix : str
        What stands before the layer's number.
    section : str, optional
        Key of config.json under which the sizes are; None is the top.
    """

    counts = ("num_local_experts",)

    def __init__(self, prefix: str, section: str | None) -> None:
        self._prefix, self._key = prefix, section

    @property
    def _router(self) -> str:
        return self._name("{layer}", "router.weight")

    def _section(self, tensors: SafetensorsFolder, config: Config) -> Config:
        section = config if self._key is None else config.get(self._key)
        if not isinstance(section, dict):
            raise fail(config_of(tensors), f"hold an object {self._key}", type(section).__name__)
        return section

    def _stored(
        self, tensors: SafetensorsFolder, config: Config, layer: int, E: int, checked: Sequence[int]
    ) -> StoredExperts:
        _, K = expect(tensors, self._name(layer, "router.weight"), (E, None), FLOATS)
        width, _ = expect(tensors, self._shared_name(layer, "gate"), (None, K), FLOATS)
        expect(tensors, self._shared_name(layer, "up"), (width, K), FLOATS)
        expect(tensors, self._shared_name(layer, "down"), (K, width), FLOATS)
        names = [self._name(layer, f"experts.{part}") for part in ("gate_up_proj", "down_proj")]
        return FusedFloats(tensors, names, (E, K), transposed=True)

    def _routing(self, tensors: SafetensorsFolder, config: Config, layer: int, sizes: tuple[int, int]) -> RoutingConfig:
        if sizes[1] != 1:
            path = str(config_of(tensors))
            raise UnsupportedError(complaint("checkpoint", path, "choose one expert a token", sizes[1]))
        return RoutingConfig(1, routing_method="Llama4", apply_router_weight_on_input=True)

    def _activation(self, tensors: SafetensorsFolder, config: Config) -> ActivationConfig:
        return activation_of(tensors, config)

    def _gate(self, tensors: SafetensorsFolder, layer: int) -> Array:
        return tensors[self._name(layer, "router.weight")].copy()

    def _shared(self, tensors: SafetensorsFolder, config: Config, layer: int, dtype: np.dtype) -> SharedExperts:
        gate, up, down = (tensors[self._shared_name(layer, part)].astype(dtype) for part in ("gate", "up", "down"))
        return SharedExperts(np.concatenate([gate, up]), down, self._activation(tensors, config))

    def _name(self, layer: int | str, part: str) -> str:
        return f"{self._prefix}.{layer}.feed_forward.{part}"

    def _shared_name(self, layer: int, part: str) -> str:
        return self._name(layer, f"shared_expert.{part}_proj.weight")


LLAMA4 = Llama4Family("language_model.model.layers", "text_config")
LLAMA4_TEXT = Llama4Family("model.layers", None)
