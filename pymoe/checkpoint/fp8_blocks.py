"""Matrices in e4m3 with one scale for each block of 128 by 128, which lies beside the weight, perhaps in another shard.

The scale's tensor is called ``weight_scale_inv``, and despite that name it multiplies.  It is float32, bfloat16 or
e8m0; where quantization_config says ``scale_fmt: ue8m0`` every scale is a power of two, and activations get such scales
too.  Sources: DeepSeek-V3's ``kernel.py``; transformers ``FP8Linear``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from pymoe.checkpoint.fields import expect
from pymoe.checkpoint.safetensors import SafetensorsFolder, fail
from pymoe.codec.e8m0 import decode_e8m0
from pymoe.ops.quantize import dequantize

Array = Any

BLOCK = 128
SCALE = "_scale_inv"
"""What stands behind the name of the weight."""
QUANTIZATION: dict[str, tuple[Any, ...]] = {
    "quant_method": ("fp8",),
    "weight_block_size": ([BLOCK, BLOCK],),
    "activation_scheme": ("dynamic", None),
    "fmt": ("e4m3", None),
    "scale_fmt": ("ue8m0", "float", None),
}
"""The values that these fields of quantization_config may have; None is a missing one."""


@dataclass(frozen=True)
class ScaleForm:
    """Whether scales are powers of two, stored and computed with as e8m0, or any float32."""

    is_e8m0: bool

    @property
    def dtype(self) -> np.dtype:
        """Of the scales in memory."""
        return np.dtype(np.uint8 if self.is_e8m0 else np.float32)

    def read(self, tensors: SafetensorsFolder, name: str) -> Array:
        """Return a matrix of scales in `dtype`."""
        scale = scales(tensors, name)
        if not self.is_e8m0:
            return scale
        codes = (scale.view(np.uint32) >> 23).astype(np.uint8)
        if not np.array_equal(decode_e8m0(codes), scale, equal_nan=True):
            raise fail(tensors.folder, f"hold powers of two in {name}, as scale_fmt says", "another number")
        return codes


def scales(tensors: SafetensorsFolder, name: str) -> Array:
    """Return a matrix of scales in float32."""
    stored = tensors[name]
    return decode_e8m0(stored.view(np.uint8)) if stored.dtype.itemsize == 1 else stored.astype(np.float32)


def check_blocks(tensors: SafetensorsFolder, name: str) -> None:
    """Refuse a weight whose scales are not there or not of its shape, by its header."""
    rows, columns = tensors.shape(name)
    shape = (-(-rows // BLOCK), -(-columns // BLOCK))
    expect(tensors, name + SCALE, shape, ("float32", "bfloat16", "float8_e8m0fnu"))


def decoded(tensors: SafetensorsFolder, name: str) -> Array:
    """Return a weight in numbers, float32."""
    codes = tensors[name].view(np.uint8)
    return dequantize(codes, scales(tensors, name + SCALE), "kFp8Static128BlockSym")


def row_block(width: int) -> int:
    """Return the rows of a block of which both gate's and up's `width` rows hold whole ones."""
    return math.gcd(width, BLOCK)


def spread_rows(scale: Array, rows: int, count: int) -> Array:
    """Return the scales of blocks of 128 rows for `count` blocks of `rows` rows."""
    return np.repeat(scale, BLOCK // rows, axis=0)[:count]
