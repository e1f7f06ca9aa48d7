"""The middle of every layer on a GPU: GEMM1 with its activation, requantization where the scheme asks for it, GEMM2."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pymoe import checks
from pymoe.activations import ActivationConfig
from pymoe.codec.weights import WeightOperand
from pymoe.config import FusedMoEParallelConfig
from pymoe.contracts.experts import Activation
from pymoe.device.arena import padded
from pymoe.experts.routed import supports_quant_scheme
from pymoe.ops.quantize import quantize_activations
from pymoe.quantization import FusedMoEQuantConfig, QuantKey, kTf32

__all__ = ["CudaAbilities", "CudaExpertWeights", "WeightsCache", "dense_rows", "intermediate_bytes"]

Array = Any
Empty = Callable[..., Array]


class CudaAbilities:
    """Every activation, pair of schemes and shape; expert maps too."""

    def supports_expert_map(self) -> bool:
        return True

    @staticmethod
    def _supports_current_device() -> bool:
        try:
            import cupy
        except ImportError:
            return False
        return bool(cupy.is_available())

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return True

    @staticmethod
    def _supports_activation(activation: Activation) -> bool:
        return True

    @staticmethod
    def _supports_quant_scheme(weight_key: QuantKey | None, activation_key: QuantKey | None) -> bool:
        return (weight_key, activation_key) == (kTf32, None) or supports_quant_scheme(weight_key, activation_key)

    @staticmethod
    def _supports_parallel_config(moe_parallel_config: FusedMoEParallelConfig) -> bool:
        return True


@dataclass(frozen=True)
class CudaExpertWeights:
    """Both weights of a layer with all that multiplying by them needs, on one device."""

    w1: WeightOperand
    w2: WeightOperand
    activation: ActivationConfig
    quant_config: FusedMoEQuantConfig
    hidden_dtype: np.dtype

    @classmethod
    def of(
        cls, w1: Array, w2: Array, activation: Activation | ActivationConfig, config: FusedMoEQuantConfig, dtype: Any
    ) -> CudaExpertWeights:
        """Read the operands off the arrays (E_local, N, K), (E_local, K, I) and the config."""
        act = activation if isinstance(activation, ActivationConfig) else ActivationConfig(activation)
        key = config.weight_key
        per_byte = 2 if key is not None and key.is_packed else 1
        K, width = w1.shape[2] * per_byte, w2.shape[2] * per_byte
        config = checks.quant_config("experts", config, w1, w1.shape[1], K, width)
        first = WeightOperand.from_quant_config(w1, config.w1, config, K, interleaved=act.is_interleaved)
        return cls(first, WeightOperand.from_quant_config(w2, config.w2, config, width), act, config, np.dtype(dtype))

    def are_direct(self, rows_dtype: Any) -> bool:
        """Return whether the answers of both GEMMs, GEMM2's of `rows_dtype`, can go from registers to their rows."""
        from pymoe.ops.grouped_gemm import _cuda as gemm

        K, width = self.w2.codes.shape[1], self.w2.K
        first = gemm.is_direct(self.activation, width, self.hidden_dtype, self.hidden_dtype)
        return first and gemm.is_direct(None, K, self.hidden_dtype, rows_dtype)

    def routed_rows(
        self,
        a: Array,
        a_scale: Array | None,
        rows: Any,
        out: Array,
        *,
        source: tuple[Array, int] | None = None,
        live_rows: Array | None = None,
        routed: Any = None,
        empty: Empty,
    ) -> None:
        """Write GEMM2's rows to `out`, (P, K) of any hidden dtype, for the rows that the work list names.

        Or, where `routed` says so, their sums by token, (M, K) float32.

        Parameters
        ----------
        a : cupy.ndarray, (rows, K)
            Hidden dtype, or codes with `a_scale`.
        rows : DeviceRowMap, DeviceSlabMap or TileList
            The work list.
        source : (cupy.ndarray, int), optional
            Row r reads row ``source[0][r] // source[1]`` of `a`; None: row r itself.
        live_rows : cupy.ndarray, (n,), int32, optional
            How many rows at the front of each of n equal slabs are live; the others are not quantized.
        routed : Routed, optional
            The weights that multiply rows in float32 before they are rounded, or added to tokens' rows of `out`.
        empty : callable
            Gives the scratch memory, `intermediate_bytes` in all.
        """
        from pymoe.ops.grouped_gemm import _cuda as gemm
        from pymoe.ops.unpermute import _cuda as unpermute

        key = self.quant_config.activation_key
        width = self.activation.width(self.w1.codes.shape[1])
        P = out.shape[0] if routed is None else routed.row_to_slot.shape[0]
        h = empty((P, width), np.dtype("float32") if key is not None else self.hidden_dtype)
        gather, div = (None, 1) if source is None else source
        gemm.grouped_gemm(
            a, self.w1, rows, gather=gather, gather_div=div, a_scale=a_scale, a_key=key, activation=self.activation,
            out=h,
        )  # fmt: skip
        scale = None
        if key is not None:
            h, scale = quantize_activations(h, self.quant_config, "a2", live_rows=live_rows, empty=empty)
        if routed is not None and routed.adds_to_tokens:
            unpermute.zero_sums(out)
        gemm.grouped_gemm(h, self.w2, rows, a_scale=scale, a_key=key, routed=routed, out=out)


def dense_rows(weights: CudaExpertWeights, x: Array) -> Array:
    """Return what the only expert of `weights` makes of all tokens `x` (M, K), (M, K) float32."""
    import cupy

    from pymoe.ops.grouped_gemm import _cuda as gemm
    from pymoe.ops.permute import _cuda as sort

    M = x.shape[0]
    out = cupy.empty((M, weights.w2.codes.shape[1]), np.float32)
    if M:
        tile_rows = gemm.choose_tile_rows(M, 1, 1)
        tiles = sort.work_list(cupy.full((1,), M, np.int32), M, tile_rows)
        weights.routed_rows(x, None, gemm.TileList(*tiles, tile_rows), out, empty=cupy.empty)
    return out


class WeightsCache:
    """The operands of the weights that were used last: building them looks at every array of a scheme."""

    def __init__(self) -> None:
        self._known: tuple[Any, ...] = ()

    def of(
        self, w1: Array, w2: Array, activation: Activation | ActivationConfig, config: FusedMoEQuantConfig, dtype: Any
    ) -> CudaExpertWeights:
        """Return what `CudaExpertWeights.of` does."""
        known = self._known
        if known and known[0]() is w1 and known[1]() is w2 and known[2] == activation:
            return known[3]
        weights = CudaExpertWeights.of(w1, w2, activation, config, dtype)
        self._known = (weakref.ref(w1), weakref.ref(w2), activation, weights)
        return weights


def intermediate_bytes(rows: int, width: int, config: FusedMoEQuantConfig, hidden_dtype: Any) -> int:
    """Return the scratch bytes of `CudaExpertWeights.routed_rows` for `rows` rows of an intermediate of width I."""
    if config.activation_key is None:
        return padded((rows, width), hidden_dtype)
    extent = config.activation_key.scale.group_shape.col
    groups = -(-width // extent) if extent > 1 else 1
    codes_and_scales = padded((rows, width), np.uint8) + 2 * padded((rows, groups), np.float32)
    return padded((rows, width), np.float32) + codes_and_scales
