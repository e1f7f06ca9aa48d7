"""The left operand of a grouped GEMM, and which numbers the products are taken of."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pymoe.codec.fp4 import unpack_nibbles
from pymoe.codec.weights import WeightOperand, code_table
from pymoe.device.arrays import BFLOAT16, as_float32
from pymoe.quantization import QuantKey

Array = Any


INT32_PRODUCTS = 1 << 17
"""Products of two int8 codes from which on their sum may leave int32: 2^17 * 128 * 128 = 2^31."""


class Rows(NamedTuple):
    """Rows of tokens or of the intermediate.

    `values` are floats, or codes of `key`, one byte each or packed.  `factors` are float32: one or (rows,) where they
    multiply whole sums, (rows, groups) where they multiply partial sums or, if `by_value`, the codes themselves.
    """

    values: Array
    key: QuantKey | None = None
    factors: Array | None = None
    by_value: bool = False

    @property
    def sum_factors(self) -> Array | None:
        """Factors that are still to be applied to sums."""
        return None if self.by_value else self.factors

    def as_float32(self) -> Array:
        """Return (rows, K) float32, scaled where scales are by value; never to be written."""
        if self.key is None:
            return as_float32(self.values)
        values = code_table(self.key.dtype)[self._codes()]
        if self.by_value:
            assert self.factors is not None
            extent = self.key.scale.group_shape.col
            with np.errstate(all="ignore"):
                for g in range(self.factors.shape[1]):
                    values[:, g * extent : (g + 1) * extent] *= self.factors[:, g : g + 1]
        return values

    def _codes(self) -> Array:
        codes = self.values.view(np.uint8)
        return unpack_nibbles(codes) if self.key is not None and self.key.is_packed else codes


def group_of(rows: Rows, w: WeightOperand) -> int:
    """Return the extent along k whose partial sum is scaled at once; K where scales leave the whole sum."""
    in_groups = rows.sum_factors is not None and rows.sum_factors.ndim == 2
    return w.block[1] if in_groups else w.K


def product_of(rows: Rows, w: WeightOperand) -> str:
    """Return in what the products may be taken, exactly: "int8", "bfloat16", or "float32", which takes all."""
    dtype = rows.values.dtype if rows.key is None else rows.key.dtype
    if w.key is None:
        return "bfloat16" if dtype == BFLOAT16 and w.codes.dtype == BFLOAT16 else "float32"
    if w.key.dtype == "int8" and dtype == "int8":
        return "int8" if w.K < INT32_PRODUCTS else "float32"
    if rows.key is None:
        return "bfloat16" if dtype == BFLOAT16 else "float32"
    return "float32" if rows.by_value and rows.key.scale.dtype != "e8m0" else "bfloat16"
