"""The definition of unpermute: an ordered sum over the slots of a token."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = Any


def unpermute(rows: Array, slot_to_row: Array, topk_weights: Array | None, out: Array) -> None:
    total = np.zeros(out.shape, np.float32)
    with np.errstate(all="ignore"):
        for j in range(slot_to_row.shape[1]):
            live = np.flatnonzero(slot_to_row[:, j] >= 0)
            term = rows[slot_to_row[live, j]].astype(np.float32, copy=False)
            total[live] += term if topk_weights is None else term * topk_weights[live, j, None]
        out[...] = total
