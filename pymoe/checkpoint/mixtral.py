"""Mixtral's Hugging Face layout: ``model.layers.L.block_sparse_moe.{gate, experts.E.{w1, w3, w2}}.weight``.

w1 is the gate projection, w3 the up projection, w2 the down projection; softmax, top-k, renormalized.
Source: transformers ``MixtralSparseMoeBlock``.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from pymoe.activations import ActivationConfig
from pymoe.checkpoint.safetensors import SafetensorsFolder, fail
from pymoe.checkpoint.weights import LayerSummary, LayerWeights
from pymoe.config import RoutingConfig
from pymoe.errors import ArgumentError, complaint

_GATE = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,5})\.block_sparse_moe\.gate\.weight")
_FLOATS = ("float32", "float16", "bfloat16")
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def layers(tensors: SafetensorsFolder, config: dict[str, Any]) -> list[LayerSummary]:
    """Return a summary of every MoE layer, in order."""
    return [_summary(tensors, config, layer) for layer in _numbers(tensors)]


def load(
    tensors: SafetensorsFolder, config: dict[str, Any], layer: int, experts: list[int] | None, dtype: np.dtype | None
) -> LayerWeights:
    """Return layer number `layer` with the asked experts; only their bytes are read."""
    E, topk = _sizes(tensors, config)
    if _name(layer, "gate") not in tensors:
        raise fail(tensors.folder, f"hold an MoE layer {layer}", f"layers {reprlib.repr(_numbers(tensors))}")
    chosen = list(range(E)) if experts is None else experts
    if any(e >= E for e in chosen):
        raise ArgumentError(complaint("load_layer", "experts", f"be ids in 0..{E - 1}", reprlib.repr(chosen)))
    activation = _activation(tensors, config)
    # All headers are checked before memory is taken, so that a lying config.json costs none.
    width, K, own = _geometry(tensors, layer, E, chosen)
    target = own if dtype is None else dtype
    w1 = np.empty((len(chosen), 2 * width, K), target)
    w2 = np.empty((len(chosen), K, width), target)
    for local, e in enumerate(chosen):
        w1[local, :width] = tensors[_name(layer, "w1", e)]
        w1[local, width:] = tensors[_name(layer, "w3", e)]
        w2[local] = tensors[_name(layer, "w2", e)]
    gate = tensors[_name(layer, "gate")].copy()
    routing = RoutingConfig(topk, routing_method="Renormalize")
    return LayerWeights(w1, w2, gate, E, topk, tuple(chosen), routing, activation, target.name)


def _numbers(tensors: SafetensorsFolder) -> list[int]:
    """Return the numbers of the MoE layers, rising."""
    return sorted(int(match[1]) for name in tensors if (match := _GATE.fullmatch(name)))


def _summary(tensors: SafetensorsFolder, config: dict[str, Any], layer: int) -> LayerSummary:
    E, topk = _sizes(tensors, config)
    width, K, dtype = _geometry(tensors, layer, E, range(E))
    return LayerSummary(layer, E, topk, K, width, dtype.name, 3 * E * K * width * dtype.itemsize)


def _name(layer: int, part: str, expert: int | None = None) -> str:
    prefix = f"model.layers.{layer}.block_sparse_moe"
    return f"{prefix}.{part}.weight" if expert is None else f"{prefix}.experts.{expert}.{part}.weight"


def _geometry(tensors: SafetensorsFolder, layer: int, E: int, experts: Iterable[int]) -> tuple[int, int, np.dtype]:
    """Return (I, K, dtype) of the experts after checking gate, expert 0 and every one of `experts` from headers."""
    _, K = _expect(tensors, _name(layer, "gate"), (E, None), _FLOATS)
    first = _name(layer, "w1", 0)
    width, _ = _expect(tensors, first, (None, K), _FLOATS)
    own = tensors.dtype(first)
    for e in experts:
        for part, shape in (("w1", (width, K)), ("w3", (width, K)), ("w2", (K, width))):
            _expect(tensors, _name(layer, part, e), shape, (own.name,))
    return width, K, own


def _expect(
    tensors: SafetensorsFolder, name: str, expected: tuple[int | None, ...], dtypes: tuple[str, ...]
) -> tuple[int, ...]:
    """Return the shape of a tensor, or refuse it; None stands for any length above 0."""
    shape, dtype = tensors.shape(name), tensors.dtype(name)
    if len(shape) != len(expected) or any(
        s != e if e is not None else s == 0 for s, e in zip(shape, expected, strict=True)
    ):
        words = ", ".join("any" if e is None else str(e) for e in expected)
        raise fail(tensors.folder, f"hold {name} in shape ({words})", shape)
    if dtype.name not in dtypes:
        raise fail(tensors.folder, f"hold {name} in {' or '.join(dtypes)}", dtype)
    return shape


def _sizes(tensors: SafetensorsFolder, config: dict[str, Any]) -> tuple[int, int]:
    """Return (experts, topk) of config.json."""
    sizes = []
    for field in ("num_local_experts", "num_experts_per_tok"):
        value = config.get(field)
        if type(value) is not int or not 1 <= value <= 65536:
            raise fail(tensors.folder / "config.json", f"give {field} as an integer in 1..65536", reprlib.repr(value))
        sizes.append(value)
    if sizes[1] > sizes[0]:
        rule = f"give num_experts_per_tok at most the {sizes[0]} experts"
        raise fail(tensors.folder / "config.json", rule, sizes[1])
    return sizes[0], sizes[1]


def _activation(tensors: SafetensorsFolder, config: dict[str, Any]) -> ActivationConfig:
    name = config.get("hidden_act", "silu")
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        rule = f"give hidden_act one of {', '.join(_ACTIVATIONS)}"
        raise fail(tensors.folder / "config.json", rule, reprlib.repr(name))
    return ActivationConfig(_ACTIVATIONS[name])
