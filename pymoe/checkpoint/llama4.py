"""Llama 4: transposed experts in one tensor a projection, a sigmoid router whose weight goes on the input, top-1.

The shared expert is added to the routed one.  Layers without a router are dense.
Source: transformers ``Llama4TextMoe``, ``Llama4Router``.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from pymoe.checkpoint.family import Family
from pymoe.checkpoint.per_expert import FLOATS, activation_of, expect, requested, sizes, transposed
from pymoe.checkpoint.safetensors import SafetensorsFolder, fail
from pymoe.checkpoint.weights import LayerSummary, LayerWeights
from pymoe.config import RoutingConfig
from pymoe.dense import SharedExperts
from pymoe.errors import UnsupportedError, complaint

_PARTS = ("gate_up_proj", "down_proj")


class Llama4Layout(Family):
    """The family's names under `prefix`, and the section of config.json that describes the text model.

    Parameters
    ----------
    prefix : str
        What stands before the layer's number.
    section : str, optional
        Key of config.json under which the sizes are; None is the top.
    """

    def __init__(self, prefix: str, section: str | None) -> None:
        self._prefix, self._section = prefix, section
        self._router = re.compile(re.escape(prefix) + r"\.(0|[1-9][0-9]{0,5})\.feed_forward\.router\.weight")

    def load(
        self,
        tensors: SafetensorsFolder,
        config: dict[str, Any],
        layer: int,
        experts: list[int] | None,
        dtype: np.dtype | None,
    ) -> LayerWeights:
        config = self._text(tensors, config)
        E, topk = sizes(tensors, config, "num_local_experts")
        chosen = requested(tensors, self._name(layer, "router.weight"), layer, self._numbers(tensors), E, experts)
        if topk != 1:
            path = str(tensors.folder / "config.json")
            raise UnsupportedError(complaint("checkpoint", path, "choose one expert a token", topk))
        activation = activation_of(tensors, config)
        K, width, own = self._geometry(tensors, layer, E)
        target = own if dtype is None else dtype
        shared = {part: tensors[self._name(layer, f"shared_expert.{part}_proj.weight")].astype(target)
                  for part in ("gate", "up", "down")}  # fmt: skip
        w1, w2 = (transposed(tensors[self._name(layer, f"experts.{part}")], chosen, target) for part in _PARTS)
        return LayerWeights(
            w1,
            w2,
            tensors[self._name(layer, "router.weight")].copy(),
            E,
            topk,
            tuple(chosen),
            RoutingConfig(1, routing_method="Llama4", apply_router_weight_on_input=True),
            activation,
            target.name,
            shared_experts=SharedExperts(np.concatenate([shared["gate"], shared["up"]]), shared["down"], activation),
        )

    def _text(self, tensors: SafetensorsFolder, config: dict[str, Any]) -> dict[str, Any]:
        """Return the section of the text model."""
        section = config if self._section is None else config.get(self._section)
        if not isinstance(section, dict):
            raise fail(tensors.folder / "config.json", f"hold an object {self._section}", type(section).__name__)
        return section

    def _numbers(self, tensors: SafetensorsFolder) -> list[int]:
        return sorted(int(match[1]) for name in tensors if (match := self._router.fullmatch(name)))

    def _name(self, layer: int, part: str) -> str:
        return f"{self._prefix}.{layer}.feed_forward.{part}"

    def _summary(self, tensors: SafetensorsFolder, config: dict[str, Any], layer: int) -> LayerSummary:
        E, topk = sizes(tensors, self._text(tensors, config), "num_local_experts")
        K, width, dtype = self._geometry(tensors, layer, E)
        nbytes = sum(tensors.nbytes(self._name(layer, f"experts.{part}")) for part in _PARTS)
        return LayerSummary(layer, E, topk, K, width, dtype.name, nbytes)

    def _geometry(self, tensors: SafetensorsFolder, layer: int, E: int) -> tuple[int, int, np.dtype]:
        """Return (K, I, dtype of the experts) after checking every header."""
        _, K = expect(tensors, self._name(layer, "router.weight"), (E, None), FLOATS)
        name = self._name(layer, "experts.gate_up_proj")
        N = expect(tensors, name, (E, K, None), FLOATS)[2]
        own = tensors.dtype(name)
        if N % 2:
            raise fail(tensors.folder, f"hold {name} with gate and up of one width", (E, K, N))
        expect(tensors, self._name(layer, "experts.down_proj"), (E, N // 2, K), (own.name,))
        gate = self._name(layer, "shared_expert.gate_proj.weight")
        shared, _ = expect(tensors, gate, (None, K), FLOATS)
        expect(tensors, self._name(layer, "shared_expert.up_proj.weight"), (shared, K), FLOATS)
        expect(tensors, self._name(layer, "shared_expert.down_proj.weight"), (K, shared), FLOATS)
        return K, N // 2, own


LLAMA4 = Llama4Layout("language_model.model.layers", "text_config")
LLAMA4_TEXT = Llama4Layout("model.layers", None)
