"""Prepare/finalize of one process: quantize before, reduce after; nothing travels.

The asynchronous twin does the same work on a thread of its own, so that shared experts overlap with it; it is also the
smallest model of the protocol that expert parallelism follows.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from pymoe.contracts import (
    FusedMoEActivationFormat,
    FusedMoEPrepareAndFinalizeModular,
    PrepareResult,
    TopKWeightAndReduce,
)
from pymoe.ops.permute.live import live_tokens
from pymoe.ops.quantize import quantize_activations
from pymoe.quantization import FusedMoEQuantConfig
from pymoe.tokens import weigh_input
from pymoe.weight_and_reduce import TopKWeightAndReduceContiguous, TopKWeightAndReduceDelegate

Array = Any
Result = TypeVar("Result")


class SingleProcessPrepareAndFinalize(FusedMoEPrepareAndFinalizeModular):
    """Standard format, one process."""

    @property
    def activation_format(self) -> FusedMoEActivationFormat:
        return FusedMoEActivationFormat.Standard

    def topk_indices_dtype(self) -> Any:
        return None

    def max_num_tokens_per_rank(self) -> int | None:
        return None

    def output_is_reduced(self) -> bool:
        return False

    def keeps_tokens_in_place(self) -> bool:
        return True

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
        a1 = weigh_input(f"{type(self).__name__}.prepare", a1, topk_weights, apply_router_weight_on_input)
        if defer_input_quant or quant_config.quant_dtype is None:
            return PrepareResult(a1, None, None, None, None)
        live = live_tokens(topk_ids, num_experts, expert_map) if quant_config.is_dynamic_per_tensor else None
        a1q, a1q_scale = quantize_activations(a1, quant_config, "a1", live=live)
        return PrepareResult(a1q, a1q_scale, None, None, None)

    def finalize(
        self,
        output: Array,
        fused_expert_output: Array,
        topk_weights: Array,
        topk_ids: Array,
        apply_router_weight_on_input: bool,
        weight_and_reduce_impl: TopKWeightAndReduce,
    ) -> None:
        if isinstance(weight_and_reduce_impl, TopKWeightAndReduceDelegate):
            weight_and_reduce_impl = TopKWeightAndReduceContiguous()
        if output.shape[0]:
            weight_and_reduce_impl.apply(
                output, fused_expert_output, topk_weights, topk_ids, apply_router_weight_on_input
            )


class SingleProcessAsyncPrepareAndFinalize(SingleProcessPrepareAndFinalize):
    """The same on a thread of its own.

    Parameters
    ----------
    hook : bool
        Return ``(hook, receiver)``, where the hook waits and the receiver collects; else a bare receiver, which does
        both.
    """

    def __init__(self, hook: bool = True) -> None:
        self._hook = bool(hook)

    def supports_async(self) -> bool:
        return True

    def prepare_async(self, *args: Any, **kwargs: Any) -> Any:
        return self._start(lambda: self.prepare(*args, **kwargs))

    def finalize_async(self, *args: Any, **kwargs: Any) -> Any:
        return self._start(lambda: self.finalize(*args, **kwargs))

    def _start(self, work: Callable[[], Result]) -> Any:
        task = _Task(work)
        return (task.wait, task.result) if self._hook else task.result


class _Task(Generic[Result]):
    """One piece of work on a thread of its own, which no fork or pool outlives."""

    def __init__(self, work: Callable[[], Result]) -> None:
        self._work = work
        self._value: Result | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="pymoe-async", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._value = self._work()
        except BaseException as error:  # handed to whoever collects the result
            self._error = error

    def wait(self) -> None:
        """Wait until the work has ended; its error, if any, is raised by `result`."""
        self._thread.join()

    def result(self) -> Result:
        """Wait, then return the value or raise the error of the work."""
        self.wait()
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]
