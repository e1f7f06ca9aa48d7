"""Configuration objects: what they settle, and which contradictions they refuse."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from pymoe import (
    ActivationConfig,
    ArgumentError,
    DTypeError,
    FusedMoEConfig,
    FusedMoEParallelConfig,
    FusedMoEQuantConfig,
    MoEActivation,
    RoutingConfig,
    RoutingMethodType,
    UnsupportedError,
    get_routing_method_type,
    register_activation,
)
from pymoe.config import resolve_activation

METHOD = RoutingMethodType


@pytest.mark.parametrize(
    "scoring_func, renormalize, groups, bias, method",
    [
        ("sqrtsoftplus", True, None, False, METHOD.DeepseekV4),
        ("sqrtsoftplus", False, None, False, METHOD.Unspecified),
        ("sigmoid", True, 8, True, METHOD.DeepSeekV3),
        ("sigmoid", True, None, True, METHOD.MiniMax2),
        ("sigmoid", False, None, True, METHOD.Unspecified),
        ("softmax", True, 4, False, METHOD.Unspecified),
        ("sigmoid", True, None, False, METHOD.SigmoidRenorm),
        ("sigmoid", False, None, False, METHOD.Sigmoid),
        ("softmax", True, None, False, METHOD.RenormalizeNaive),
        ("softmax", False, None, False, METHOD.Default),
    ],
)
def test_get_routing_method_type(scoring_func, renormalize, groups, bias, method):
    assert get_routing_method_type(scoring_func, 2, renormalize, groups, bias) is method


def test_routing_config_settles_flags_from_each_other():
    default = RoutingConfig(2)
    assert (default.renormalize, default.scoring_func, default.method) == (True, "softmax", METHOD.RenormalizeNaive)
    sigmoid = RoutingConfig(2, routing_method="Sigmoid")
    assert (sigmoid.renormalize, sigmoid.scoring_func) == (False, "sigmoid")
    assert RoutingConfig(2, routing_method=5).method is METHOD.TopK
    assert RoutingConfig(2, custom_routing_function=lambda *a: a).method is METHOD.Custom


@pytest.mark.parametrize(
    "options, kind, text",
    [
        ({"topk": 0}, ArgumentError, "topk must be at least 1"),
        ({"topk": 1.0}, DTypeError, "topk must be an integer"),
        ({"topk": True}, DTypeError, "topk must be an integer"),
        ({"scoring_func": "tanh"}, ArgumentError, "scoring_func must be one of"),
        ({"num_expert_group": 2}, ArgumentError, "topk_group must be given"),
        ({"topk_group": 2}, ArgumentError, "num_expert_group must be given"),
        ({"routed_scaling_factor": float("nan")}, ArgumentError, "routed_scaling_factor must be finite"),
        ({"routing_method": "Sigmoid", "renormalize": True}, ArgumentError, "renormalize must be False"),
        ({"routing_method": "Default", "scoring_func": "sigmoid"}, ArgumentError, "scoring_func must be softmax"),
        ({"routing_method": "Llama4"}, ArgumentError, "topk must be 1"),
        ({"routing_method": "DeepSeekV3"}, ArgumentError, "num_expert_group must be given"),
        ({"routing_method": "Custom"}, ArgumentError, "custom_routing_function must be given"),
        ({"routing_method": "Best"}, ArgumentError, "routing_method must be one of"),
        ({"apply_router_weight_on_input": True}, ArgumentError, "apply_router_weight_on_input must be False"),
        (
            {"routing_method": "Default", "custom_routing_function": print},
            ArgumentError,
            "custom_routing_function must be None",
        ),
    ],
)
def test_routing_config_refuses(options, kind, text):
    with pytest.raises(kind) as caught:
        RoutingConfig(**({"topk": 2} | options))
    assert text in str(caught.value)


def test_parallel_config_flattens_ranks_as_vllm_does():
    tp = FusedMoEParallelConfig.make((2, 1), (1, 0), (4, 3))
    assert (tp.tp_size, tp.tp_rank, tp.ep_size, tp.use_ep) == (8, 7, 1, False)
    ep = FusedMoEParallelConfig.make((2, 1), (1, 0), (4, 3), enable_expert_parallel=True)
    assert (ep.ep_size, ep.ep_rank, ep.tp_size, ep.use_all2all_kernels) == (8, 7, 1, True)
    assert not FusedMoEParallelConfig.make_no_parallel().use_all2all_kernels


@pytest.mark.parametrize("name", [member.value for member in MoEActivation])
def test_activation_strings(name):
    assert MoEActivation.from_str(name).value == name


def test_activation_alias_and_unknown():
    assert MoEActivation.from_str("gelu_pytorch_tanh") is MoEActivation.GELU_TANH
    with pytest.raises(ArgumentError, match="name must be one of silu, "):
        MoEActivation.from_str("swish")


@pytest.mark.parametrize(
    "arguments, kind, text",
    [
        (("relu2",), UnsupportedError, "not be the gated relu2"),
        (("gelu", 7.0), ArgumentError, "clamp_limit must be None, since gelu does not read it"),
        (("swigluoai", 6.0), ArgumentError, "clamp_limit must be 7.0"),
        (("swigluoai_uninterleave",), ArgumentError, "clamp_limit must be given"),
        (("situ",), ArgumentError, "situ_beta must be given"),
        (("silu", -1.0), ArgumentError, "clamp_limit must be above 0"),
        (("silu", float("inf")), ArgumentError, "clamp_limit must be a finite number"),
        ((3,), DTypeError, "activation must be a MoEActivation"),
    ],
)
def test_activation_config_refuses(arguments, kind, text):
    with pytest.raises(kind) as caught:
        ActivationConfig(*arguments)
    assert text in str(caught.value)


def test_activation_parameters_join_the_quant_configs():
    config = FusedMoEQuantConfig.make(gemm1_clamp_limit=5.0)
    assert resolve_activation("call", "silu", config).clamp_limit == 5.0
    assert resolve_activation("call", ActivationConfig("silu", 5.0), config).clamp_limit == 5.0
    with pytest.raises(ArgumentError, match="gemm1_clamp_limit must equal the activation's clamp_limit 4.0; got 5.0"):
        resolve_activation("call", ActivationConfig("silu", 4.0), config)
    with pytest.raises(ArgumentError, match="gelu does not read it"):
        resolve_activation("call", "gelu", config)


def test_registered_activation():
    registered = register_activation("half_silu_test", lambda gate, up: 0.5 * gate * up)
    assert ActivationConfig("half_silu_test").activation is registered and registered.is_gated
    with pytest.raises(ArgumentError, match="name must be new"):
        register_activation("silu", lambda gate, up: gate)
    with pytest.raises(DTypeError, match="fn must be callable"):
        register_activation("nothing", 3)


SCALE = np.ones(4, np.float32)
BOTH = {"w1_scale": SCALE, "w2_scale": SCALE}


@pytest.mark.parametrize(
    "make, weight, activation",
    [
        (lambda: FusedMoEQuantConfig.make(), None, None),
        (lambda: FusedMoEQuantConfig.fp8_w8a8(**BOTH), "kFp8StaticTensorSym", "kFp8DynamicTensorSym"),
        (
            lambda: FusedMoEQuantConfig.fp8_w8a8(**BOTH, a1_scale=SCALE[:1], a2_scale=SCALE[:1]),
            "kFp8StaticTensorSym",
            "kFp8StaticTensorSym",
        ),
        (
            lambda: FusedMoEQuantConfig.fp8_w8a8(**BOTH, per_act_token_quant=True, per_out_ch_quant=True),
            "kFp8StaticChannelSym",
            "kFp8DynamicTokenSym",
        ),
        (
            lambda: FusedMoEQuantConfig.fp8_w8a8(**BOTH, block_shape=[128, 128]),
            "kFp8Static128BlockSym",
            "kFp8Dynamic128Sym",
        ),
        (
            lambda: FusedMoEQuantConfig.fp8_w8a8(
                w1_scale=SCALE.astype(np.uint8), w2_scale=SCALE.astype(np.uint8), block_shape=[128, 128]
            ),
            "kFp8Static128BlockE8M0Sym",
            "kFp8Dynamic128E8M0Sym",
        ),
        (lambda: FusedMoEQuantConfig.int8_w8a16(**BOTH), "kInt8Static", None),
        (lambda: FusedMoEQuantConfig.int4_w4a16(**BOTH, w1_zp=SCALE, w2_zp=SCALE), "kInt4StaticAsym", None),
        (lambda: FusedMoEQuantConfig.mxfp4_mxfp8(**BOTH), "kMxfp4Static", "kMxfp8Dynamic"),
        (
            lambda: FusedMoEQuantConfig.nvfp4(**BOTH, w1_scale_2=SCALE, w2_scale_2=SCALE),
            "kNvfp4Static",
            "kNvfp4Dynamic",
        ),
    ],
)
def test_quant_config_keys(make, weight, activation):
    config = make()
    assert (config.weight_key.name if config.weight_key else None) == weight
    assert (config.activation_key.name if config.activation_key else None) == activation


@pytest.mark.parametrize(
    "arguments, kind, text",
    [
        ({"quant_dtype": "fp8"}, ArgumentError, "w1_scale must be given"),
        ({"quant_dtype": "fp8", "w1_scale": SCALE}, ArgumentError, "w2_scale must be given"),
        ({"quant_dtype": "fp9"}, ArgumentError, "quant_dtype must be None or one of"),
        ({"quant_dtype": "mxfp6_e3m2"}, UnsupportedError, "quant_dtype"),
        ({"quant_dtype": "float8_e5m2"}, UnsupportedError, "quant_dtype"),
        ({"quant_dtype": "int8", "weight_dtype": "int4", **BOTH}, UnsupportedError, "quant_dtype"),
        ({"w1_scale": SCALE, "w2_scale": SCALE}, ArgumentError, "w1_scale must be None"),
        ({"quant_dtype": "fp8", **BOTH, "w1_zp": SCALE, "w2_zp": SCALE}, ArgumentError, "w1_zp must be None"),
        ({"quant_dtype": "mxfp8", **BOTH, "block_shape": [128, 128]}, ArgumentError, "block_shape must be None"),
        ({"quant_dtype": "fp8", **BOTH, "block_shape": [128]}, ArgumentError, "block_shape must be two integers"),
        ({"quant_dtype": "fp8", **BOTH, "block_shape": [0, 128]}, ArgumentError, "positive extents"),
        (
            {"quant_dtype": "fp8", **BOTH, "block_shape": [128, 128], "per_act_token_quant": True},
            ArgumentError,
            "per_act_token_quant must be False with a block_shape",
        ),
        ({"quant_dtype": "mxfp8", **BOTH, "per_act_token_quant": True}, ArgumentError, "per_act_token_quant"),
        ({"quant_dtype": "fp8", **BOTH, "a1_scale": SCALE[:1]}, ArgumentError, "a2_scale must be given"),
        (
            {"quant_dtype": "fp8", **BOTH, "per_act_token_quant": True, "a1_scale": SCALE, "a2_scale": SCALE},
            ArgumentError,
            "a1_scale must be None",
        ),
        ({"quant_dtype": "nvfp4", **BOTH}, ArgumentError, "w1_scale_2 must be given"),
        ({"quant_dtype": "fp8", **BOTH, "a1_gscale": SCALE, "a2_gscale": SCALE}, ArgumentError, "a1_gscale"),
    ],
)
def test_quant_config_refuses(arguments, kind, text):
    with pytest.raises(kind) as caught:
        FusedMoEQuantConfig.make(**arguments)
    assert text in str(caught.value)


def test_rows_are_rounded_to_the_tokens_dtype_unless_float32_is_asked_for():
    config = FusedMoEConfig(4, 2, 8, 8, 4, in_dtype=np.dtype("float16"))
    assert config.rows_dtype == np.float16
    assert dataclasses.replace(config, routed_dtype="float32").rows_dtype == np.float32
    assert dataclasses.replace(config, in_dtype=np.dtype("float32")).rows_dtype == np.float32
    for wrong in ("float16", np.float64, "rows", 3):
        with pytest.raises(DTypeError, match=r"FusedMoEConfig: routed_dtype must be float32, or None"):
            dataclasses.replace(config, routed_dtype=wrong)
