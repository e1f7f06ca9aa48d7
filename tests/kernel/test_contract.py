"""The contract's own behaviour: predicates and their order, constructor checks, sizes, pairing."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from pymoe import (
    BatchedPrepareAndFinalize,
    CpuExperts,
    CpuMonolithicExperts,
    FusedMoEActivationFormat,
    FusedMoEKernel,
    MoEActivation,
    NaiveBatchedExperts,
    RoutingConfig,
    SingleProcessMonolithicPrepareAndFinalize,
    SingleProcessPrepareAndFinalize,
)
from pymoe.activations import ActivationConfig
from pymoe.config import FusedMoEParallelConfig, RoutingMethodType
from pymoe.contracts import ExpertTokensMetadata
from pymoe.errors import ArgumentError, ShapeError, UnsupportedError
from pymoe.quantization import (
    FUSED_MOE_UNQUANTIZED_CONFIG,
    kFp8DynamicTokenSym,
    kFp8StaticChannelSym,
)
from tests.kernel.recording import RecordingExperts, moe_config

STANDARD = FusedMoEActivationFormat.Standard
PREDICATES = [
    ("_supports_current_device", "the current device"),
    ("_supports_no_act_and_mul", "non-gated activations"),
    ("_supports_activation", "activation silu_no_mul"),
    ("_supports_quant_scheme", "quant scheme kFp8StaticChannelSym x kFp8DynamicTokenSym"),
    ("_supports_parallel_config", "parallel config"),
    ("_supports_routing_method", "routing method RenormalizeNaive"),
    ("_supports_router_logits_dtype", "router logits of dtype float16 with routing method RenormalizeNaive"),
    ("_supports_shape", "hidden dimension 8"),
]


def everything_odd():
    return moe_config(
        activation=ActivationConfig("silu_no_mul"),
        routing=RoutingConfig(2),
        router_logits_dtype="float16",
        moe_parallel_config=FusedMoEParallelConfig(ep_size=2, use_ep=True),
    )


@pytest.mark.parametrize("first", range(len(PREDICATES)))
def test_is_supported_config_names_the_first_refusal_in_the_seeds_order(first):
    refusing = {name: staticmethod(lambda *args: False) for name, _ in PREDICATES[first:]}
    experts = type("Refusing", (RecordingExperts,), refusing)
    supported, reason = experts.is_supported_config(
        everything_odd(), kFp8StaticChannelSym, kFp8DynamicTokenSym, FusedMoEActivationFormat.BatchedExperts
    )
    assert not supported
    assert reason.startswith(f"kernel does not support {PREDICATES[first][1]}")


def test_the_activation_format_is_asked_last():
    answer = RecordingExperts.is_supported_config(moe_config(), None, None, FusedMoEActivationFormat.BatchedExperts)
    assert answer == (False, "kernel does not support activation format BatchedExperts")
    assert RecordingExperts.is_supported_config(moe_config(), None, None, STANDARD) == (True, None)


def test_monolithic_experts_opt_in_to_methods_and_logits():
    for method in RoutingMethodType:
        taken = CpuMonolithicExperts._supports_routing_method(method, None, None)
        assert taken == (method not in (RoutingMethodType.Custom, RoutingMethodType.Simulated))
        assert RecordingExperts._supports_routing_method(method, None, None)
    assert not CpuMonolithicExperts._supports_router_logits_dtype("float64", RoutingMethodType.Default)
    assert CpuMonolithicExperts._supports_router_logits_dtype("bfloat16", RoutingMethodType.Default)


@pytest.mark.parametrize("limits", [(None, None), (4, None), (None, 1), (0, 1), (4, 0)])
def test_batched_experts_need_both_limits(limits):
    with pytest.raises(ArgumentError, match="NaiveBatchedExperts: (max_num_tokens|num_dispatchers) must be at least 1"):
        NaiveBatchedExperts(moe_config(), FUSED_MOE_UNQUANTIZED_CONFIG, *limits)


@pytest.mark.parametrize("limits", [(4, None), (None, 1), (4, 1)])
def test_standard_experts_take_no_limits(limits):
    with pytest.raises(ArgumentError, match="must be None for standard experts"):
        CpuExperts(moe_config(), FUSED_MOE_UNQUANTIZED_CONFIG, *limits)


def test_monolithic_experts_need_a_routing():
    with pytest.raises(ArgumentError, match=r"moe_config\.routing must be given"):
        CpuMonolithicExperts(moe_config(), FUSED_MOE_UNQUANTIZED_CONFIG)


def pairs():
    config = dataclasses.replace(moe_config(), routing=RoutingConfig(2))
    quant = FUSED_MOE_UNQUANTIZED_CONFIG
    return {
        "standard": (SingleProcessPrepareAndFinalize(), CpuExperts(config, quant)),
        "batched": (BatchedPrepareAndFinalize(5, 4), NaiveBatchedExperts(config, quant, 5, 1)),
        "monolithic": (SingleProcessMonolithicPrepareAndFinalize(), CpuMonolithicExperts(config, quant)),
    }


@pytest.mark.parametrize("left", ["standard", "batched", "monolithic"])
@pytest.mark.parametrize("right", ["standard", "batched", "monolithic"])
def test_pairing(left, right):
    prepare_finalize, experts = pairs()[left][0], pairs()[right][1]
    if left == right:
        assert FusedMoEKernel(prepare_finalize, experts).is_monolithic == (left == "monolithic")
        return
    rule = "both be modular or both be monolithic" if "monolithic" in (left, right) else "have one activation format"
    with pytest.raises(ArgumentError, match=rule) as caught:
        FusedMoEKernel(prepare_finalize, experts)
    assert type(prepare_finalize).__name__ in str(caught.value) and type(experts).__name__ in str(caught.value)


def test_a_monolithic_pair_takes_no_shared_experts():
    with pytest.raises(ArgumentError, match="shared_experts must be None for a monolithic pair"):
        FusedMoEKernel(*pairs()["monolithic"], shared_experts=lambda x: x)


def test_each_kind_of_pair_refuses_the_others_call():
    x, w1, w2 = np.zeros((1, 8), np.float32), np.zeros((4, 12, 8), np.float32), np.zeros((4, 8, 6), np.float32)
    with pytest.raises(UnsupportedError, match="a monolithic pair takes router logits"):
        FusedMoEKernel(*pairs()["monolithic"]).apply(x, w1, w2, topk_weights=x[:, :2], topk_ids=np.zeros((1, 2), int))
    with pytest.raises(UnsupportedError, match="a modular pair takes ids and weights"):
        FusedMoEKernel(*pairs()["standard"]).apply_monolithic(x, w1, w2, router_logits=x[:, :4])


def test_moe_problem_size_reads_K_off_the_activations():
    experts = CpuExperts(moe_config(), FUSED_MOE_UNQUANTIZED_CONFIG)
    w1, w2 = np.zeros((4, 12, 4), np.uint8), np.zeros((4, 8, 3), np.uint8)  # two codes a byte
    assert experts.moe_problem_size(np.zeros((5, 8)), w1, w2, np.zeros((5, 2), int)) == (4, 5, 12, 8, 2)
    assert experts.moe_problem_size(np.zeros((4, 7, 8)), w1, w2, np.zeros((5, 2), int)) == (4, 7, 12, 8, 2)
    with pytest.raises(ShapeError, match="topk_ids must have 5 rows"):
        experts.moe_problem_size(np.zeros((5, 8)), w1, w2, np.zeros((6, 2), int))
    with pytest.raises(ShapeError, match="a1 must be"):
        experts.moe_problem_size(np.zeros((3, 7, 8)), w1, w2, np.zeros((5, 2), int))
    with pytest.raises(ShapeError, match="w1 and w2 must have 3 axes"):
        experts.moe_problem_size(np.zeros((5, 8)), w1[0], w2, np.zeros((5, 2), int))


@pytest.mark.parametrize("activation, width", [(MoEActivation.SILU, 6), (MoEActivation.SILU_NO_MUL, 12)])
def test_adjust_N_for_activation(activation, width):
    assert CpuExperts.adjust_N_for_activation(12, activation) == width


def test_expert_tokens_metadata_make_from_list():
    meta = ExpertTokensMetadata.make_from_list([3, 0, 2])
    assert meta.expert_num_tokens.dtype == np.int32 and meta.expert_num_tokens.tolist() == [3, 0, 2]
    assert not np.shares_memory(meta.expert_num_tokens, meta.expert_num_tokens_cpu)


def test_workspace_shapes_with_zero_sizes():
    experts = CpuExperts(moe_config(), FUSED_MOE_UNQUANTIZED_CONFIG)
    assert experts.workspace_shapes(0, 12, 8, 2, 4, 4, None, MoEActivation.SILU) == ((0, 2, 6), (0, 2, 12), (0, 8))
