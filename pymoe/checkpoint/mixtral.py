"""Mixtral's Hugging Face layout: ``model.layers.L.block_sparse_moe.{gate, experts.E.{w1, w3, w2}}.weight``.

w1 is the gate projection, w3 the up projection, w2 the down projection; softmax, top-k, renormalized.
Source: transformers ``MixtralSparseMoeBlock``.
"""

from __future__ import annotations

import re
from typing import Any

import ml_dtypes
import numpy as np

from pymoe.activations import ActivationConfig
from pymoe.checkpoint.safetensors import SafetensorsFolder, fail
from pymoe.checkpoint.weights import LayerSummary, LayerWeights
from pymoe.config import RoutingConfig
from pymoe.errors import CheckpointError, PymoeError

Array = Any

_GATE = re.compile(r"^model\.layers\.(\d{1,6})\.block_sparse_moe\.gate\.weight$")
_FLOATS = ("float32", "float16", "bfloat16")
_COMPUTE = {"float32": np.dtype("float32"), "float16": np.dtype("float16"), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def layers(tensors: SafetensorsFolder, config: dict[str, Any]) -> list[LayerSummary]:
    """Return a summary of every MoE layer, in order."""
    numbers = sorted(int(match[1]) for name in tensors if (match := _GATE.match(name)))
    return [_summary(tensors, config, layer) for layer in numbers]


def _summary(tensors: SafetensorsFolder, config: dict[str, Any], layer: int) -> LayerSummary:
    E, topk = _sizes(tensors, config)
    names = [_name(layer, e, part) for e in range(E) for part in ("w1", "w3", "w2")]
    width, K = tensors.shape(names[0])
    nbytes = sum(tensors.nbytes(name) for name in names)
    return LayerSummary(layer, E, topk, K, width, tensors.dtype(names[0]).name, nbytes)


def load(
    tensors: SafetensorsFolder, config: dict[str, Any], layer: int, experts: list[int] | None, dtype: Any
) -> LayerWeights:
    """Return layer number `layer` with the asked experts; only their bytes are read."""
    E, topk = _sizes(tensors, config)
    gate_name = f"model.layers.{layer}.block_sparse_moe.gate.weight"
    if gate_name not in tensors:
        found = [summary.layer for summary in layers(tensors, config)]
        raise fail(tensors.folder, f"hold an MoE layer {layer}", f"layers {found}")
    chosen = list(range(E)) if experts is None else experts
    if len(set(chosen)) != len(chosen) or any(not 0 <= e < E for e in chosen):
        raise fail(tensors.folder, f"be asked for different experts in 0..{E - 1}", chosen)
    gate = tensors[gate_name]
    _expect(tensors, gate_name, gate.shape, (E, None))
    K = gate.shape[1]
    first = _name(layer, chosen[0] if chosen else 0, "w1")
    width, own = tensors.shape(first)[0], tensors.dtype(first)
    if own.name not in _FLOATS:
        raise fail(tensors.folder, f"hold {first} in one of {', '.join(_FLOATS)}", own)
    target = own if dtype is None else _COMPUTE[np.dtype(dtype).name]
    w1 = np.empty((len(chosen), 2 * width, K), target)
    w2 = np.empty((len(chosen), K, width), target)
    for local, e in enumerate(chosen):
        w1[local, :width] = _part(tensors, layer, e, "w1", (width, K), own)
        w1[local, width:] = _part(tensors, layer, e, "w3", (width, K), own)
        w2[local] = _part(tensors, layer, e, "w2", (K, width), own)
    return LayerWeights(
        w1,
        w2,
        gate,
        E,
        topk,
        tuple(chosen),
        RoutingConfig(topk, routing_method="Renormalize"),
        _activation(tensors, config),
        target.name,
    )


def _name(layer: int, expert: int, part: str) -> str:
    return f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{part}.weight"


def _part(tensors: SafetensorsFolder, layer: int, expert: int, part: str, shape: tuple, dtype: np.dtype) -> Array:
    name = _name(layer, expert, part)
    array = tensors[name]
    _expect(tensors, name, array.shape, shape)
    if array.dtype != dtype:
        raise fail(tensors.folder, f"hold {name} in {dtype} like the other experts", array.dtype)
    return array


def _expect(tensors: SafetensorsFolder, name: str, shape: tuple, expected: tuple) -> None:
    if len(shape) != len(expected) or any(e is not None and s != e for s, e in zip(shape, expected, strict=True)):
        raise fail(tensors.folder, f"hold {name} in shape {expected}".replace("None", "any"), shape)


def _sizes(tensors: SafetensorsFolder, config: dict[str, Any]) -> tuple[int, int]:
    """Return (experts, topk) of config.json."""
    sizes = []
    for field in ("num_local_experts", "num_experts_per_tok"):
        value = config.get(field)
        if type(value) is not int or not 1 <= value <= 65536:
            raise fail(tensors.folder / "config.json", f"give {field} a whole number above 0", repr(value)[:80])
        sizes.append(value)
    if sizes[1] > sizes[0]:
        rule = f"give num_experts_per_tok at most the {sizes[0]} experts"
        raise fail(tensors.folder / "config.json", rule, sizes[1])
    return sizes[0], sizes[1]


def _activation(tensors: SafetensorsFolder, config: dict[str, Any]) -> ActivationConfig:
    name = config.get("hidden_act", "silu")
    try:
        return ActivationConfig(name)
    except PymoeError as error:
        raise CheckpointError(f"checkpoint: {tensors.folder / 'config.json'}: hidden_act: {error}") from None
