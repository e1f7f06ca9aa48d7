"""The GPU's experts in Numba: every stage a kernel in Python, for whoever wants to read, check or change one.

They share no kernel with the other experts of a GPU, so that each is a check of the other.  ``docs/numba_kernels`` is a
walk through them.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np

from pymoe.activations import ActivationConfig
from pymoe.contracts import ExpertTokensMetadata, FusedMoEActivationFormat, FusedMoEExpertsModular, TopKWeightAndReduce
from pymoe.contracts.experts import Activation
from pymoe.device.arena import Arena, Arenas, padded
from pymoe.device.arrays import namespace
from pymoe.experts.cuda_weights import CudaAbilities, WeightsCache
from pymoe.ops.grouped_gemm._numba_cuda_pairs import supports
from pymoe.quantization import QuantKey
from pymoe.weight_and_reduce import TopKWeightAndReduceNoOP

__all__ = ["NumbaCudaExperts"]

Array = Any
Arrays = dict[str, tuple[tuple[int, ...], Any]]
"""Shape and dtype of each array by its name."""


class NumbaCudaExperts(CudaAbilities, FusedMoEExpertsModular):
    """Permute, GEMM1, activation, GEMM2, unpermute in Numba, on CuPy's current stream; registered activations too.

    Written to be read: the grouped GEMM uses no tensor cores.  Tokens are quantized here, not before.  A row's bits
    depend on no other row.  Unquantized, fp8 and int8 weights; other schemes are refused.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._weights = WeightsCache()
        self._arenas = Arenas()

    @property
    def expects_unquantized_inputs(self) -> bool:
        return True

    @staticmethod
    def activation_format() -> FusedMoEActivationFormat:
        return FusedMoEActivationFormat.Standard

    @staticmethod
    def _supports_current_device() -> bool:
        return CudaAbilities._supports_current_device() and importlib.util.find_spec("numba_cuda") is not None

    @staticmethod
    def _supports_activation(activation: Activation) -> bool:
        return True

    @staticmethod
    def _supports_quant_scheme(weight_key: QuantKey | None, activation_key: QuantKey | None) -> bool:
        return supports(weight_key, activation_key)

    def supports_chunking(self) -> bool:
        # One scale over all rows would become one scale a chunk.
        return not self.quant_config.is_dynamic_per_tensor

    def workspace_dtype(self, act_dtype: Any) -> Any:
        return "uint8"

    def workspace_shapes(
        self,
        M: int,
        N: int,
        K: int,
        topk: int,
        global_num_experts: int,
        local_num_experts: int,
        expert_tokens_meta: ExpertTokensMetadata | None,
        activation: Activation | ActivationConfig,
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Workspace13 holds what GEMM1 and the activation write, workspace2 all else, both in bytes."""
        between = self._between(M * topk, N, self.adjust_N_for_activation(N, activation))
        around = self._around(M, K, topk, local_num_experts)
        return (_bytes(between),), (_bytes(around),), (M, K)

    def finalize_weight_and_reduce_impl(self) -> TopKWeightAndReduce:
        return TopKWeightAndReduceNoOP()

    def apply(
        self,
        output: Array,
        hidden_states: Array,
        w1: Array,
        w2: Array,
        topk_weights: Array,
        topk_ids: Array,
        activation: Activation | ActivationConfig,
        global_num_experts: int,
        expert_map: Array | None,
        a1q_scale: Array | None,
        a2_scale: Array | None,
        workspace13: Array,
        workspace2: Array,
        expert_tokens_meta: ExpertTokensMetadata | None,
        apply_router_weight_on_input: bool,
    ) -> None:
        from pymoe.ops.activation._numba_cuda import activate_rows
        from pymoe.ops.grouped_gemm._numba_cuda import TILE, grouped_gemm
        from pymoe.ops.permute._numba_cuda import permute
        from pymoe.ops.unpermute._numba_cuda import unpermute

        weights = self._weights.of(w1, w2, activation, self.quant_config, self.moe_config.in_dtype)
        (E_local, N), (M, topk) = w1.shape[:2], topk_ids.shape
        up = _taken(self._arenas.of(workspace13), self._between(M * topk, N, weights.activation.width(N)))
        own = _taken(self._arenas.of(workspace2), self._around(M, w2.shape[1], topk, E_local))
        key = self.quant_config.activation_key
        # docs: layer
        row_map = permute(topk_ids, E_local, expert_map, TILE, own)
        x, x_scale = self._quantized(hidden_states, "a1", self.quant_config.a1.scale, row_map.slot_to_row, own)
        grouped_gemm(x, weights.w1, row_map, slots_of_a_token=topk, a_scale=x_scale, a_key=key, out=up["gate_up"])
        activate_rows(up["gate_up"], weights.activation, row_map.row_to_slot, up["hidden"])
        h, h_scale = self._quantized(up["hidden"], "a2", a2_scale, row_map.row_to_slot[:, None], up)
        grouped_gemm(h, weights.w2, row_map, a_scale=h_scale, a_key=key, out=own["routed"])
        unpermute(own["routed"], row_map.slot_to_row, None if apply_router_weight_on_input else topk_weights, output)
        # end: layer

    def _quantized(
        self, x: Array, which: str, given: Array | None, places: Array, arrays: dict[str, Array]
    ) -> tuple[Array, Array | None]:
        """Return what a GEMM multiplies of the live rows of `x`: codes and scales, or `x` itself."""
        key = self.quant_config.activation_key
        if key is None:
            return x, None
        from pymoe.ops.quantize._numba_cuda import quantize

        codes, scale, scratch = (arrays[f"{which}_{name}"] for name in ("codes", "scale", "scratch"))
        static = None if given is None else namespace(x).asarray(given, np.float32).reshape(-1)[:1]
        quantize(x, key, static, places, codes, scale, scratch)
        return codes, scale if static is None else static

    def _between(self, rows: int, N: int, width: int) -> Arrays:
        """Return the arrays of the intermediate, of P rows at most."""
        key = self.quant_config.activation_key
        hidden = np.dtype(self.moe_config.in_dtype if key is None else np.float32)
        gemm1: Arrays = {"gate_up": ((rows, N), np.dtype(np.float32)), "hidden": ((rows, width), hidden)}
        return gemm1 | self._codes("a2", rows, width)

    def _around(self, M: int, K: int, topk: int, E_local: int) -> Arrays:
        """Return the arrays of the row map, of the quantized tokens, and of GEMM2's rows."""
        from pymoe.ops.grouped_gemm._numba_cuda import TILE
        from pymoe.ops.permute._numba_cuda import shapes

        numbers = np.dtype(np.int32)
        row_map: Arrays = {name: (shape, numbers) for name, shape in shapes(M, topk, E_local, TILE)._asdict().items()}
        return row_map | {"routed": ((M * topk, K), np.dtype(np.float32))} | self._codes("a1", M, K)

    def _codes(self, which: str, rows: int, columns: int) -> Arrays:
        key = self.quant_config.activation_key
        if key is None:
            return {}
        from pymoe.ops.quantize._numba_cuda import shapes

        names = (f"{which}_{name}" for name in ("codes", "scale", "scratch"))
        return dict(zip(names, shapes(key, rows, columns), strict=True))


def _bytes(arrays: Arrays) -> int:
    return sum(padded(*array) for array in arrays.values())


def _taken(arena: Arena, arrays: Arrays) -> dict[str, Array]:
    return {name: arena.empty(*array) for name, array in arrays.items()}
