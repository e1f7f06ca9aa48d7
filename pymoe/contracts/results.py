"""What one stage hands to the next."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

Array = Any


class FusedMoEActivationFormat(enum.Enum):
    """Shape of the activations between prepare and the experts."""

    Standard = ("standard",)
    """(M, K): one row a token; ids say which experts want it."""
    BatchedExperts = ("batched_experts",)
    """(E_local, max_tokens * num_dispatchers, K): rows grouped by expert, the first `expert_num_tokens[e]` valid."""


@dataclass(frozen=True)
class ExpertTokensMetadata:
    """Rows per local expert: `expert_num_tokens` (E_local,) int32 on the device, `..._cpu` its host copy."""

    expert_num_tokens: Array
    expert_num_tokens_cpu: Array | None = None

    @staticmethod
    def make_from_list(expert_num_tokens_list: list[int], device: str = "cpu") -> ExpertTokensMetadata:
        """Return the metadata for counts known on the host (`device` is "cpu" here)."""
        counts = np.asarray(expert_num_tokens_list, dtype=np.int32)
        return ExpertTokensMetadata(counts.copy(), counts)


class PrepareResult(NamedTuple):
    """Quantized and dispatched rows; `topk_ids` and `topk_weights` are None where the caller's stay in force."""

    a1q: Array
    a1q_scale: Array | None
    expert_tokens_meta: ExpertTokensMetadata | None
    topk_ids: Array | None
    topk_weights: Array | None


class PrepareMonolithicResult(NamedTuple):
    """Quantized and dispatched rows with their router logits."""

    a1q: Array
    a1q_scale: Array | None
    router_logits: Array


@dataclass(frozen=True)
class RowMap:
    """Where each routed slot stands among the rows sorted by local expert.

    Slots that no local expert serves (id -1, out of range, or mapped to -1) have no row.

    Attributes
    ----------
    expert_offsets : (E_local + 1,) int64
        Rows of expert e are ``expert_offsets[e]:expert_offsets[e + 1]``; the last entry counts the live rows P.
    row_to_slot : (P,) int64
        Flat slot ``t * topk + j`` of each row, ascending within an expert.
    slot_to_row : (M, topk) int64
        The inverse; -1 where a slot has no row.
    tokens : (P,) int64, optional
        What `row_to_token` gives, where it is known already.
    """

    expert_offsets: Array
    row_to_slot: Array
    slot_to_row: Array
    tokens: Array | None = None

    @property
    def P(self) -> int:
        """Live rows."""
        return int(self.expert_offsets[-1])

    @property
    def row_to_token(self) -> Array:
        """Token of each row, (P,) int64."""
        if self.tokens is not None:
            return self.tokens
        return self.row_to_slot // max(self.slot_to_row.shape[1], 1)


@dataclass(frozen=True)
class DeviceRowMap:
    """`RowMap` on a GPU: int32, with room for the worst case, since the host does not know how many slots have a row.

    Attributes
    ----------
    expert_offsets : (E_local + 1,) int32
        Rows of expert e are ``expert_offsets[e]:expert_offsets[e + 1]``; the last entry counts the live rows P.
    row_to_slot : (M * topk,) int32
        Flat slot ``t * topk + j`` of each row, ascending within an expert; -1 from P on.
    slot_to_row : (M, topk) int32
        The inverse; -1 where a slot has no row.
    tiles : (capacity, 4) int32
        Work list of the grouped GEMM: local expert, first row, rows (1..tile_rows), 0.  Experts ascend; only the first
        `tile_count` entries are written.
    tile_count : (1,) int32
    tile_rows : int
        Most rows of a tile.
    """

    expert_offsets: Array
    row_to_slot: Array
    slot_to_row: Array
    tiles: Array
    tile_count: Array
    tile_rows: int


@dataclass(frozen=True)
class DeviceSlabMap:
    """Rows in the batched format on a GPU: expert e's tokens stand from row ``e * slab_rows`` on, in token order.

    Attributes
    ----------
    expert_num_tokens : (E_local,) int32
        Rows of each expert: a token that names an expert twice has one row there.
    slot_to_row : (M, topk) int32
        Flat row ``e * slab_rows + i`` of each slot; -1 where it has none.
    tiles, tile_count, tile_rows
        As in `DeviceRowMap`.
    slab_rows : int
        Rows an expert has room for.
    """

    expert_num_tokens: Array
    slot_to_row: Array
    tiles: Array
    tile_count: Array
    slab_rows: int
    tile_rows: int
