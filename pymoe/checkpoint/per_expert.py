"""Families that store three matrices an expert: ``model.layers.L.BLOCK.{gate, experts.E.{GATE, UP, DOWN}}.weight``.

A `PerExpertLayout` holds a family's own names; everything is checked from headers before memory is taken.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pymoe.activations import ActivationConfig
from pymoe.checkpoint.family import Family
from pymoe.checkpoint.safetensors import SafetensorsFolder, fail
from pymoe.checkpoint.weights import LayerSummary, LayerWeights
from pymoe.config import RoutingConfig
from pymoe.dense import SharedExperts
from pymoe.errors import ArgumentError, complaint

Array = Any

FLOATS = ("float32", "float16", "bfloat16")
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


@dataclass(frozen=True)
class PerExpertLayout(Family):
    """Names of one family; a subclass adds its router.

    Attributes
    ----------
    block : str
        What stands between the layer's number and the experts, such as "mlp".
    gate, up, down : str
        Projections of an expert: (I, K), (I, K) and (K, I).
    num_experts : str
        Field of config.json that counts experts; ``num_experts_per_tok`` is topk in all.
    shared : str, optional
        Name of the shared expert in the block.
    shared_gate : bool
        Whether it has a gate of its own, under its name with ``_gate``.
    dtypes : tuple of str
        Of the experts' weights.
    """

    block: str
    gate: str
    up: str
    down: str
    num_experts: str
    shared: str | None = None
    shared_gate: bool = True
    dtypes: tuple[str, ...] = FLOATS

    def load(
        self,
        tensors: SafetensorsFolder,
        config: dict[str, Any],
        layer: int,
        experts: list[int] | None,
        dtype: np.dtype | None,
    ) -> LayerWeights:
        E, topk, chosen = self._request(tensors, config, layer, experts)
        activation = activation_of(tensors, config)
        routing = self._routing(tensors, config, layer, topk)
        # All headers are checked before memory is taken, so that a lying config.json costs none.
        width, K, own = self._geometry(tensors, layer, E, chosen)
        target = own if dtype is None else dtype
        shared = self._shared(tensors, layer, K, own, target, activation)
        w1, w2 = self._read(tensors, layer, chosen, (width, K), target)
        gate = tensors[self._name(layer, "gate")].copy()
        return LayerWeights(
            w1, w2, gate, E, topk, tuple(chosen), routing, activation, target.name, shared_experts=shared
        )  # fmt: skip

    def _request(
        self, tensors: SafetensorsFolder, config: dict[str, Any], layer: int, experts: list[int] | None
    ) -> tuple[int, int, list[int]]:
        """Return (experts of the checkpoint, topk, the asked ids), or refuse a layer or an id that is not there."""
        E, topk = sizes(tensors, config, self.num_experts)
        router = self._name(layer, "gate")
        return E, topk, requested(tensors, router, layer, self._numbers(tensors), E, experts)

    def _routing(self, tensors: SafetensorsFolder, config: dict[str, Any], layer: int, topk: int) -> RoutingConfig:
        """Return the family's router with what config.json and the tensors say of it."""
        raise NotImplementedError

    def _read(
        self, tensors: SafetensorsFolder, layer: int, chosen: list[int], size: tuple[int, int], target: np.dtype
    ) -> tuple[Array, Array]:
        """Return w1, gate rows over up rows, and w2 of the chosen experts of `size` (I, K), cast to `target`."""
        width, K = size
        w1 = np.empty((len(chosen), 2 * width, K), target)
        w2 = np.empty((len(chosen), K, width), target)
        for local, e in enumerate(chosen):
            w1[local, :width] = tensors[self._name(layer, self.gate, e)]
            w1[local, width:] = tensors[self._name(layer, self.up, e)]
            w2[local] = tensors[self._name(layer, self.down, e)]
        return w1, w2

    def _numbers(self, tensors: SafetensorsFolder) -> list[int]:
        pattern = re.compile(rf"model\.layers\.(0|[1-9][0-9]{{0,5}})\.{self.block}\.gate\.weight")
        return sorted(int(match[1]) for name in tensors if (match := pattern.fullmatch(name)))

    def _summary(self, tensors: SafetensorsFolder, config: dict[str, Any], layer: int) -> LayerSummary:
        E, topk = sizes(tensors, config, self.num_experts)
        width, K, dtype = self._geometry(tensors, layer, E, range(E))
        return LayerSummary(layer, E, topk, K, width, dtype.name, 3 * E * K * width * dtype.itemsize)

    def _name(self, layer: int, part: str, expert: int | None = None) -> str:
        prefix = f"model.layers.{layer}.{self.block}"
        return f"{prefix}.{part}.weight" if expert is None else f"{prefix}.experts.{expert}.{part}.weight"

    def _geometry(
        self, tensors: SafetensorsFolder, layer: int, E: int, experts: Iterable[int]
    ) -> tuple[int, int, np.dtype]:
        """Return (I, K, dtype) of the experts after checking gate, expert 0 and every one of `experts` from headers."""
        _, K = expect(tensors, self._name(layer, "gate"), (E, None), FLOATS)
        first = self._name(layer, self.gate, 0)
        width, _ = expect(tensors, first, (None, K), self.dtypes)
        own = tensors.dtype(first)
        for e in experts:
            for part, shape in ((self.gate, (width, K)), (self.up, (width, K)), (self.down, (K, width))):
                expect(tensors, self._name(layer, part, e), shape, (own.name,))
        return width, K, own

    def _shared(
        self,
        tensors: SafetensorsFolder,
        layer: int,
        K: int,
        own: np.dtype,
        target: np.dtype,
        activation: ActivationConfig,
    ) -> SharedExperts | None:
        """Return the family's shared expert with its gate, of a width of its own."""
        if self.shared is None:
            return None
        names = {part: self._name(layer, f"{self.shared}.{part}") for part in (self.gate, self.up, self.down)}
        width, _ = expect(tensors, names[self.gate], (None, K), (own.name,))
        expect(tensors, names[self.up], (width, K), (own.name,))
        expect(tensors, names[self.down], (K, width), (own.name,))
        gate = None
        if self.shared_gate:
            name = self._name(layer, f"{self.shared}_gate")
            expect(tensors, name, (1, K), FLOATS)
            gate = tensors[name].copy()
        w1 = np.concatenate([self._values(tensors, names[part], target) for part in (self.gate, self.up)])
        return SharedExperts(w1, self._values(tensors, names[self.down], target), activation, gate)

    def _values(self, tensors: SafetensorsFolder, name: str, target: np.dtype) -> Array:
        """Return a floating tensor as `target`."""
        return tensors[name].astype(target)


