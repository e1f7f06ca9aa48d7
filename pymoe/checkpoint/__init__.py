"""Checkpoints in Hugging Face layouts: one module a family of names, one reader of safetensors for all."""

from __future__ import annotations

import os
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from pymoe import checks
from pymoe.checkpoint.deepseek_v3 import DEEPSEEK_V3
from pymoe.checkpoint.family import Family, Request
from pymoe.checkpoint.gpt_oss import GPT_OSS
from pymoe.checkpoint.llama4 import LLAMA4, LLAMA4_TEXT
from pymoe.checkpoint.mixtral import MIXTRAL
from pymoe.checkpoint.qwen_moe import QWEN2_MOE, QWEN3_MOE
from pymoe.checkpoint.safetensors import SafetensorsFile, SafetensorsFolder, fail, read_json
from pymoe.checkpoint.weights import LayerSummary, LayerWeights
from pymoe.errors import ArgumentError, DTypeError, UnsupportedError, complaint

__all__ = ["LayerSummary", "LayerWeights", "SafetensorsFile", "SafetensorsFolder", "list_layers", "load_layer"]

FAMILIES: dict[str, Family] = {
    "deepseek_v3": DEEPSEEK_V3,
    "gpt_oss": GPT_OSS,
    "llama4": LLAMA4,
    "llama4_text": LLAMA4_TEXT,
    "mixtral": MIXTRAL,
    "qwen2_moe": QWEN2_MOE,
    "qwen3_moe": QWEN3_MOE,
}
"""Reader by ``model_type`` of config.json; each has `layers` and `load`."""


def load_layer(
    folder: str | os.PathLike[str], layer: int, *, experts: Any = None, dtype: Any = None, scheme: str | None = None
) -> LayerWeights:
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
        float32, float16 or bfloat16: what to compute in, to which floating weights are cast; default the checkpoint's
        (bfloat16 for fp8 blocks, the biases' for mxfp4).
    scheme : str, optional
        Quantize the routed experts, see `quantize_experts`, from the numbers that the files hold, also where those are
        codes; one expert at a time stands in memory in floats.  Shared experts stay floats.

    Raises
    ------
    CheckpointError
        A file is missing, malformed, or does not hold the layer; names the file and the tensor.
    UnsupportedError
        Another model family, or a quantization that the family's reader does not know.
    ArgumentError, DTypeError
        `layer`, `experts`, `dtype` or `scheme` are not of that kind.
    ShapeError
        Weights of a shape that `scheme` cannot hold.
    """
    layer = checks.integer("load_layer", "layer", layer, 0)
    experts = None if experts is None else _experts(experts)
    dtype = None if dtype is None else _dtype(dtype)
    tensors, config, family = _open("load_layer", folder)
    return family.load(tensors, config, Request(layer, experts, dtype, scheme))


def list_layers(folder: str | os.PathLike[str]) -> list[LayerSummary]:
    """Return a summary of every MoE layer of the checkpoint, in order, without reading weights.

    Dense layers do not count, nor do those from ``num_hidden_layers`` on, which predict further tokens (MTP);
    `load_layer` takes these by their number.  Raises what `load_layer` raises.
    """
    tensors, config, family = _open("list_layers", folder)
    return family.layers(tensors, config)


def _experts(experts: Any) -> list[int]:
    """Return the asked ids; whether the checkpoint has them is the family's to say."""
    if isinstance(experts, str | bytes) or not isinstance(experts, Iterable):
        raise DTypeError(complaint("load_layer", "experts", "be a sequence of integers or None", repr(experts)))
    ids = [checks.integer("load_layer", "experts", expert, 0) for expert in experts]
    if len(set(ids)) != len(ids):
        raise ArgumentError(complaint("load_layer", "experts", "name each expert once", reprlib.repr(ids)))
    return ids


def _dtype(dtype: Any) -> np.dtype:
    """Return one of the dtypes that a layer computes in."""
    try:
        found = np.dtype(dtype)
    except TypeError:
        raise DTypeError(complaint("load_layer", "dtype", "be a dtype", repr(dtype))) from None
    if found.name not in ("float32", "float16", "bfloat16"):
        raise DTypeError(complaint("load_layer", "dtype", "be float32, float16 or bfloat16", found))
    return found


def _open(call: str, folder: Any) -> tuple[SafetensorsFolder, dict[str, Any], Family]:
    """Return the tensors, config.json and the family's reader."""
    if not isinstance(folder, str | os.PathLike):
        raise DTypeError(complaint(call, "folder", "be a path", type(folder).__name__))
    path = Path(folder)
    if not path.is_dir():
        raise fail(path, "be a folder", "no such folder")
    config = read_json(path, "config.json")
    kind = config.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        rule = f"have a model_type among {', '.join(FAMILIES)}"
        raise UnsupportedError(complaint("checkpoint", str(path / "config.json"), rule, reprlib.repr(kind)))
    _check_quantization(path, config, family)
    return SafetensorsFolder(path), config, family


def _check_quantization(path: Path, config: dict[str, Any], family: Family) -> None:
    """Refuse a quantized checkpoint, unless it is in the form that the family reads."""
    found = config.get("quantization_config")
    if found is None:
        return
    reads = family.quantization
    if reads is None or not isinstance(found, dict):
        rule = "have no quantization_config" + ("" if reads is None else f" but an object with {', '.join(reads)}")
        raise UnsupportedError(complaint("checkpoint", str(path / "config.json"), rule, reprlib.repr(found)))
    for name, values in reads.items():
        if found.get(name) not in values:
            known = " or ".join("nothing" if value is None else str(value) for value in values)
            rule = f"have {known} as {name} of quantization_config"
            raise UnsupportedError(
                complaint("checkpoint", str(path / "config.json"), rule, reprlib.repr(found.get(name)))
            )
