"""The kernel for experts that take ids and weights; the order of arguments is vLLM's."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np

from pymoe import checks
from pymoe.activations import ActivationConfig, MoEActivation, RegisteredActivation
from pymoe.contracts import (
    ExpertTokensMetadata,
    FusedMoEExpertsModular,
    FusedMoEPrepareAndFinalizeModular,
    PrepareResult,
)
from pymoe.device.arena import padded
from pymoe.device.arrays import is_cuda, namespace
from pymoe.device.workspace import ALIGNMENT, Workspace, Workspaces, plan_workspace
from pymoe.kernel.stages import first_of, note_stage, recount, size_of, slice_scales
from pymoe.weight_and_reduce import TopKWeightAndReduceNoOP

Array = Any

DEFAULT_CHUNK_SIZE = 16384
"""Tokens a call of the experts sees at most (vLLM's VLLM_FUSED_MOE_CHUNK_SIZE): bounds the workspaces."""


class FusedMoEKernelModularImpl:
    """The kernel for experts that take ids and weights.

    Parameters
    ----------
    prepare_finalize : FusedMoEPrepareAndFinalizeModular
    fused_experts : FusedMoEExpertsModular
    shared_experts : callable, optional
        Maps tokens (M, K) to (M, K); its result is returned beside the routed one.
    chunk_size : int, optional
        Tokens a chunk; None is `DEFAULT_CHUNK_SIZE`.
    """

    def __init__(
        self,
        prepare_finalize: FusedMoEPrepareAndFinalizeModular,
        fused_experts: FusedMoEExpertsModular,
        shared_experts: Callable[[Array], Array] | None = None,
        chunk_size: int | None = None,
    ) -> None:
        self.prepare_finalize = prepare_finalize
        self.fused_experts = fused_experts
        self.shared_experts = shared_experts
        chunk_size = DEFAULT_CHUNK_SIZE if chunk_size is None else chunk_size
        self.chunk_size = checks.integer("FusedMoEKernel", "chunk_size", chunk_size, 1)
        self.workspaces = Workspaces()

    def apply(
        self,
        hidden_states: Array,
        w1: Array,
        w2: Array,
        topk_ids: Array,
        topk_weights: Array,
        activation: MoEActivation | RegisteredActivation | ActivationConfig = MoEActivation.SILU,
        global_num_experts: int = -1,
        expert_map: Array | None = None,
        apply_router_weight_on_input: bool = False,
        shared_experts_input: Array | None = None,
        output: Array | None = None,
    ) -> Array | tuple[Array, Array]:
        """Run the layer; `output` (M, K), of any floating dtype, is created in the hidden dtype when None."""
        if output is None:
            output = namespace(hidden_states).empty(hidden_states.shape, hidden_states.dtype)
        if global_num_experts == -1:
            global_num_experts = w1.shape[0] if expert_map is None else len(expert_map)
        with note_stage("prepare", self):
            a1q, a1q_scale, meta, topk_ids, topk_weights = self._prepare(
                hidden_states, topk_weights, topk_ids, global_num_experts, expert_map, apply_router_weight_on_input
            )
        if self.prepare_finalize.localizes_ids():
            expert_map, global_num_experts = None, w1.shape[0]
        # On a device the stream's workspace is ours until finalize has queued its reads of it.
        with self.workspaces.current() if is_cuda(a1q) else contextlib.nullcontext("cpu") as device:
            with note_stage("experts", self):
                fused_out = self._fused_experts(
                    output, a1q, a1q_scale, w1, w2, topk_weights, topk_ids, activation, global_num_experts, expert_map,
                    apply_router_weight_on_input, meta, device,
                )  # fmt: skip
            with note_stage("finalize", self):
                return self._finalize(
                    output, fused_out, hidden_states, topk_weights, topk_ids, apply_router_weight_on_input,
                    shared_experts_input,
                )  # fmt: skip

    def _prepare(
        self,
        hidden_states: Array,
        topk_weights: Array,
        topk_ids: Array,
        global_num_experts: int,
        expert_map: Array | None,
        apply_router_weight_on_input: bool,
    ) -> PrepareResult:
        """Quantize and dispatch, waiting for an asynchronous pair; ids and weights in force come back filled in."""
        arguments = (
            hidden_states, topk_weights, topk_ids, global_num_experts, expert_map, apply_router_weight_on_input,
            self.fused_experts.quant_config, self.fused_experts.expects_unquantized_inputs,
        )  # fmt: skip
        if not self.prepare_finalize.supports_async():
            prepared = self.prepare_finalize.prepare(*arguments)
        else:
            pending = self.prepare_finalize.prepare_async(*arguments)
            hook, receiver = pending if isinstance(pending, tuple) else (None, pending)
            if hook is not None:
                hook()
            prepared = receiver()
        return prepared._replace(
            topk_ids=topk_ids if prepared.topk_ids is None else prepared.topk_ids,
            topk_weights=topk_weights if prepared.topk_weights is None else prepared.topk_weights,
        )

    def _chunk_info(self, M: int) -> tuple[int, int]:
        """Return (chunks, tokens a chunk); no tokens make no chunk."""
        chunk = max(1, min(M, self.chunk_size) if self.fused_experts.enable_chunking() else M)
        return -(-M // chunk), chunk

    def _allocate_buffers(
        self,
        out_dtype: Any,
        device: str | Workspace,
        M_chunk: int,
        M_full: int,
        N: int,
        K: int,
        top_k: int,
        global_num_experts: int,
        local_num_experts: int,
        expert_tokens_meta: ExpertTokensMetadata | None,
        activation: Any,
        needs_output: bool = True,
    ) -> tuple[Array, Array, Array]:
        """Return (workspace13, workspace2, fused_out), flat uninitialised workspaces and an output for M_full tokens.

        With one chunk workspace13 and fused_out are views of one allocation; with several, every chunk reuses
        workspace13 while fused_out keeps the earlier chunks' rows, so the two are apart.  The last chunk may be
        shorter, and experts may choose otherwise for it: the workspaces are large enough for both lengths.  `device`
        is "cpu", or the workspace of a stream, whose three arrays are apart and are the same ones in every call.
        Where the experts write the caller's output, fused_out is empty.
        """
        sizes = (N, K, top_k, global_num_experts, local_num_experts, expert_tokens_meta, activation)
        act_dtype = self.fused_experts.workspace_dtype(out_dtype)
        lengths = {M_chunk, M_full % M_chunk or M_chunk}
        shapes = [self.fused_experts.workspace_shapes(m, *sizes) for m in sorted(lengths)]
        out_shape = self.fused_experts.workspace_shapes(M_full, *sizes)[2] if needs_output else (0,)
        routed_dtype = np.dtype(self.fused_experts.routed_dtype(out_dtype))
        item = np.dtype(act_dtype).itemsize
        bytes13 = max(size_of(shape[0]) for shape in shapes) * item
        bytes_out = size_of(out_shape) * routed_dtype.itemsize
        elements2 = max(size_of(shape[1]) for shape in shapes)
        if isinstance(device, Workspace):
            plan = plan_workspace(
                ("workspace13", (bytes13 // item,), np.dtype(act_dtype)),
                ("workspace2", (elements2,), np.dtype(act_dtype)),
                ("fused_out", out_shape, routed_dtype),
            )
            arrays = device.arrays(plan)
            return arrays["workspace13"], arrays["workspace2"], arrays["fused_out"]
        workspace2 = np.empty(elements2, act_dtype)
        if M_chunk < M_full:
            return np.empty(bytes13 // item, act_dtype), workspace2, np.empty(out_shape, routed_dtype)
        common = np.empty(-(-max(bytes13, bytes_out) // 8), np.float64).view(np.uint8)
        fused_out = common[:bytes_out].view(routed_dtype).reshape(out_shape)
        return common[:bytes13].view(act_dtype), workspace2, fused_out

    def _fused_experts(
        self,
        output: Array,
        a1q: Array,
        a1q_scale: Array | None,
        w1: Array,
        w2: Array,
        topk_weights: Array,
        topk_ids: Array,
        activation: Any,
        global_num_experts: int,
        expert_map: Array | None,
        apply_router_weight_on_input: bool,
        expert_tokens_meta: ExpertTokensMetadata | None,
        device: Any = "cpu",
    ) -> Array:
        """Run the experts chunk by chunk; without rows they are skipped and finalize gets an empty array."""
        experts = self.fused_experts
        E_local, M, N, K, topk = experts.moe_problem_size(a1q, w1, w2, topk_ids)
        chunks, chunk = self._chunk_info(M)
        out_dtype = self.prepare_finalize.combine_dtype(output.dtype)
        if chunks == 0:
            return namespace(a1q).empty((0, K), experts.routed_dtype(out_dtype))
        sizes = (N, K, topk, global_num_experts, E_local)
        writes_output = self._writes_output(output)
        workspace13, workspace2, fused_out = self._allocate_buffers(
            out_dtype, device, chunk, M, *sizes, expert_tokens_meta, activation, not writes_output
        )
        if writes_output:
            fused_out = output
        rows_per_token = fused_out.shape[0] // M if a1q.ndim == 2 else 1
        for start in range(0, M, chunk):
            stop = min(start + chunk, M)
            whole = chunks == 1
            tokens = slice(None) if whole else slice(start, stop)
            meta = expert_tokens_meta if whole else recount(topk_ids[tokens], E_local, expert_map, expert_tokens_meta)
            shape13, shape2, _ = experts.workspace_shapes(stop - start, *sizes, meta, activation)
            experts.apply(
                fused_out if whole else fused_out[start * rows_per_token : stop * rows_per_token],
                a1q[tokens],
                w1,
                w2,
                topk_weights[tokens],
                topk_ids[tokens],
                activation,
                global_num_experts,
                expert_map,
                slice_scales(a1q_scale, tokens),
                slice_scales(experts.quant_config.a2.scale, tokens),
                first_of(workspace13, shape13),
                first_of(workspace2, shape2),
                meta,
                apply_router_weight_on_input,
            )
        return fused_out

    def _writes_output(self, output: Array) -> bool:
        """Whether the experts' own output is already the caller's."""
        return self._leaves_nothing(output.dtype) and output.flags.c_contiguous

    def _leaves_nothing(self, out_dtype: Any) -> bool:
        """Whether nothing is left to finalize: nothing to reduce, nothing travels, same dtype."""
        return (
            self.prepare_finalize.keeps_tokens_in_place()
            and isinstance(self.fused_experts.finalize_weight_and_reduce_impl(), TopKWeightAndReduceNoOP)
            and np.dtype(out_dtype) == self.fused_experts.routed_dtype(out_dtype)
        )

    def _finalize(
        self,
        output: Array,
        fused_out: Array,
        hidden_states: Array,
        topk_weights: Array,
        topk_ids: Array,
        apply_router_weight_on_input: bool,
        shared_experts_input: Array | None,
    ) -> Array | tuple[Array, Array]:
        """Combine into `output` and run the shared experts: after finalize, or during an asynchronous one."""
        reduce_impl = self.fused_experts.finalize_weight_and_reduce_impl()
        arguments = (output, fused_out, topk_weights, topk_ids, apply_router_weight_on_input, reduce_impl)
        shared_input = hidden_states if shared_experts_input is None else shared_experts_input
        if not self.prepare_finalize.supports_async():
            self.prepare_finalize.finalize(*arguments)
            shared = None if self.shared_experts is None else self.shared_experts(shared_input)
        else:
            pending = self.prepare_finalize.finalize_async(*arguments)
            hook, receiver = pending if isinstance(pending, tuple) else (None, pending)
            try:
                shared = None if self.shared_experts is None else self.shared_experts(shared_input)
            finally:
                # The pair owns `output` until its receiver has run, also when the shared experts raise.
                if hook is not None:
                    hook()
                receiver()
        return output if self.shared_experts is None else (shared, output)

    def workspace_bytes(self, M: int, out_dtype: Any) -> int:
        """Return the bytes of workspaces and unreduced output that a call takes at most if M tokens reach its experts.

        An answer that is created, or C-contiguous, is no unreduced output where nothing is left to finalize.
        """
        config, out_dtype = self.fused_experts.moe_config, self.prepare_finalize.combine_dtype(out_dtype)
        chunks, chunk = self._chunk_info(M)
        if chunks == 0:
            return 0
        arguments = (config.N, config.hidden_dim, config.experts_per_token, config.num_experts,
                     config.num_local_experts, None, config.activation)  # fmt: skip
        item = np.dtype(self.fused_experts.workspace_dtype(out_dtype)).itemsize
        routed = np.dtype(self.fused_experts.routed_dtype(out_dtype)).itemsize
        lengths = {chunk, M % chunk or chunk}
        shapes = [self.fused_experts.workspace_shapes(m, *arguments) for m in lengths]
        bytes13, bytes2 = (max(size_of(shape[i]) for shape in shapes) * item for i in (0, 1))
        bytes_out = size_of(self.fused_experts.workspace_shapes(M, *arguments)[2]) * routed
        bytes_out = 0 if self._leaves_nothing(out_dtype) else bytes_out
        if config.device != "cpu":
            # The workspace begins at a multiple of its alignment, whatever the allocator's is.
            return sum(padded((size,), np.uint8) for size in (bytes13, bytes2, bytes_out)) + ALIGNMENT
        return bytes2 + (bytes13 + bytes_out if chunks > 1 else max(bytes13, bytes_out))
