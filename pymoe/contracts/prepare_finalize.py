"""The prepare/finalize side of the contract: quantize and dispatch before the experts, combine after them."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable
from typing import Any

from pymoe.contracts.experts import FusedMoEExperts
from pymoe.contracts.results import FusedMoEActivationFormat, PrepareMonolithicResult, PrepareResult
from pymoe.contracts.weight_and_reduce import TopKWeightAndReduce
from pymoe.errors import UnsupportedError
from pymoe.quantization import FusedMoEQuantConfig

Array = Any
Hook = Callable[[], None]
PrepareReceiver = Callable[[], PrepareResult]
FinalizeReceiver = Callable[[], None]


class FusedMoEPrepareAndFinalize(abc.ABC):
    """Common part of modular and monolithic prepare/finalize."""

    def post_init_setup(self, fused_experts: FusedMoEExperts) -> None:  # noqa: B027  a hook that most leave alone
        """Settle what depends on the experts that this object was paired with; called once by the kernel."""

    @property
    @abc.abstractmethod
    def activation_format(self) -> FusedMoEActivationFormat:
        """Format of the activations that `prepare` returns."""

    @abc.abstractmethod
    def topk_indices_dtype(self) -> Any:
        """Dtype that topk_ids must have, or None for any integer."""

    @abc.abstractmethod
    def max_num_tokens_per_rank(self) -> int | None:
        """Most tokens one rank may bring, or None for no limit."""

    @abc.abstractmethod
    def output_is_reduced(self) -> bool:
        """Whether finalize sums over all ranks."""

    def num_dispatchers(self) -> int:
        """Ranks that may send tokens to this one, itself included."""
        return 1

    def keeps_tokens_in_place(self) -> bool:
        """Whether the experts' rows are the caller's own tokens, so that they may write the caller's output."""
        return False

    def supports_async(self) -> bool:
        """Whether prepare_async and finalize_async exist."""
        return False

    def guard(self, call: str) -> contextlib.AbstractContextManager[None]:
        """Surround one whole call: a pair that communicates tells the other ranks of an error inside."""
        return contextlib.nullcontext()


class FusedMoEPrepareAndFinalizeModular(FusedMoEPrepareAndFinalize):
    """Prepare/finalize for experts that take ids and weights."""

    def localizes_ids(self) -> bool:
        """Whether the ids that prepare returns count this process's experts, so that no expert map applies to them."""
        return False

    def combine_dtype(self, out_dtype: Any) -> Any:
        """Element type in which finalize takes the experts' rows; wider than `out_dtype` where it sums them again."""
        return out_dtype

    @abc.abstractmethod
    def prepare(
        self,
        a1: Array,
        topk_weights: Array,
        topk_ids: Array,
        num_experts: int,
        expert_map: Array | None,
        apply_router_weight_on_input: bool,
        quant_config: FusedMoEQuantConfig,
        defer_input_quant: bool = False,
    ) -> PrepareResult:
        """Weigh (on request), quantize (unless deferred) and dispatch the tokens `a1` (M, K)."""

    def prepare_async(
        self,
        a1: Array,
        topk_weights: Array,
        topk_ids: Array,
        num_experts: int,
        expert_map: Array | None,
        apply_router_weight_on_input: bool,
        quant_config: FusedMoEQuantConfig,
        defer_input_quant: bool = False,
    ) -> tuple[Hook, PrepareReceiver] | PrepareReceiver:
        """Start `prepare`; return its receiver, or a light-weight hook to run before the receiver."""
        raise UnsupportedError(f"{type(self).__name__}.prepare_async: this pair is synchronous. Use prepare.")

    @abc.abstractmethod
    def finalize(
        self,
        output: Array,
        fused_expert_output: Array,
        topk_weights: Array,
        topk_ids: Array,
        apply_router_weight_on_input: bool,
        weight_and_reduce_impl: TopKWeightAndReduce,
    ) -> None:
        """Combine, weigh and reduce what the experts left undone; write `output` (M, K) in place."""

    def finalize_async(
        self,
        output: Array,
        fused_expert_output: Array,
        topk_weights: Array,
        topk_ids: Array,
        apply_router_weight_on_input: bool,
        weight_and_reduce_impl: TopKWeightAndReduce,
    ) -> tuple[Hook, FinalizeReceiver] | FinalizeReceiver:
        """Start `finalize`; `output` is valid after the hook (if any) and the receiver have run."""
        raise UnsupportedError(f"{type(self).__name__}.finalize_async: this pair is synchronous. Use finalize.")


class FusedMoEPrepareAndFinalizeMonolithic(FusedMoEPrepareAndFinalize):
    """Prepare/finalize for experts that take router logits."""

    @abc.abstractmethod
    def prepare(
        self,
        a1: Array,
        router_logits: Array,
        quant_config: FusedMoEQuantConfig,
        defer_input_quant: bool = False,
    ) -> PrepareMonolithicResult:
        """Quantize (unless deferred) and dispatch the tokens and their logits."""

    @abc.abstractmethod
    def finalize(self, fused_expert_output: Array) -> Array:
        """Combine the experts' output over ranks and return it."""
