"""The batched experts' own promise: rows that hold no token are 0, whatever memory held."""

from __future__ import annotations

import numpy as np

import pymoe
from pymoe.config import FusedMoEConfig
from pymoe.contracts import ExpertTokensMetadata
from pymoe.quantization import FUSED_MOE_UNQUANTIZED_CONFIG


def test_unused_rows_of_a_slab_are_zero():
    E, K, width, capacity = 3, 8, 4, 5
    rng = np.random.default_rng(0)
    experts = pymoe.NaiveBatchedExperts(FusedMoEConfig(E, 1, K, width, E), FUSED_MOE_UNQUANTIZED_CONFIG, capacity, 1)
    output = np.full((E, capacity, K), np.nan, np.float32)
    counts = [2, 0, 5]
    experts.apply(
        output, rng.standard_normal((E, capacity, K), dtype=np.float32),
        rng.standard_normal((E, 2 * width, K), dtype=np.float32), rng.standard_normal((E, K, width), dtype=np.float32),
        None, None, pymoe.MoEActivation.SILU, E, None, None, None, np.empty((E, capacity, width), np.float32),
        np.empty((E, capacity, K), np.float32), ExpertTokensMetadata.make_from_list(counts), False,
    )  # fmt: skip
    for slab, count in zip(output, counts, strict=True):
        assert slab[:count].any(axis=1).all() and not slab[count:].any()
