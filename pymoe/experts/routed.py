"""The middle of every layer: GEMM1, activation, rounding or requantization, GEMM2, on rows grouped by expert."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pymoe.activations import ActivationConfig, MoEActivation, RegisteredActivation
from pymoe.codec.weights import WeightOperand
from pymoe.ops.activation import activation as activate
from pymoe.ops.grouped_gemm import grouped_gemm
from pymoe.ops.quantize import quantize_activations
from pymoe.quantization import FusedMoEQuantConfig, QuantKey

Array = Any

# Code dtypes of (weight, activation) that the CPU multiplies; None is activations as they are.
_CODES = {
    ("fp8", None), ("fp8", "fp8"), ("int8", "int8"), ("uint8b128", None), ("uint8", None), ("uint4b8", None),
    ("uint4", None), ("fp4", None), ("fp4", "fp4"), ("fp4", "fp8"),
}  # fmt: skip


def supports_quant_scheme(weight_key: QuantKey | None, activation_key: QuantKey | None) -> bool:
    """Whether `ExpertWeights` multiplies this pair: both sides grouped along k in the same way, or neither."""
    if weight_key is None:
        return activation_key is None
    if activation_key is None:
        return (weight_key.dtype, None) in _CODES
    if (weight_key.dtype, activation_key.dtype) not in _CODES:
        return False
    grouped = [key.scale.group_shape.col > 1 for key in (weight_key, activation_key)]
    if not any(grouped):
        return True
    along_k = [key.scale.group_shape.col for key in (weight_key, activation_key)]
    return along_k[0] == along_k[1] and weight_key.scale.dtype == activation_key.scale.dtype


@dataclass(frozen=True)
class ExpertWeights:
    """Both weights of a layer with all that multiplying by them needs; built for one call, copies nothing.

    `hidden_dtype` is what an unquantized intermediate is rounded to; `backend` is that of the ops.
    """

    w1: WeightOperand
    w2: WeightOperand
    activation: ActivationConfig
    quant_config: FusedMoEQuantConfig
    hidden_dtype: Any
    backend: str | None = None

    @classmethod
    def of(
        cls,
        w1: Array,
        w2: Array,
        activation: MoEActivation | RegisteredActivation | ActivationConfig,
        quant_config: FusedMoEQuantConfig,
        hidden_dtype: Any,
        backend: str | None = None,
    ) -> ExpertWeights:
        """Read the operands off the arrays (E_local, N, K), (E_local, K, I) and the config."""
        act = activation if isinstance(activation, ActivationConfig) else ActivationConfig(activation)
        per_byte = 2 if quant_config.weight_key is not None and quant_config.weight_key.is_packed else 1
        operand1 = WeightOperand.from_quant_config(
            w1, quant_config.w1, quant_config, w1.shape[2] * per_byte, interleaved=act.is_interleaved
        )
        operand2 = WeightOperand.from_quant_config(w2, quant_config.w2, quant_config, w2.shape[2] * per_byte)
        return cls(operand1, operand2, act, quant_config, hidden_dtype, backend)

    def routed_rows(
        self,
        a: Array,
        a_scale: Array | None,
        expert_offsets: Array,
        gather: Array,
        *,
        a2_scale: Array | None,
        up: Array | None = None,
        h: Array | None = None,
    ) -> Array:
        """Return GEMM2's rows, (P, K) float32, for row ``gather[r]`` of `a` and the expert that owns row r.

        Parameters
        ----------
        a : ndarray, (rows, K)
            Hidden dtype, or codes with `a_scale`.
        expert_offsets : ndarray, (E_local + 1,)
            Rows of expert e are ``expert_offsets[e]:expert_offsets[e + 1]``.
        gather : ndarray, (P,)
            Source row of each routed row.
        a2_scale : ndarray, optional
            Static scale of the intermediate.
        up, h : ndarray, float32, (P, max(N, K)) and (P, I) flat, optional
            Memory for the GEMM outputs and the intermediate; the result lies in `up`.
        """
        config, key = self.quant_config, self.quant_config.activation_key
        P, N, K = len(gather), self.w1.codes.shape[1], self.w2.codes.shape[1]
        gate_up = None if up is None else up[: P * N].reshape(P, N)
        rows = None if up is None else up[: P * K].reshape(P, K)
        width = self.activation.width(N)
        dtype = np.dtype(np.float32 if key is not None else self.hidden_dtype)
        hidden = np.empty((P, width), dtype) if h is None else h.view(dtype)[: P * width].reshape(P, width)
        gate_up = grouped_gemm(
            a, self.w1, expert_offsets, gather=gather, a_scale=a_scale, a_key=key,
            out=gate_up, backend=self.backend,
        )  # fmt: skip
        hidden = activate(gate_up, self.activation, out=hidden, backend=self.backend)
        scale = None
        if key is not None:
            hidden, scale = quantize_activations(hidden, config, "a2", scale=a2_scale)
        return grouped_gemm(
            hidden, self.w2, expert_offsets, a_scale=scale, a_key=key, out=rows,
            backend=self.backend,
        )  # fmt: skip
