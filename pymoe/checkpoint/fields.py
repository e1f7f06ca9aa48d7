"""What config.json and the headers of the files must say, checked before anything is read."""

from __future__ import annotations

import math
import reprlib
from pathlib import Path
from typing import Any

from pymoe.activations import ActivationConfig
from pymoe.checkpoint.safetensors import SafetensorsFolder, fail

FLOATS = ("float32", "float16", "bfloat16")
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
Config = dict[str, Any]


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


def config_of(tensors: SafetensorsFolder) -> Path:
    """Return the path of config.json, for errors."""
    return tensors.folder / "config.json"


def sizes(tensors: SafetensorsFolder, config: Config, counts: tuple[str, ...]) -> tuple[int, int]:
    """Return (experts, topk); the first of the fields `counts` that is there counts the experts."""
    field = next((name for name in counts if name in config), counts[0])
    E, topk = (whole(tensors, config, name, 1, 65536) for name in (field, "num_experts_per_tok"))
    if topk > E:
        raise fail(config_of(tensors), f"give num_experts_per_tok at most the {E} experts", topk)
    return E, topk


def whole(tensors: SafetensorsFolder, config: Config, field: str, least: int, most: int) -> int:
    """Return an integer of config.json."""
    value = config.get(field)
    if type(value) is not int or not least <= value <= most:
        raise fail(config_of(tensors), f"give {field} as an integer in {least}..{most}", reprlib.repr(value))
    return value


def number(tensors: SafetensorsFolder, config: Config, field: str, default: float) -> float:
    """Return a finite number of config.json."""
    value = config.get(field, default)
    # An integer may be too large for a float.
    if type(value) not in (int, float) or not abs(value) <= 1e30 or not math.isfinite(value):
        raise fail(config_of(tensors), f"give {field} as a number", reprlib.repr(value))
    return float(value)


def flag(tensors: SafetensorsFolder, config: Config, field: str, default: bool) -> bool:
    """Return true or false of config.json."""
    value = config.get(field, default)
    if not isinstance(value, bool):
        raise fail(config_of(tensors), f"give {field} as true or false", reprlib.repr(value))
    return value


def activation_of(tensors: SafetensorsFolder, config: Config) -> ActivationConfig:
    """Return the gated activation that ``hidden_act`` names."""
    name = config.get("hidden_act", "silu")
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        rule = f"give hidden_act one of {', '.join(_ACTIVATIONS)}"
        raise fail(config_of(tensors), rule, reprlib.repr(name))
    return ActivationConfig(_ACTIVATIONS[name])
