"""What is left to do to the experts' output: weigh it by the router's weights, sum over the slots."""

from __future__ import annotations

import abc
from typing import Any

Array = Any


class TopKWeightAndReduce(abc.ABC):
    """One way to weigh and reduce; the experts name theirs by ``finalize_weight_and_reduce_impl``."""

    @abc.abstractmethod
    def apply(
        self,
        output: Array | None,
        fused_expert_output: Array,
        topk_weights: Array,
        topk_ids: Array,
        apply_router_weight_on_input: bool,
    ) -> Array:
        """Apply `topk_weights` to `fused_expert_output` and reduce it; `output` is created when None.

        Sums run in float32 over slots 0..topk-1; a slot whose id is negative contributes exactly 0.
        """
