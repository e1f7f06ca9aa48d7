"""Which tokens some expert here computes."""

from __future__ import annotations

from typing import Any

import numpy as np

from pymoe.device.arrays import is_cuda
from pymoe.tokens import local_ids

__all__ = ["live_tokens"]

Array = Any


def live_tokens(topk_ids: Array, num_experts: int, expert_map: Array | None) -> Array:
    """Return (M,) bool, uint8 on a device: tokens that some expert here computes.

    The others are padding, and take no part in a scale that all tokens share.
    """
    if is_cuda(topk_ids):
        from pymoe.ops.permute import _cuda

        # Whatever a map's numbers are, those from 0 on are experts here: its entries are checked elsewhere.
        return _cuda.live_tokens(topk_ids, num_experts, np.iinfo(np.int32).max, expert_map)
    return (local_ids(topk_ids, num_experts, expert_map) >= 0).any(axis=1)
