"""The definition of weight_reduce: an ordered sum along the slot axis."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = Any


def weight_reduce(slots: Array, topk_weights: Array | None, topk_ids: Array | None, out: Array) -> None:
    total = np.zeros(out.shape, np.float32)
    with np.errstate(all="ignore"):
        for j in range(slots.shape[1]):
            live = slice(None) if topk_ids is None else np.flatnonzero(topk_ids[:, j] >= 0)
            term = slots[live, j].astype(np.float32, copy=False)
            total[live] += term if topk_weights is None else term * topk_weights[live, j, None]
        out[...] = total
