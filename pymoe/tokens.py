"""What happens to the tokens before the experts see them: whose they are, and the router weight on the input."""

from __future__ import annotations

from typing import Any

import numpy as np

from pymoe.device.arrays import namespace
from pymoe.errors import ArgumentError, complaint

Array = Any


def local_ids(topk_ids: Array, num_experts: int, expert_map: Array | None) -> Array:
    """Return the local expert of each slot, -1 where this process has none; no id is used as an index unchecked."""
    xp = namespace(topk_ids)
    legal = (topk_ids >= 0) & (topk_ids < num_experts)
    if expert_map is None:
        return xp.where(legal, topk_ids, -1)
    if num_experts == 0:
        return xp.full(topk_ids.shape, -1, np.int32)
    return xp.where(legal, expert_map[xp.where(legal, topk_ids, 0)], -1)


def weigh_input(call: str, a1: Array, topk_weights: Array, apply_router_weight_on_input: bool) -> Array:
    """Return `a1`, or a new array of `a1` times its only router weight: float32 product, one rounding to a1's dtype."""
    if not apply_router_weight_on_input:
        return a1
    if topk_weights.shape[1] != 1:
        got = f"True with topk {topk_weights.shape[1]}"
        raise ArgumentError(complaint(call, "apply_router_weight_on_input", "be False unless topk is 1", got))
    with np.errstate(all="ignore"):
        return (a1.astype(np.float32) * topk_weights.astype(np.float32)).astype(a1.dtype)
