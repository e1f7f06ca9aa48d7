"""What a quantization scheme is: keys, group shapes and the quant config.  No arithmetic stands here.

Names and meaning follow vLLM's ``QuantKey`` and ``FusedMoEQuantConfig``; ``docs/numerics`` states every scheme bit
for bit, ``pymoe.ops.quantize`` computes it.
"""

from pymoe.quantization.config import FUSED_MOE_UNQUANTIZED_CONFIG, FusedMoEQuantConfig, FusedMoEQuantDesc
from pymoe.quantization.keys import *  # noqa: F403  every key under its own name
from pymoe.quantization.keys import QUANT_KEYS, GroupShape, QuantKey, ScaleDesc, kTf32

__all__ = [
    "FUSED_MOE_UNQUANTIZED_CONFIG",
    "QUANT_KEYS",
    "FusedMoEQuantConfig",
    "FusedMoEQuantDesc",
    "GroupShape",
    "QuantKey",
    "ScaleDesc",
    "kTf32",
    *QUANT_KEYS,
]
