"""The stages of a layer, one function each, as ``pymoe.ops.<stage>``."""

from pymoe.ops.activation import activation
from pymoe.ops.grouped_gemm import grouped_gemm
from pymoe.ops.permute import moe_align_block_size, permute
from pymoe.ops.quantize import dequantize, quantize
from pymoe.ops.route import route
from pymoe.ops.unpermute import unpermute
from pymoe.ops.weight_reduce import weight_reduce

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
