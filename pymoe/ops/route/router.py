"""The public call of this stage: checks, the custom function, the choice of a backend."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np

from pymoe import checks
from pymoe.config import RoutingConfig, RoutingMethodType
from pymoe.device.arrays import as_array, as_float32, is_cuda, is_integer, namespace
from pymoe.device.backend import uses_numba
from pymoe.errors import DTypeError, complaint
from pymoe.ops.route import _numpy
from pymoe.ops.route._rule import resolve
from pymoe.ops.route.simulate import simulate_routing

__all__ = ["route", "route_as"]

Array = Any


def route(
    router_logits: Array,
    config: RoutingConfig,
    *,
    hidden_states: Array | None = None,
    input_ids: Array | None = None,
    backend: str | None = None,
) -> tuple[Array, Array]:
    """Choose `config.topk` experts for every token.

    Stage: **route** -> prepare.

    Parameters
    ----------
    router_logits : ndarray, (M, E), float16 | bfloat16 | float32 | float64
        Taken as float32; NaN counts as -inf, +inf as the largest float32.
    config : RoutingConfig
    hidden_states : ndarray, (M, K), float, optional
        For custom functions.
    input_ids : ndarray, (M,), integer, optional
        Token ids; handed to a custom function that has a parameter of this name.
    backend : {"numpy", "numba"}, optional
        None: numba; the bits are the same, and those of CuPy arrays too.

    Returns
    -------
    topk_weights : ndarray, (M, topk), float32
    topk_ids : ndarray, (M, topk), int32
        Columns in descending selection value; ties go to the lowest id, between groups to the lowest group.

    Raises
    ------
    ShapeError, DTypeError
        An array of the wrong shape or element type.
    ArgumentError
        topk above E or above the experts of the kept groups; groups that do not divide E; a bias that is not finite or
        that the method does not read.
    UnsupportedError
        More than 2048 experts on a GPU.

    Notes
    -----
    Without bias and groups selection compares the float32 logits, otherwise float32 scores.  A row of nothing but -inf
    gets ids 0..topk-1 with weights 0; a chosen -inf always has weight 0; weights whose sum is 0 are 0.  A row's bits
    depend on no other row and not on the backend.  A custom function's answer is copied, ids beyond int32 clipped to
    it.  The method Simulated reads only the shape of the logits (`simulate_routing`, uniform, seed 0).

    Source
    ------
    vLLM 0.33.0, `fused_moe/router`.  Differs: selection order is a promise, NaN takes no weight, no denominator is 0.

    Examples
    --------
    >>> import numpy as np
    >>> from pymoe.config import RoutingConfig
    >>> from pymoe.ops.route import route
    >>> weights, ids = route(np.array([[0, 2, 2, 1]], np.float32), RoutingConfig(2))
    >>> weights.tolist(), ids.tolist()
    ([[0.5, 0.5]], [[1, 2]])
    """
    return route_as("route", router_logits, config, hidden_states=hidden_states, input_ids=input_ids, backend=backend)


def route_as(
    call: str,
    router_logits: Array,
    config: RoutingConfig,
    *,
    hidden_states: Array | None = None,
    input_ids: Array | None = None,
    backend: str | None = None,
) -> tuple[Array, Array]:
    """Do `route` for the public function `call`, whose name stands in the errors."""
    if not isinstance(config, RoutingConfig):
        raise DTypeError(complaint(call, "config", "be a RoutingConfig", type(config).__name__))
    logits = as_array(call, "router_logits", router_logits)
    checks.shape(call, "router_logits", logits, (None, None))
    checks.float_dtype(call, "router_logits", logits)
    M, E = logits.shape
    on_device = is_cuda(logits)
    hidden_states, input_ids = _tokens(call, hidden_states, input_ids, M)
    numba = uses_numba(call, backend)
    if on_device and config.method not in (RoutingMethodType.Custom, RoutingMethodType.Simulated):
        from pymoe.ops.route import _cuda

        return _cuda.route(call, logits, config)
    rule = resolve(call, config, E)
    if config.method is RoutingMethodType.Custom:
        return _route_custom(call, logits, config, hidden_states, input_ids)
    if config.method is RoutingMethodType.Simulated:
        weights, ids = simulate_routing(M, E, config.topk)
        return (namespace(logits).asarray(weights), namespace(logits).asarray(ids)) if on_device else (weights, ids)
    if not numba:
        return _numpy.route_rows(as_float32(logits), rule)
    from pymoe.ops.route import _numba

    return _numba.route_rows(as_float32(logits), rule)


def _tokens(call: str, hidden_states: Array | None, input_ids: Array | None, M: int) -> tuple[Any, Any]:
    """Return both as plain arrays, or refuse them."""
    if hidden_states is not None:
        hidden_states = as_array(call, "hidden_states", hidden_states)
        checks.shape(call, "hidden_states", hidden_states, (M, None))
        checks.float_dtype(call, "hidden_states", hidden_states)
    if input_ids is not None:
        input_ids = as_array(call, "input_ids", input_ids)
        checks.shape(call, "input_ids", input_ids, (M,))
        if not is_integer(input_ids.dtype):
            raise DTypeError(complaint(call, "input_ids", "have an integer dtype", input_ids.dtype))
    return hidden_states, input_ids


def _route_custom(
    call: str, logits: Array, config: RoutingConfig, hidden_states: Any, input_ids: Any
) -> tuple[Array, Array]:
    """Run the user's function and check, copy and scale its answer."""
    function = config.custom_routing_function
    assert function is not None
    extra = {"input_ids": input_ids} if _takes_input_ids(function) else {}
    answer = function(hidden_states, logits, config.topk, config.renormalize, **extra)
    if not isinstance(answer, tuple | list) or len(answer) != 2:
        got = f"{len(answer)} values" if isinstance(answer, tuple | list) else type(answer).__name__
        raise DTypeError(complaint(call, "custom_routing_function", "return the tuple (weights, ids)", got))
    weights = as_array(call, "custom_routing_function's weights", answer[0])
    ids = as_array(call, "custom_routing_function's ids", answer[1])
    for label, array in (("weights", weights), ("ids", ids)):
        checks.shape(call, f"custom_routing_function's {label}", array, (logits.shape[0], config.topk))
    checks.float_dtype(call, "custom_routing_function's weights", weights)
    if not is_integer(ids.dtype):
        raise DTypeError(complaint(call, "custom_routing_function's ids", "have an integer dtype", ids.dtype))
    with np.errstate(all="ignore"):
        scaled = (weights.astype(np.float64) * config.routed_scaling_factor).astype(np.float32)
    return scaled, _as_int32(ids)


def _takes_input_ids(function: Any) -> bool:
    try:
        return "input_ids" in inspect.signature(function).parameters
    except (TypeError, ValueError):  # a builtin without a signature
        return False


def _as_int32(ids: Array) -> Array:
    """Return an int32 copy in which ids beyond int32 are its ends: both stay outside every range of experts."""
    bounds, own = np.iinfo(np.int32), np.iinfo(ids.dtype)
    least, most = max(bounds.min, own.min), min(bounds.max, own.max)
    return namespace(ids).clip(ids, least, most).astype(np.int32)