def requested(
    tensors: SafetensorsFolder, router: str, layer: int, found: list[int], E: int, experts: list[int] | None
) -> list[int]:
    """Return the ids to load, or refuse a layer without a `router`, or an id that is not there."""
    if router not in tensors:
        raise fail(tensors.folder, f"hold an MoE layer {layer}", f"layers {reprlib.repr(found)}")
    chosen = list(range(E)) if experts is None else experts
    if any(e >= E for e in chosen):
        raise ArgumentError(complaint("load_layer", "experts", f"be ids in 0..{E - 1}", reprlib.repr(chosen)))
    return chosen


def transposed(stored: Array, chosen: list[int], target: np.dtype) -> Array:
    """Return (experts, rows, columns) of the chosen experts of a tensor stored (experts, columns, rows)."""
    _, columns, rows = stored.shape
    w = np.empty((len(chosen), rows, columns), target)
    for local, e in enumerate(chosen):
        w[local] = stored[e].T
    return w


def expect(
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


def sizes(tensors: SafetensorsFolder, config: dict[str, Any], count: str) -> tuple[int, int]:
    """Return (experts, topk) of config.json."""
    sizes = []
    for field in (count, "num_experts_per_tok"):
        value = config.get(field)
        if type(value) is not int or not 1 <= value <= 65536:
            raise fail(tensors.folder / "config.json", f"give {field} as an integer in 1..65536", reprlib.repr(value))
        sizes.append(value)
    if sizes[1] > sizes[0]:
        rule = f"give num_experts_per_tok at most the {sizes[0]} experts"
        raise fail(tensors.folder / "config.json", rule, sizes[1])
    return sizes[0], sizes[1]


def activation_of(tensors: SafetensorsFolder, config: dict[str, Any]) -> ActivationConfig:
    name = config.get("hidden_act", "silu")
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        rule = f"give hidden_act one of {', '.join(_ACTIVATIONS)}"
        raise fail(tensors.folder / "config.json", rule, reprlib.repr(name))
    return ActivationConfig(_ACTIVATIONS[name])
