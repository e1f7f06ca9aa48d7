"""What every family's reader offers."""

from __future__ import annotations

import abc
from typing import Any, ClassVar

import numpy as np

from pymoe.checkpoint.safetensors import SafetensorsFolder
from pymoe.checkpoint.weights import LayerSummary, LayerWeights


class Family(abc.ABC):
    """Reads the MoE layers of one family of models.

    Attributes
    ----------
    quantization : dict, optional
        What config.json's quantization_config must hold where there is one; None reads no quantized checkpoint.
    """

    quantization: ClassVar[dict[str, Any] | None] = None

    def layers(self, tensors: SafetensorsFolder, config: dict[str, Any]) -> list[LayerSummary]:
        """Return a summary of every MoE layer, in order."""
        return [self._summary(tensors, config, layer) for layer in self._numbers(tensors)]

    @abc.abstractmethod
    def load(
        self,
        tensors: SafetensorsFolder,
        config: dict[str, Any],
        layer: int,
        experts: list[int] | None,
        dtype: np.dtype | None,
    ) -> LayerWeights:
        """Return layer number `layer` with the asked experts; only their bytes are read."""

    @abc.abstractmethod
    def _numbers(self, tensors: SafetensorsFolder) -> list[int]:
        """Return the numbers of the MoE layers, rising."""

    @abc.abstractmethod
    def _summary(self, tensors: SafetensorsFolder, config: dict[str, Any], layer: int) -> LayerSummary:
        """Return the summary of one layer, from headers."""
