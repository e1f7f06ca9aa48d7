"""The calls without a layer object: route, compute, or both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pymoe import checks
from pymoe.activations import ActivationConfig, MoEActivation, RegisteredActivation
from pymoe.config import FusedMoEConfig, RoutingConfig, RoutingMethodType, resolve_activation
from pymoe.device.arrays import answers_in_kind, as_array, device_of, is_cuda
from pymoe.kernel import FusedMoEKernel
from pymoe.ops.quantize import dequantize, quantize, quantize_experts
from pymoe.ops.route.router import route_as
from pymoe.quantization import FUSED_MOE_UNQUANTIZED_CONFIG, FusedMoEQuantConfig
from pymoe.select import select

__all__ = ["dequantize", "fused_experts", "fused_moe", "quantize", "quantize_experts", "select_experts"]

Array = Any
Activation = MoEActivation | RegisteredActivation | ActivationConfig | str


@answers_in_kind
def fused_experts(
    hidden_states: Array,
    w1: Array,
    w2: Array,
    topk_weights: Array,
    topk_ids: Array,
    *,
    activation: Activation = "silu",
    quant_config: FusedMoEQuantConfig | None = None,
    global_num_experts: int = -1,
    expert_map: Array | None = None,
    apply_router_weight_on_input: bool = False,
    out: Array | None = None,
) -> Array:
    """Run the experts of a Mixture-of-Experts layer on tokens that are already routed.

    ``y[m] = sum_j topk_weights[m, j] * (w2[e] @ act(w1[e] @ x[m] + b1[e]) + b2[e])`` with ``e = topk_ids[m, j]``.

    Parameters
    ----------
    hidden_states : ndarray, (M, K), float32 | float16 | bfloat16
        Tokens, never pre-quantized; any strides.
    w1 : ndarray, (E_local, N, K), w2 : ndarray, (E_local, K, I)
        Weights of one dtype, or codes under `quant_config`; row = output feature.  N is 2 I when gated (gate rows,
        then up rows; alternating for swigluoai).
    topk_weights : ndarray, (M, topk), float
        Taken as float32.
    topk_ids : ndarray, (M, topk), integer
        Global experts.  An id below 0, at or above `global_num_experts`, or mapped to -1 contributes exactly 0.
    activation : MoEActivation, str or ActivationConfig
    quant_config : FusedMoEQuantConfig, optional
        Scheme, scales and biases; None is unquantized.
    global_num_experts : int
        -1 means E_local, or the length of `expert_map`.
    expert_map : ndarray, (global_num_experts,), integer, optional
        Local index of each global expert, -1 where it is not here.
    apply_router_weight_on_input : bool
        Multiply the tokens instead of the output; needs topk 1.
    out : ndarray, (M, K), dtype of `hidden_states`, optional
        Written and returned; must not overlap an input.

    Returns
    -------
    ndarray, (M, K), dtype of `hidden_states`

    Raises
    ------
    ShapeError, DTypeError, ArgumentError
        An argument is wrong; nothing has been computed.
    UnsupportedError
        No experts of this backend support the configuration; lists every reason.

    Notes
    -----
    Sums run in float32 over slots 0..topk-1, with one rounding of the intermediate and one of the output
    (``docs/numerics``).  A row's bits depend on no other row, chunk or thread count.

    Examples
    --------
    >>> import numpy as np, pymoe
    >>> x = np.eye(2, dtype=np.float32)
    >>> w1 = np.ones((3, 4, 2), np.float32)
    >>> w2 = np.ones((3, 2, 2), np.float32)
    >>> y = pymoe.fused_experts(x, w1, w2, np.ones((2, 1), np.float32), np.array([[0], [-1]]))
    >>> y.shape, y[1].tolist()
    ((2, 2), [0.0, 0.0])
    """
    call = "fused_experts"
    kernel = _kernel_for_call(
        call, hidden_states, w1, w2, topk_ids, activation, quant_config, global_num_experts, expert_map
    )
    return kernel.apply_as(
        call,
        hidden_states,
        w1,
        w2,
        topk_weights=topk_weights,
        topk_ids=topk_ids,
        activation=kernel.fused_experts.moe_config.activation,
        global_num_experts=global_num_experts,
        expert_map=expert_map,
        apply_router_weight_on_input=apply_router_weight_on_input,
        out=out,
    )


def _kernel_for_call(
    call: str,
    hidden_states: Array,
    w1: Array,
    w2: Array,
    topk_ids: Array,
    activation: Activation,
    quant_config: FusedMoEQuantConfig | None,
    global_num_experts: int,
    expert_map: Array | None,
) -> FusedMoEKernel:
    """Read the sizes off the arguments and return the preferred kernel for them; the kernel checks the rest."""
    x, ids = as_array(call, "hidden_states", hidden_states), as_array(call, "topk_ids", topk_ids)
    w1, w2 = as_array(call, "w1", w1), as_array(call, "w2", w2)
    config = FUSED_MOE_UNQUANTIZED_CONFIG if quant_config is None else quant_config
    checks.quant_config_type(call, config)
    act = resolve_activation(call, activation, config)
    checks.hidden(call, "hidden_states", x)
    checks.shape(call, "topk_ids", ids, (x.shape[0], None))
    E_local, N, width = checks.weights(call, w1, w2, x.shape[1], act, config)
    config = checks.quant_config(call, config, w1, N, x.shape[1], width)
    mapping = None if expert_map is None else as_array(call, "expert_map", expert_map)
    _, num_experts = checks.expert_map(call, mapping, global_num_experts, E_local)
    moe_config = FusedMoEConfig(
        num_experts=num_experts,
        experts_per_token=ids.shape[1],
        hidden_dim=x.shape[1],
        intermediate_size_per_partition=width,
        num_local_experts=E_local,
        activation=act,
        in_dtype=x.dtype,
        device="cuda" if is_cuda(w1) else "cpu",
        has_bias=config.w1.bias is not None or config.w2.bias is not None,
    )
    choice = select(moe_config, config)
    return FusedMoEKernel(choice.prepare_finalize, choice.experts)


@answers_in_kind
def select_experts(
    router_logits: Array,
    topk: int,
    *,
    renormalize: bool = True,
    scoring_func: str = "softmax",
    num_expert_group: int | None = None,
    topk_group: int | None = None,
    e_score_correction_bias: Array | None = None,
    routed_scaling_factor: float = 1.0,
    routing_method: RoutingMethodType | str | int | None = None,
    custom_routing_function: Callable[..., Any] | None = None,
    hidden_states: Array | None = None,
    input_ids: Array | None = None,
) -> tuple[Array, Array]:
    """Choose `topk` experts for every token.

    Parameters
    ----------
    router_logits : ndarray, (M, E), float
        NaN counts as -inf, +inf as the largest float32.
    topk : int
        1..E.
    renormalize, scoring_func, num_expert_group, topk_group, e_score_correction_bias, routed_scaling_factor
        See `RoutingConfig`; a `routing_method` replaces the defaults of `renormalize` and `scoring_func`.
    routing_method : RoutingMethodType, its name or number, optional
    custom_routing_function : callable, optional
        ``fn(hidden_states, router_logits, topk, renormalize) -> (weights, ids)``.
    hidden_states : ndarray, (M, K), optional
        For custom functions.
    input_ids : ndarray, (M,), optional
        Token ids, for routers that look experts up in a table.

    Returns
    -------
    topk_weights : ndarray, (M, topk), float32
    topk_ids : ndarray, (M, topk), int32
        Columns in descending selection value; ties go to the lowest id.

    Raises
    ------
    ArgumentError
        `topk` outside 1..E or above the number of eligible experts, or a flag that contradicts the method.
    """
    config = routing_config(
        topk, renormalize, scoring_func, num_expert_group, topk_group, e_score_correction_bias, routed_scaling_factor,
        routing_method, custom_routing_function,
    )  # fmt: skip
    logits = as_array("select_experts", "router_logits", router_logits)
    with device_of(logits):
        return route_as("select_experts", logits, config, hidden_states=hidden_states, input_ids=input_ids)


def routing_config(
    topk: int,
    renormalize: bool,
    scoring_func: str,
    num_expert_group: int | None,
    topk_group: int | None,
    e_score_correction_bias: Array | None,
    routed_scaling_factor: float,
    routing_method: RoutingMethodType | str | int | None,
    custom_routing_function: Callable[..., Any] | None,
) -> RoutingConfig:
    """Return the `RoutingConfig` of a call whose flags have defaults: those yield to an explicit method."""
    explicit = routing_method is not None
    return RoutingConfig(
        topk,
        None if explicit and renormalize is True else renormalize,
        None if explicit and scoring_func == "softmax" else scoring_func,
        num_expert_group,
        topk_group,
        e_score_correction_bias,
        routed_scaling_factor,
        routing_method,
        custom_routing_function,
    )


@answers_in_kind
def fused_moe(
    hidden_states: Array,
    w1: Array,
    w2: Array,
    router_logits: Array,
    topk: int,
    *,
    renormalize: bool = True,
    scoring_func: str = "softmax",
    num_expert_group: int | None = None,
    topk_group: int | None = None,
    e_score_correction_bias: Array | None = None,
    routed_scaling_factor: float = 1.0,
    routing_method: RoutingMethodType | str | int | None = None,
    custom_routing_function: Callable[..., Any] | None = None,
    input_ids: Array | None = None,
    activation: Activation = "silu",
    quant_config: FusedMoEQuantConfig | None = None,
    global_num_experts: int = -1,
    expert_map: Array | None = None,
    apply_router_weight_on_input: bool = False,
    out: Array | None = None,
) -> Array:
    """Run a whole Mixture-of-Experts layer: `select_experts`, then `fused_experts`; arguments are theirs.

    Parameters
    ----------
    hidden_states : ndarray, (M, K)
    w1 : ndarray, (E_local, N, K), w2 : ndarray, (E_local, K, I)
    router_logits : ndarray, (M, global experts), float
    topk : int

    Returns
    -------
    ndarray, (M, K), dtype of `hidden_states`
    """
    call = "fused_moe"
    config = routing_config(
        topk, renormalize, scoring_func, num_expert_group, topk_group, e_score_correction_bias, routed_scaling_factor,
        routing_method, custom_routing_function,
    )  # fmt: skip
    checks.weight_on_input(call, apply_router_weight_on_input, config.topk)
    x, logits = as_array(call, "hidden_states", hidden_states), as_array(call, "router_logits", router_logits)
    checks.hidden(call, "hidden_states", x)
    checks.one_device(call, hidden_states=x, router_logits=logits)
    w1 = as_array(call, "w1", w1)
    checks.shape(call, "w1", w1, (None, None, None))
    mapping = None if expert_map is None else as_array(call, "expert_map", expert_map)
    _, num_experts = checks.expert_map(call, mapping, global_num_experts, w1.shape[0])
    checks.shape(call, "router_logits", logits, (x.shape[0], num_experts))
    # The kernel is built before routing, so that a bad weight raises before any work.
    ids_like = np.broadcast_to(np.int32(0), (x.shape[0], config.topk))  # a shape, wherever the tokens are
    kernel = _kernel_for_call(call, x, w1, w2, ids_like, activation, quant_config, global_num_experts, expert_map)
    with device_of(x):
        topk_weights, topk_ids = route_as(call, logits, config, hidden_states=x, input_ids=input_ids)
    return kernel.apply_as(
        call,
        x,
        w1,
        w2,
        topk_weights=topk_weights,
        topk_ids=topk_ids,
        activation=kernel.fused_experts.moe_config.activation,
        global_num_experts=global_num_experts,
        expert_map=expert_map,
        apply_router_weight_on_input=apply_router_weight_on_input,
        out=out,
    )
