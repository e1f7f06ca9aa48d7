"""The GPU's experts in the standard format: tokens in, weighted sums out, five launches and no look at the device."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pymoe.activations import ActivationConfig
from pymoe.config import FusedMoEConfig
from pymoe.contracts import ExpertTokensMetadata, FusedMoEActivationFormat, FusedMoEExpertsModular, TopKWeightAndReduce
from pymoe.contracts.experts import Activation
from pymoe.device.arena import Arena, Arenas, padded
from pymoe.experts.cuda_weights import CudaAbilities, CudaExpertWeights, WeightsCache, intermediate_bytes
from pymoe.weight_and_reduce import TopKWeightAndReduceNoOP

__all__ = ["CudaGroupedExperts", "Routing", "grouped_experts", "row_bytes"]

Array = Any


class Routing(NamedTuple):
    """Who computes what: ids (M, topk), weights or None to add rows as they are, and which experts are here."""

    topk_ids: Array
    topk_weights: Array | None
    expert_map: Array | None
    num_experts: int


class CudaGroupedExperts(CudaAbilities, FusedMoEExpertsModular):
    """Permute, GEMM1 with its activation, GEMM2, unpermute, on CuPy's current stream.

    Routed rows are weighed in float32, rounded once to the hidden dtype (or kept, with ``routed_dtype``), and summed in
    slot order in float32, so that nothing is left to finalize.  A row's bits depend neither on the other rows nor on
    the tiles that its expert's rows fall into.  Without ``deterministic`` GEMM2 adds them in any order, in float32.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._weights = WeightsCache()
        self._arenas = Arenas()

    @staticmethod
    def activation_format() -> FusedMoEActivationFormat:
        return FusedMoEActivationFormat.Standard

    def supports_chunking(self) -> bool:
        # One scale over all rows of the intermediate would become one scale a chunk.
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
        """Workspace13 holds the intermediate, workspace2 the row map and the routed rows or sums, both in bytes."""
        width = self.adjust_N_for_activation(N, activation)
        intermediate = intermediate_bytes(M * topk, width, self.quant_config, self.moe_config.in_dtype)
        rows = row_bytes(M, K, topk, local_num_experts, global_num_experts, self.moe_config)
        return (intermediate,), (rows,), (M, K)

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
        grouped_experts(
            self._weights.of(w1, w2, activation, self.quant_config, self.moe_config.in_dtype),
            hidden_states,
            a1q_scale,
            Routing(topk_ids, None if apply_router_weight_on_input else topk_weights, expert_map, global_num_experts),
            output,
            self.moe_config,
            (self._arenas.of(workspace13), self._arenas.of(workspace2)),
        )


def grouped_experts(
    weights: CudaExpertWeights,
    a: Array,
    a_scale: Array | None,
    routing: Routing,
    output: Array,
    config: FusedMoEConfig,
    arenas: tuple[Arena, Arena],
) -> None:
    """Queue all stages between prepared tokens `a` and `output` (M, K).

    `config` says what becomes of weighed rows; `arenas` are those of the intermediate and of the routed rows.
    """
    from pymoe.ops.grouped_gemm import _cuda as gemm
    from pymoe.ops.permute import _cuda as sort
    from pymoe.ops.unpermute import _cuda as gather

    intermediate, rows = arenas
    M, topk = routing.topk_ids.shape
    E_local, K = weights.w2.codes.shape[:2]
    added = not config.deterministic
    direct = weights.w1.key is None and not added and weights.are_direct(config.rows_dtype)
    spread = (M, topk, E_local, routing.num_experts)
    tiles = gemm.tiles_together(a, weights.w1, gemm.rows_of_an_expert(*spread), direct)
    tile_rows, even = tiles or (gemm.choose_tile_rows(*spread), False)
    row_map = sort.permute(routing.topk_ids, E_local, routing.expert_map, tile_rows, even=even, empty=rows.empty)
    combined = rows.empty(*_combined(M, K, topk, config))
    source: tuple[Array, int] | None = (row_map.row_to_slot, topk)
    if tiles is not None:
        # In the memory of the routed rows: GEMM2, which writes them, follows GEMM1, which reads these.
        together = combined.reshape(-1).view(a.dtype)[: M * topk * K].reshape(M * topk, K)
        sort.scatter_rows(a, row_map.slot_to_row, together)
        a, source = together, None
    if added:
        combined = output if output.dtype == np.float32 else combined[:M]
    weighed = gemm.Routed(row_map.row_to_slot, routing.topk_weights, topk if added else 0)
    weights.routed_rows(
        a,
        a_scale,
        row_map,
        combined,
        source=source,
        live_rows=None if weights.quant_config.activation_key is None else row_map.expert_offsets[E_local:],
        routed=weighed,
        empty=intermediate.empty,
    )
    if not added:
        gather.unpermute(combined, row_map.slot_to_row, None, output)
    elif combined is not output:
        gather.round_sums(combined, output)


def _combined(M: int, K: int, topk: int, config: FusedMoEConfig) -> tuple[tuple[int, int], np.dtype]:
    """Return shape and dtype of the memory of the routed rows, or of their sums."""
    if config.deterministic:
        return (M * topk, K), config.rows_dtype
    # The tokens that are copied together for the kernel of sm_90a lie there before.
    copied = -(-M * topk * np.dtype(config.in_dtype).itemsize // 4)
    return (max(M, copied), K), np.dtype("float32")


def row_bytes(M: int, K: int, topk: int, E_local: int, num_experts: int, config: FusedMoEConfig) -> int:
    """Return the most bytes of the row map and the routed rows, or their sums, of M tokens: larger tiles take fewer."""
    from pymoe.ops.grouped_gemm import _cuda_instances as gemm
    from pymoe.ops.permute import _cuda as sort

    tile_rows = gemm.choose_tile_rows(M, topk, E_local, num_experts)
    return sort.scratch_bytes(M, topk, E_local, tile_rows) + padded(*_combined(M, K, topk, config))
