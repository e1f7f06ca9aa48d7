"""Families whose experts are named one by one: ``model.layers.L.BLOCK.{gate, experts.E.{GATE, UP, DOWN}}.weight``.

The weights are floats, or e4m3 in blocks of 128 by 128.  transformers from version 5 can also write all experts of a
projection as one tensor, ``mlp.experts.gate_up_proj`` and ``mlp.experts.down_proj``.
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from pymoe.activations import ActivationConfig
from pymoe.checkpoint import fp8_blocks
from pymoe.checkpoint.family import Family
from pymoe.checkpoint.fields import FLOATS, Config, activation_of, config_of, expect
from pymoe.checkpoint.safetensors import SafetensorsFolder, fail
from pymoe.checkpoint.stored import FusedFloats, SeparateFloats, SeparateFp8, StoredExperts
from pymoe.dense import SharedExperts

Array = Any


@dataclass(frozen=True)
class PerExpertFamily(Family):
    """Names of one family; a subclass adds its router.

    Attributes
    ----------
    blocks : tuple of str
        What may stand between the layer's number and the experts, such as "mlp".
    parts : (str, str, str)
        Gate (I, K), up (I, K) and down (K, I) projection of an expert.
    counts : tuple of str
    shared : str, optional
        Name of the shared expert in the block; a layer has one unless `shared_count` says 0.
    shared_gate : bool
        Whether it has a gate of its own, under its name with ``_gate``.
    shared_count : str, optional
        Field of config.json that counts shared experts, which together are one matrix a projection.
    """

    quantization = fp8_blocks.QUANTIZATION

    blocks: tuple[str, ...]
    parts: tuple[str, str, str]
    counts: tuple[str, ...]
    shared: str | None = None
    shared_gate: bool = False
    shared_count: str | None = None

    @property
    def _router(self) -> str:
        return f"model.layers.{{layer}}.(?:{'|'.join(self.blocks)}).gate.weight"

    def _prefix(self, tensors: SafetensorsFolder, layer: int) -> str:
        """Return what the names of the layer's block start with."""
        prefixes = [f"model.layers.{layer}.{block}" for block in self.blocks]
        return next((prefix for prefix in prefixes if f"{prefix}.gate.weight" in tensors), prefixes[0])

    def _stored(
        self, tensors: SafetensorsFolder, config: Config, layer: int, E: int, checked: Sequence[int]
    ) -> StoredExperts:
        prefix = self._prefix(tensors, layer)
        _, K = expect(tensors, f"{prefix}.gate.weight", (E, None), FLOATS)
        self._check_shared(tensors, config, layer, K)
        fused = [f"{prefix}.experts.{part}" for part in ("gate_up_proj", "down_proj")]
        if fused[0] in tensors:
            return FusedFloats(tensors, fused, (E, K), transposed=False)

        def names(part: int, e: int) -> str:
            return f"{prefix}.experts.{e}.{self.parts[part]}.weight"

        scale = names(0, next(iter(checked), 0)) + fp8_blocks.SCALE
        if scale not in tensors:
            return SeparateFloats(tensors, names, K, E, checked)
        described = config.get("quantization_config")
        if not isinstance(described, dict):
            raise fail(config_of(tensors), "describe fp8 blocks in quantization_config", reprlib.repr(described))
        is_e8m0 = described.get("scale_fmt") == "ue8m0" or tensors.dtype(scale).itemsize == 1
        return SeparateFp8(tensors, names, K, E, checked, fp8_blocks.ScaleForm(is_e8m0))

    def _activation(self, tensors: SafetensorsFolder, config: Config) -> ActivationConfig:
        return activation_of(tensors, config)

    def _gate(self, tensors: SafetensorsFolder, layer: int) -> Array:
        return tensors[f"{self._prefix(tensors, layer)}.gate.weight"].copy()

    def _dtype(self, tensors: SafetensorsFolder, layer: int, stored: StoredExperts) -> np.dtype:
        return np.dtype(ml_dtypes.bfloat16) if isinstance(stored, SeparateFp8) else stored.dtype

    def _shared_names(self, tensors: SafetensorsFolder, config: Config, layer: int) -> list[str]:
        """Return the names of the shared expert's gate, up and down projection; none where the layer has no such."""
        if self.shared is None or (self.shared_count and config.get(self.shared_count, 1) in (0, None)):
            return []
        return [f"{self._prefix(tensors, layer)}.{self.shared}.{part}.weight" for part in self.parts]

    def _check_shared(self, tensors: SafetensorsFolder, config: Config, layer: int, K: int) -> None:
        names = self._shared_names(tensors, config, layer)
        if not names:
            return
        dtypes = (*FLOATS, *SeparateFp8.dtypes)
        width, _ = expect(tensors, names[0], (None, K), dtypes)
        expect(tensors, names[1], (width, K), dtypes)
        expect(tensors, names[2], (K, width), dtypes)
        for name in names:
            if tensors.dtype(name).name in SeparateFp8.dtypes:
                fp8_blocks.check_blocks(tensors, name)
        if self.shared_gate:
            expect(tensors, f"{self._prefix(tensors, layer)}.{self.shared}_gate.weight", (1, K), FLOATS)

    def _shared(self, tensors: SafetensorsFolder, config: Config, layer: int, dtype: np.dtype) -> SharedExperts | None:
        """Return the shared expert with its gate, of a width of its own, in floats also where it is stored in fp8."""
        names = self._shared_names(tensors, config, layer)
        if not names:
            return None
        gate_up = np.concatenate([_matrix(tensors, name).astype(dtype) for name in names[:2]])
        gate = None
        if self.shared_gate:
            gate = tensors[f"{self._prefix(tensors, layer)}.{self.shared}_gate.weight"].copy()
        down = _matrix(tensors, names[2]).astype(dtype)
        return SharedExperts(gate_up, down, self._activation(tensors, config), gate)


def _matrix(tensors: SafetensorsFolder, name: str) -> Array:
    """Return a weight in numbers, whatever it is stored in."""
    is_fp8 = tensors.dtype(name).name in SeparateFp8.dtypes
    return fp8_blocks.decoded(tensors, name) if is_fp8 else tensors[name]
