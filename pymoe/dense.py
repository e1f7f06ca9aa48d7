"""The dense neighbours of the routed experts: the router's gate and the shared experts."""

from __future__ import annotations

from typing import Any

import numpy as np

from pymoe import checks
from pymoe.activations import ActivationConfig, MoEActivation, RegisteredActivation
from pymoe.codec.weights import WeightOperand
from pymoe.config import resolve_activation
from pymoe.device.arrays import as_array, as_given, device_of, is_cuda, namespace
from pymoe.errors import ShapeError, complaint
from pymoe.experts.cuda_weights import WeightsCache, dense_rows
from pymoe.experts.routed import ExpertWeights
from pymoe.ops.grouped_gemm import grouped_gemm
from pymoe.quantization import FUSED_MOE_UNQUANTIZED_CONFIG

__all__ = ["Gate", "SharedExperts", "add_shared"]

Array = Any

_CHUNK_ROWS = 16384
"""Rows of the shared experts at a time: bounds the intermediate's memory."""


class Gate:
    """The router's linear layer: ``logits = x @ weight.T + bias`` in float32, each row by itself.

    Parameters
    ----------
    weight : ndarray, (E, K), float
        Row = expert.  Borrowed, never written.
    bias : ndarray, (E,), float, optional

    Raises
    ------
    ShapeError, DTypeError
        An array is not of that form.
    """

    def __init__(self, weight: Array, bias: Array | None = None) -> None:
        self.weight = as_array("Gate", "weight", weight)
        checks.shape("Gate", "weight", self.weight, (None, None))
        checks.float_dtype("Gate", "weight", self.weight)
        self.bias = None if bias is None else as_array("Gate", "bias", bias)
        if self.bias is not None:
            checks.shape("Gate", "bias", self.bias, (self.weight.shape[0],))
            checks.float_dtype("Gate", "bias", self.bias)
            checks.one_device("Gate", weight=self.weight, bias=self.bias)
        weight = self.weight.astype(np.float32) if self.weight.dtype == np.float64 else self.weight
        if is_cuda(weight):
            weight = namespace(weight).ascontiguousarray(weight)
        bias = None if self.bias is None else namespace(weight).ascontiguousarray(self.bias, dtype=np.float32)
        self._operand = WeightOperand.unquantized(weight[None], None if bias is None else bias[None])
        self._weight, self._bias = weight, bias

    def __call__(self, hidden_states: Array) -> Array:
        """Return the logits, (M, E) float32, of tokens (M, K)."""
        x = as_array("Gate", "hidden_states", hidden_states)
        checks.hidden("Gate", "hidden_states", x, self.weight.shape[1])
        checks.one_device("Gate", weight=self.weight, hidden_states=x)
        if not is_cuda(x):
            logits = grouped_gemm(x, self._operand, np.array([0, x.shape[0]]))
            return as_given(logits, hidden_states)
        from pymoe.ops.route import _cuda_gate

        with device_of(x):
            logits = _cuda_gate.gate(namespace(x).ascontiguousarray(x), self._weight, self._bias)
        return as_given(logits, hidden_states)


class SharedExperts:
    """A dense expert that every token takes: ``w2 @ act(w1 @ x)``, times ``sigmoid(gate(x))`` if there is a gate.

    Parameters
    ----------
    w1 : ndarray, (N, K), w2 : ndarray, (K, I)
        Weights of one dtype, N = 2 I when gated (gate rows, then up rows).  Borrowed, never written.
    activation : MoEActivation, str or ActivationConfig
    gate : ndarray, (1, K) or (K,), or Gate, optional
        One logit a token (Qwen2-MoE).

    Raises
    ------
    ShapeError, DTypeError
        An array is not of that form.
    """

    def __init__(
        self,
        w1: Array,
        w2: Array,
        activation: MoEActivation | RegisteredActivation | ActivationConfig | str = "silu",
        gate: Array | Gate | None = None,
    ) -> None:
        call = "SharedExperts"
        w1, w2 = as_array(call, "w1", w1), as_array(call, "w2", w2)
        checks.shape(call, "w1", w1, (None, None))
        checks.shape(call, "w2", w2, (None, None))
        self.activation = resolve_activation(call, activation, FUSED_MOE_UNQUANTIZED_CONFIG)
        checks.weights(call, w1[None], w2[None], w1.shape[1], self.activation, FUSED_MOE_UNQUANTIZED_CONFIG)
        checks.one_device(call, w1=w1, w2=w2)
        self.w1, self.w2 = w1, w2
        self._stacked = w1[None], w2[None]
        self._weights = WeightsCache()
        self.gate = None if gate is None else self._as_gate(gate)

    def _as_gate(self, gate: Array | Gate) -> Gate:
        if not isinstance(gate, Gate):
            weight = as_array("SharedExperts", "gate", gate)
            gate = Gate(weight[None] if weight.ndim == 1 else weight)
        if gate.weight.shape != (1, self.w1.shape[1]):
            rule = f"have shape (1, {self.w1.shape[1]})"
            raise ShapeError(complaint("SharedExperts", "gate", rule, gate.weight.shape))
        return gate

    def __call__(self, hidden_states: Array) -> Array:
        """Return the shared output, (M, K) float32, of tokens (M, K); the intermediate is rounded to their dtype."""
        x = as_array("SharedExperts", "hidden_states", hidden_states)
        checks.hidden("SharedExperts", "hidden_states", x, self.w1.shape[1])
        checks.one_device("SharedExperts", w1=self.w1, hidden_states=x)
        with device_of(x):
            y = self._on_device(x) if is_cuda(x) else self._on_host(x)
            if self.gate is not None:
                with np.errstate(all="ignore"):
                    y *= 1 / (1 + namespace(x).exp(-self.gate(x)))
        return as_given(y, hidden_states)

    def _on_host(self, x: Array) -> Array:
        weights = ExpertWeights.of(self.w1[None], self.w2[None], self.activation, FUSED_MOE_UNQUANTIZED_CONFIG, x.dtype)
        y = np.empty((x.shape[0], self.w2.shape[0]), np.float32)
        for start in range(0, x.shape[0], _CHUNK_ROWS):
            rows = np.arange(start, min(start + _CHUNK_ROWS, x.shape[0]))
            y[rows] = weights.routed_rows(x, None, np.array([0, len(rows)]), rows, a2_scale=None)
        return y

    def _on_device(self, x: Array) -> Array:
        weights = self._weights.of(*self._stacked, self.activation, FUSED_MOE_UNQUANTIZED_CONFIG, x.dtype)
        chunks = [dense_rows(weights, x[i : i + _CHUNK_ROWS]) for i in range(0, max(len(x), 1), _CHUNK_ROWS)]
        return chunks[0] if len(chunks) == 1 else namespace(x).concatenate(chunks)


def add_shared(call: str, routed: Array, beside: Any, dtype: Any, out: Array | None) -> Array:
    """Return ``routed + beside``, summed in float32 and rounded once to `dtype`; written to `out` where one is given.

    `routed` (M, K) float32 is overwritten.
    """
    beside = as_array(call, "the shared experts' output", beside)
    checks.shape(call, "the shared experts' output", beside, routed.shape)
    checks.one_device(call, **{"hidden_states": routed, "the shared experts' output": beside})
    out = namespace(routed).empty(routed.shape, dtype) if out is None else out
    with np.errstate(all="ignore"):
        routed += beside.astype(np.float32)
        out[...] = routed.astype(dtype)
    return out
