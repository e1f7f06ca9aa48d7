"""The stages of a layer, one function each, as ``pymoe.ops.<stage>``."""

import contextlib

from pymoe.ops.activation import activation
from pymoe.ops.permute import moe_align_block_size, permute
from pymoe.ops.unpermute import unpermute
from pymoe.ops.weight_reduce import weight_reduce

with contextlib.suppress(ImportError):
    from pymoe.ops.quantize import dequantize, quantize
with contextlib.suppress(ImportError):
    from pymoe.ops.route import route
with contextlib.suppress(ImportError):
    from pymoe.ops.grouped_gemm import grouped_gemm

__all__ = [
    "activation",
    "dequantize",
    "grouped_gemm",
    "moe_align_block_size",
    "permute",
    "quantize",
    "route",
    "unpermute",
    "weight_reduce",
]
