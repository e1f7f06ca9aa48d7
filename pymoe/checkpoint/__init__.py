"""Checkpoints in Hugging Face layouts: one module a model family, one reader of safetensors for all."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from pymoe import checks
from pymoe.checkpoint import mixtral
from pymoe.checkpoint.safetensors import SafetensorsFile, SafetensorsFolder, fail, read_json
from pymoe.checkpoint.weights import LayerSummary, LayerWeights
from pymoe.errors import ArgumentError, UnsupportedError, complaint

__all__ = ["LayerSummary", "LayerWeights", "SafetensorsFile", "SafetensorsFolder", "list_layers", "load_layer"]

FAMILIES: dict[str, ModuleType] = {"mixtral": mixtral}
"""Reader by ``model_type`` of config.json; each has `layers` and `load`."""


def load_layer(folder: str | os.PathLike[str], layer: int, *, experts: Any = None, dtype: Any = None) -> LayerWeights:
    """Read one MoE layer.

    Parameters
    ----------
    folder : path
        With ``config.json`` and safetensors files.
    layer : int
        Number of the decoder layer.
    experts : sequence of int, optional
        Global ids to read; only their bytes are touched.
    dtype : dtype, optional
        float32, float16 or bfloat16, to which floating weights are cast; default the checkpoint's.

    Raises
    ------
    CheckpointError
        A file is missing, malformed, or does not hold the layer; names the file and the tensor.
    UnsupportedError
        Another model family, or a quantized checkpoint.
    ArgumentError, DTypeError
        `layer`, `experts` or `dtype` are not of that kind.
    """
    layer = checks.integer("load_layer", "layer", layer, 0)
    if experts is not None:
        experts = [checks.integer("load_layer", "experts", expert, 0) for expert in experts]
    if dtype is not None and np.dtype(dtype).name not in ("float32", "float16", "bfloat16"):
        raise ArgumentError(complaint("load_layer", "dtype", "be float32, float16 or bfloat16", np.dtype(dtype)))
    tensors, config, family = _open(folder)
    return family.load(tensors, config, layer, experts, dtype)


def list_layers(folder: str | os.PathLike[str]) -> list[LayerSummary]:
    """Return a summary of every MoE layer of the checkpoint, without reading weights."""
    tensors, config, family = _open(folder)
    return family.layers(tensors, config)


def _open(folder: str | os.PathLike[str]) -> tuple[SafetensorsFolder, dict[str, Any], ModuleType]:
    """Return the tensors, config.json and the family's reader."""
    path = Path(folder)
    if not path.is_dir():
        raise fail(path, "be a folder", "no such folder")
    config = read_json(path / "config.json")
    kind = config.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        rule = f"have a model_type among {', '.join(FAMILIES)}"
        raise UnsupportedError(complaint("checkpoint", str(path / "config.json"), rule, repr(kind)[:80]))
    if config.get("quantization_config") is not None:
        rule = "have no quantization_config"
        raise UnsupportedError(complaint("checkpoint", str(path / "config.json"), rule, "one"))
    return SafetensorsFolder(path), config, family
