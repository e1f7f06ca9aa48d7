"""Before the calls that count: run a layer once to compile it, or record a call of it as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pymoe.dense import SharedExperts
from pymoe.device.arrays import module_of
from pymoe.device.workspace import Workspaces
from pymoe.errors import ArgumentError, UnsupportedError, complaint
from pymoe.kernel import FusedMoEKernel
from pymoe.ops.route.router import route_as

__all__ = ["CapturedCall"]

Array = Any

INPUTS = {"hidden": (), "logits": ("router_logits",), "topk": ("topk_weights", "topk_ids")}
"""What a captured call reads beside the tokens."""


class CapturedCall:
    """A call of a layer with M tokens, recorded once.

    Write the inputs on the stream that is current when you replay, replay, read the output on that stream.  Routings
    may differ from replay to replay: nothing in the graph depends on them but the numbers.

    Attributes
    ----------
    inputs : dict of str to cupy.ndarray
        ``hidden_states`` (M, K), and ``router_logits`` (M, num_experts) or ``topk_weights`` and ``topk_ids``
        (M, topk), as `MoELayer.capture` was asked.
    output : cupy.ndarray, (M, K)
        Overwritten by every replay.
    """

    def __init__(
        self,
        run: Callable[..., Array],
        arrays: dict[str, tuple[tuple[int, ...], Any]],
        held: tuple[Any, ...],
        workspaces: Workspaces,
    ) -> None:
        import cupy

        # All that the graph touches comes from a pool of its own, and nothing of that pool is used by anybody else.
        self._pool = cupy.cuda.MemoryPool()
        self._held = held  # weights first: the graph has their addresses
        with held[0].device:
            self._stream = cupy.cuda.Stream(non_blocking=True)
            with self._stream, cupy.cuda.using_allocator(self._pool.malloc):
                self.inputs = {name: cupy.zeros(shape, dtype) for name, (shape, dtype) in arrays.items()}
                x = self.inputs["hidden_states"]
                self.output = cupy.zeros(x.shape, x.dtype)
                try:
                    self._record(run)
                finally:
                    self._workspace = workspaces.detach()
            self._stream.synchronize()

    def _record(self, run: Callable[..., Array]) -> None:
        # The first run compiles, loads and grows the workspace; the second is recorded and may do none of that.
        run(**self.inputs, out=self.output)
        self._stream.begin_capture()
        try:
            run(**self.inputs, out=self.output)
        except BaseException:
            self._abandon()
            raise
        self._graph = self._stream.end_capture()

    def _abandon(self) -> None:
        """End a capture that went wrong, so that the stream can be used and freed again."""
        try:
            self._stream.end_capture()
        except Exception:  # CUDA reports here that the capture is invalid, which is why we are here
            return

    def replay(self) -> Array:
        """Queue the call on CuPy's current stream; return `output`."""
        import cupy

        self._graph.launch(cupy.cuda.get_current_stream())
        return self.output


def run_once(layer: Any, M: int) -> None:
    """Run what a call of `layer` with M tokens of its dtype runs, on zeros, on the current device."""
    call, xp = "MoELayer.warm_up", module_of(layer.device)
    x = xp.zeros((M, layer.K), layer.dtype)
    logits = xp.zeros((M, layer.num_experts), np.float32) if layer.gate is None else layer.gate(x)
    if layer.routing.custom_routing_function is None:
        route_as(call, logits, layer.routing, hidden_states=x, input_ids=xp.zeros(M, np.int64))
    ids = xp.arange(M * layer.topk, dtype=np.int32).reshape(M, layer.topk) % layer.num_experts
    kernel = layer._kernel(layer.dtype)[0]
    routed_only = FusedMoEKernel(kernel.prepare_finalize, kernel.fused_experts, chunk_size=layer._chunk_size)
    routed_only.impl.workspaces = kernel.impl.workspaces  # type: ignore[union-attr]
    layer._run(call, routed_only, x, xp.zeros(ids.shape, np.float32), ids, None, None)
    if isinstance(layer.shared_experts, SharedExperts):
        layer.shared_experts(x)


def captured_arrays(layer: Any, M: int, inputs: str) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Return shape and dtype of each input, or refuse `inputs`, or a layer that cannot be captured with them."""
    call = "MoELayer.capture"
    if inputs not in INPUTS:
        raise ArgumentError(complaint(call, "inputs", f"be one of {', '.join(INPUTS)}", repr(inputs)))
    if layer.device == "cpu":
        raise UnsupportedError(complaint(call, "the layer", "run on CUDA arrays to be captured", "NumPy weights"))
    if layer._ranks is not None:
        remedy = "Capture what comes before and after it"
        raise UnsupportedError(complaint(call, "the layer", "be of one rank to be captured", layer._ranks.size, remedy))
    if inputs == "hidden" and layer.gate is None:
        rule = "be 'logits' or 'topk' for a layer without a gate"
        raise ArgumentError(complaint(call, "inputs", rule, repr(inputs)))
    known: dict[str, tuple[tuple[int, ...], Any]] = {
        "router_logits": ((M, layer.num_experts), np.float32),
        "topk_weights": ((M, layer.topk), np.float32),
        "topk_ids": ((M, layer.topk), np.int32),
    }
    return {"hidden_states": ((M, layer.K), layer.dtype)} | {name: known[name] for name in INPUTS[inputs]}
