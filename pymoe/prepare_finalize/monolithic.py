"""Prepare/finalize of one process for experts that route themselves."""

from __future__ import annotations

from typing import Any

from pymoe.contracts import (
    FusedMoEActivationFormat,
    FusedMoEPrepareAndFinalizeMonolithic,
    PrepareMonolithicResult,
)
from pymoe.ops.quantize import quantize_activations
from pymoe.quantization import FusedMoEQuantConfig

Array = Any


class SingleProcessMonolithicPrepareAndFinalize(FusedMoEPrepareAndFinalizeMonolithic):
    """Quantize all rows before, hand the output through after: which rows are padding is not known yet."""

    @property
    def activation_format(self) -> FusedMoEActivationFormat:
        return FusedMoEActivationFormat.Standard

    def topk_indices_dtype(self) -> Any:
        return None

    def max_num_tokens_per_rank(self) -> int | None:
        return None

    def output_is_reduced(self) -> bool:
        return False

    def prepare(
        self,
        a1: Array,
        router_logits: Array,
        quant_config: FusedMoEQuantConfig,
        defer_input_quant: bool = False,
    ) -> PrepareMonolithicResult:
        if defer_input_quant or quant_config.quant_dtype is None:
            return PrepareMonolithicResult(a1, None, router_logits)
        a1q, a1q_scale = quantize_activations(a1, quant_config, "a1")
        return PrepareMonolithicResult(a1q, a1q_scale, router_logits)

    def finalize(self, fused_expert_output: Array) -> Array:
        return fused_expert_output
