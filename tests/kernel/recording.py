"""Pairs that record what the kernel asks of them, and compute something simple enough to predict."""

from __future__ import annotations

import numpy as np

from pymoe.config import FusedMoEConfig
from pymoe.contracts import (
    ExpertTokensMetadata,
    FusedMoEActivationFormat,
    FusedMoEExpertsModular,
    FusedMoEPrepareAndFinalizeModular,
    PrepareResult,
)
from pymoe.quantization import FUSED_MOE_UNQUANTIZED_CONFIG
from pymoe.weight_and_reduce import TopKWeightAndReduceNoOP


def moe_config(E=4, topk=2, K=8, width=6, **options):
    return FusedMoEConfig(
        num_experts=E,
        experts_per_token=topk,
        hidden_dim=K,
        intermediate_size_per_partition=width,
        num_local_experts=E,
        **options,
    )


class RecordingExperts(FusedMoEExpertsModular):
    """Returns twice its input; writes what it was asked into `log`."""

    chunking = True
    meta_seen: list

    def __init__(self, log, config=None, quant_config=FUSED_MOE_UNQUANTIZED_CONFIG, unquantized=False):
        super().__init__(config or moe_config(), quant_config)
        self.log = log
        self.unquantized = unquantized
        self.meta_seen = []
        self.buffers = []

    @property
    def expects_unquantized_inputs(self):
        return self.unquantized

    @staticmethod
    def activation_format():
        return FusedMoEActivationFormat.Standard

    def supports_chunking(self):
        return self.chunking

    def supports_expert_map(self):
        return False

    @staticmethod
    def _supports_current_device():
        return True

    @staticmethod
    def _supports_no_act_and_mul():
        return True

    @staticmethod
    def _supports_activation(activation):
        return True

    @staticmethod
    def _supports_quant_scheme(weight_key, activation_key):
        return True

    @staticmethod
    def _supports_parallel_config(moe_parallel_config):
        return True

    def workspace_shapes(self, M, N, K, topk, global_num_experts, local_num_experts, expert_tokens_meta, activation):
        self.log.append(f"workspace_shapes({M})")
        return (M, topk, N), (0,), (M, K)

    def finalize_weight_and_reduce_impl(self):
        return TopKWeightAndReduceNoOP()

    def apply(
        self,
        output,
        hidden_states,
        w1,
        w2,
        topk_weights,
        topk_ids,
        activation,
        global_num_experts,
        expert_map,
        a1q_scale,
        a2_scale,
        workspace13,
        workspace2,
        expert_tokens_meta,
        apply_router_weight_on_input,
    ):
        assert workspace2.shape == (0,)
        assert len(topk_ids) == len(topk_weights) == len(hidden_states) == len(output)
        self.log.append(f"experts({len(hidden_states)})")
        self.meta_seen.append(expert_tokens_meta)
        self.buffers.append((workspace13, output))
        workspace13[...] = np.nan
        output[...] = 2 * hidden_states


class RecordingPrepareAndFinalize(FusedMoEPrepareAndFinalizeModular):
    """Passes everything through; `mode` is sync, hook or receiver."""

    def __init__(self, log, mode="sync", counts=None, replace_ids=None):
        self.log, self.mode, self.counts, self.replace_ids = log, mode, counts, replace_ids

    activation_format = FusedMoEActivationFormat.Standard

    def topk_indices_dtype(self):
        return None

    def max_num_tokens_per_rank(self):
        return None

    def output_is_reduced(self):
        return False

    def supports_async(self):
        return self.mode != "sync"

    def post_init_setup(self, fused_experts):
        self.log.append(f"post_init_setup({type(fused_experts).__name__})")

    def prepare(self, a1, topk_weights, topk_ids, num_experts, expert_map, on_input, quant_config, defer=False):
        self.log.append(f"prepare(defer={defer})")
        meta = None if self.counts is None else ExpertTokensMetadata.make_from_list(self.counts)
        return PrepareResult(a1, None, meta, self.replace_ids, None)

    def finalize(self, output, fused_expert_output, topk_weights, topk_ids, on_input, weight_and_reduce_impl):
        self.log.append(f"finalize({len(fused_expert_output)})")
        self.ids_at_finalize = topk_ids
        weight_and_reduce_impl.apply(output, fused_expert_output, topk_weights, topk_ids, on_input)

    def prepare_async(self, *args):
        return self._pair("prepare", lambda: self.prepare(*args))

    def finalize_async(self, *args):
        self.log.append("finalize_async")
        return self._pair("finalize", lambda: self.finalize(*args))

    def _pair(self, name, receiver):
        if self.mode == "receiver":
            return receiver
        return (lambda: self.log.append(f"{name} hook")), receiver
