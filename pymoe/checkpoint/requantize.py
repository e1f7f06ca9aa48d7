"""Stored experts to another scheme on the way into memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from pymoe.checkpoint.stored import StoredExperts
from pymoe.ops.quantize import quantize_experts
from pymoe.quantization import FusedMoEQuantConfig

Array = Any


def requantized(stored: StoredExperts, chosen: Sequence[int], scheme: str) -> tuple[Array, Array, FusedMoEQuantConfig]:
    """Return (w1, w2, quant_config) of the chosen experts in `scheme`: what `quantize_experts` makes of their numbers.

    The numbers of one expert stand in memory at a time; every scheme treats each expert for itself.
    """
    w1 = np.empty((1, 2 * stored.I, stored.K), stored.dtype)
    w2 = np.empty((1, stored.K, stored.I), stored.dtype)
    # No experts first: refuses what the scheme cannot hold before a file is read, and tells shapes and dtypes.
    none = quantize_experts(w1[:0], w2[:0], scheme)
    made, config = [_room(array, len(chosen)) for array in _arrays(none)], none[2]
    for local, e in enumerate(chosen):
        stored.copy(e, w1[0], w2[0])
        for whole, part in zip(made, _arrays(quantize_experts(w1, w2, scheme)), strict=True):
            if whole is not None:
                whole[local] = part[0]
    w1q, w2q, *parts = made
    for name, (scale, scale_2, zp) in (("w1", parts[:3]), ("w2", parts[3:])):
        config = replace(config, **{name: replace(getattr(config, name), scale=scale, scale_2=scale_2, zp=zp)})
    return w1q, w2q, config


def _arrays(result: tuple[Array, Array, FusedMoEQuantConfig]) -> list[Any]:
    """Return the codes and everything of the config that has one row an expert."""
    w1, w2, config = result
    return [w1, w2, *(getattr(desc, field) for desc in (config.w1, config.w2) for field in ("scale", "scale_2", "zp"))]


def _room(array: Any, count: int) -> Any:
    return None if array is None else np.empty((count, *array.shape[1:]), array.dtype)
