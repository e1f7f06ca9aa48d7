"""What every family's reader does, in one order: headers first, then the router, then the experts."""

from __future__ import annotations

import abc
import re
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from pymoe.activations import ActivationConfig
from pymoe.checkpoint.fields import Config, sizes
from pymoe.checkpoint.requantize import requantized
from pymoe.checkpoint.safetensors import SafetensorsFolder, fail
from pymoe.checkpoint.stored import StoredExperts
from pymoe.checkpoint.weights import LayerSummary, LayerWeights
from pymoe.config import RoutingConfig
from pymoe.dense import Gate, SharedExperts
from pymoe.errors import ArgumentError, complaint

Array = Any


@dataclass(frozen=True)
class Request:
    """What the caller asks for: a layer, some or all experts, the dtype to compute in, another scheme."""

    layer: int
    experts: list[int] | None = None
    dtype: np.dtype | None = None
    scheme: str | None = None


class Family(abc.ABC):
    """Reads the MoE layers of one family of models.

    Attributes
    ----------
    quantization : dict, optional
        Fields of config.json's quantization_config, where there is one, each with the values that are read; None reads
        no quantized checkpoint.
    counts : tuple of str
        Fields of config.json that may count the experts.
    """

    quantization: ClassVar[dict[str, tuple[Any, ...]] | None] = None
    counts: tuple[str, ...]

    def layers(self, tensors: SafetensorsFolder, config: Config) -> list[LayerSummary]:
        """Return a summary of every MoE layer, in order; layers that only predict further tokens (MTP) do not count."""
        config = self._section(tensors, config)
        end = config.get("num_hidden_layers")
        if end is not None and type(end) is not int:
            path = tensors.folder / "config.json"
            raise fail(path, "give num_hidden_layers as an integer", reprlib.repr(end))
        numbers = [number for number in self._numbers(tensors) if end is None or number < end]
        return [self._summary(tensors, config, number) for number in numbers]

    def load(self, tensors: SafetensorsFolder, config: Config, request: Request) -> LayerWeights:
        """Return the layer with the asked experts; only their bytes are read."""
        config, layer = self._section(tensors, config), request.layer
        E, topk = sizes(tensors, config, self.counts)
        self._check_layer(tensors, layer)
        chosen = list(range(E)) if request.experts is None else request.experts
        if any(e >= E for e in chosen):
            raise ArgumentError(complaint("load_layer", "experts", f"be ids in 0..{E - 1}", reprlib.repr(chosen)))
        # All headers are checked before memory is taken, so that a lying config.json costs none.
        activation = self._activation(tensors, config)
        stored = self._stored(tensors, config, layer, E, chosen)
        routing = self._routing(tensors, config, layer, (E, topk))
        dtype = request.dtype if request.dtype is not None else self._dtype(tensors, layer, stored)
        with np.errstate(all="ignore"):  # a cast may overflow
            if request.scheme is None:
                w1, w2, quant_config = stored.read(chosen, dtype)
            else:
                w1, w2, quant_config = requantized(stored, chosen, request.scheme)
                # A scheme that casts says what to compute in, too.
                dtype = w1.dtype if request.dtype is None and quant_config.weight_key is None else dtype
            gate, shared = self._gate(tensors, layer), self._shared(tensors, config, layer, dtype)
            biases = self._biases(tensors, config, layer, chosen)
        if biases is not None:
            new = {
                name: replace(getattr(quant_config, name), bias=b) for name, b in zip(("w1", "w2"), biases, strict=True)
            }
            quant_config = replace(quant_config, **new)
        return LayerWeights(
            w1, w2, gate, E, topk, tuple(chosen), routing, activation, dtype.name, quant_config, shared
        )  # fmt: skip

    def _summary(self, tensors: SafetensorsFolder, config: Config, layer: int) -> LayerSummary:
        E, topk = sizes(tensors, config, self.counts)
        stored = self._stored(tensors, config, layer, E, range(E))
        return LayerSummary(layer, E, topk, stored.K, stored.I, stored.scheme, stored.nbytes)

    def _numbers(self, tensors: SafetensorsFolder) -> list[int]:
        """Return the numbers of the layers that have a router, rising."""
        pattern = re.compile(self._router.replace(".", r"\.").format(layer="(0|[1-9][0-9]{0,5})"))
        return sorted({int(match[1]) for name in tensors if (match := pattern.fullmatch(name))})

    def _check_layer(self, tensors: SafetensorsFolder, layer: int) -> None:
        if layer not in (found := self._numbers(tensors)):
            raise fail(tensors.folder, f"hold an MoE layer {layer}", f"layers {reprlib.repr(found)}")

    @property
    @abc.abstractmethod
    def _router(self) -> str:
        """Name of the router's weight with ``{layer}`` for the number; what else it holds is a regular expression."""

    @abc.abstractmethod
    def _stored(
        self, tensors: SafetensorsFolder, config: Config, layer: int, E: int, checked: Sequence[int]
    ) -> StoredExperts:
        """Return the experts, and check by headers the router, `checked` experts and everything else of the layer."""

    @abc.abstractmethod
    def _routing(self, tensors: SafetensorsFolder, config: Config, layer: int, sizes: tuple[int, int]) -> RoutingConfig:
        """Return the router's rule for `sizes` (E, topk)."""

    @abc.abstractmethod
    def _activation(self, tensors: SafetensorsFolder, config: Config) -> ActivationConfig:
        """Return the activation."""

    @abc.abstractmethod
    def _gate(self, tensors: SafetensorsFolder, layer: int) -> Array | Gate:
        """Return the router's weights, copied."""

    def _section(self, tensors: SafetensorsFolder, config: Config) -> Config:
        """Return the part of config.json that describes the text model."""
        return config

    def _dtype(self, tensors: SafetensorsFolder, layer: int, stored: StoredExperts) -> np.dtype:
        """Return the dtype to compute in where none is asked for."""
        return stored.dtype

    def _shared(self, tensors: SafetensorsFolder, config: Config, layer: int, dtype: np.dtype) -> SharedExperts | None:
        """Return the shared experts in `dtype`."""
        return None

    def _biases(
        self, tensors: SafetensorsFolder, config: Config, layer: int, chosen: Sequence[int]
    ) -> tuple[Array, Array] | None:
        """Return the biases of w1 and w2 of the chosen experts, float32."""
        return None
