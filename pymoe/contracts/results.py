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
    """

    expert_offsets: Array
    row_to_slot: Array
    slot_to_row: Array

    @property
    def P(self) -> int:
        """Live rows."""
        return int(self.expert_offsets[-1])

    @property
    def row_to_token(self) -> Array:
        """Token of each row, (P,) int64."""
        return self.row_to_slot // max(self.slot_to_row.shape[1], 1)
