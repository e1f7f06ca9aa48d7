"""What every contender must compute before it is timed: the layer in float64, and how far from it one may be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pymoe.bench.cases import Item, Weights
from pymoe.codec.weights import WeightOperand
from pymoe.ops.quantize import dequantize_activations, quantize_activations, quantize_experts
from pymoe.quantization import FusedMoEQuantConfig

__all__ = ["Definition", "Quantized", "frobenius", "limit_for"]

Array = Any

BF16_ROUNDINGS = 3.0e-3
"""Of h and of y to bfloat16: sqrt(2) * 0.42 * 2**-8 = 2.33e-3, and 30 % (tests/tolerance.py has the derivation)."""

REQUANTIZED = 7.5e-3
"""Of a scheme that requantizes h: a code may fall to the other side of an edge (tests/tolerance.py)."""

UNFUSED_BF16 = 1.0e-2
"""Of a peer that rounds every step to bfloat16 (gate and up, silu, their product, the down projection, its weighted
rows, up to topk partial sums): ten roundings of rms 0.42 * 2**-8 make 5.2e-3, doubled."""


def limit_for(contender: str, scheme: str, K: int, I: int) -> float:
    """Return the largest relative Frobenius error of a contender that computes in `scheme`."""
    if scheme == "fp32":
        # Twice the probable error of float32 sums over k.
        return 2 * max(K, I) ** 0.5 * 2.0**-24
    if contender == "torch":
        return UNFUSED_BF16
    weight_only = scheme in ("bf16", "int4") or "a16" in scheme
    return BF16_ROUNDINGS if weight_only else REQUANTIZED


def frobenius(y: Array, expected: Array) -> float:
    """Return the relative Frobenius error; infinite where `y` has another shape or is not finite."""
    if y.shape != expected.shape or not np.isfinite(y).all():
        return float("inf")
    return float(np.linalg.norm(y.astype(np.float64) - expected) / np.linalg.norm(expected))


@dataclass(frozen=True)
class Quantized:
    """One weight set under a scheme, and the bytes that a call reads of each of its experts."""

    w1: Array
    w2: Array
    quant_config: FusedMoEQuantConfig

    @classmethod
    def of(cls, weights: Weights, scheme: str) -> Quantized:
        """Cast or quantize `weights`; fp32 and bf16 copy nothing that is there already."""
        if scheme in ("fp32", "bf16"):
            same = weights.cast("float32" if scheme == "fp32" else "bfloat16")
            _, _, config = quantize_experts(weights.w1[:1, :2, :2], weights.w2[:1, :2, :1], scheme)
            return cls(same.w1, same.w2, config)
        return cls(*quantize_experts(weights.w1, weights.w2, scheme))

    @property
    def expert_bytes(self) -> float:
        """Bytes of codes, scales and zero points of one expert."""
        described = [getattr(d, name) for d in (self.quant_config.w1, self.quant_config.w2) for name in
                     ("scale", "scale_2", "zp")]  # fmt: skip
        return sum(a.nbytes for a in (self.w1, self.w2, *described) if a is not None) / len(self.w1)


class Definition:
    """The layer of one weight set in float64, on the numbers that its codes stand for.

    Where the scheme quantizes activations, tokens and the intermediate pass through their codes; nothing else is
    rounded, so that the limits are those of fused arithmetic.
    """

    def __init__(self, weights: Weights, quantized: Quantized) -> None:
        self._gate = weights.gate.astype(np.float64)
        config = self._config = quantized.quant_config
        packed = 2 if config.weight_key is not None and config.weight_key.is_packed else 1
        self._operands = [
            WeightOperand.from_quant_config(w, desc, config, w.shape[2] * packed)
            for w, desc in ((quantized.w1, config.w1), (quantized.w2, config.w2))
        ]

    def __call__(self, item: Item) -> Array:
        """Return y (M, K) in float64."""
        x, ids = item.x, item.ids
        chosen = np.take_along_axis(x.astype(np.float64) @ self._gate.T, ids, axis=1)
        weights = np.exp(chosen - chosen.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        rows = self._through_codes(x, "a1")
        y = np.zeros(x.shape)
        for e in np.unique(ids):
            tokens, slots = np.nonzero(ids == e)
            gate, up = np.split(rows[tokens] @ self._matrix(0, e).T, 2, axis=1)
            h = self._through_codes(gate / (1 + np.exp(-gate)) * up, "a2")
            y[tokens] += weights[tokens, slots, None] * (h @ self._matrix(1, e).T)
        return y

    def _through_codes(self, rows: Array, which: str) -> Array:
        """Return the rows as the scheme's codes hold them, float64; as they are where it has none."""
        if self._config.activation_key is None:
            return rows.astype(np.float64)
        codes, scale = quantize_activations(rows.astype(np.float32), self._config, which)
        return dequantize_activations(codes, scale, self._config).astype(np.float64)

    def _matrix(self, which: int, e: int) -> Array:
        operand = self._operands[which]
        w = operand.decode(e).astype(np.float64)
        return w if operand.row_scale is None else w * operand.row_scale[e][:, None]
