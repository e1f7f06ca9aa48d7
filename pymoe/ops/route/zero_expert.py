"""Experts that cost nothing: a slot given to one of them returns the token itself (LongCat)."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pymoe import checks
from pymoe.config import RoutingConfig
from pymoe.device.arrays import as_float32, as_numpy
from pymoe.errors import ArgumentError, DTypeError, complaint
from pymoe.ops.route.router import route_as

__all__ = ["ZeroExpertRouter", "ZeroExpertRouting", "split_zero_experts"]

Array = Any


class ZeroExpertRouting(NamedTuple):
    """A routing over the real experts, and what the zero experts give: to be added to the experts' output."""

    topk_weights: Array
    topk_ids: Array
    zero_output: Array


def split_zero_experts(
    hidden_states: np.ndarray, topk_weights: np.ndarray, topk_ids: np.ndarray, num_experts: int
) -> ZeroExpertRouting:
    """Take the slots at or above `num_experts` out of a routing and add up their weights times the token.

    The sum of the weights runs over slots 0..topk-1 in float32; one product and one rounding follow.  A token without
    such a slot gets exactly 0, whatever it holds.
    """
    is_zero = topk_ids >= num_experts
    taken = np.where(is_zero, topk_weights, np.float32(0))
    with np.errstate(all="ignore"):
        share = np.cumsum(taken, axis=1, dtype=np.float32)[:, -1:]
        zero_output = np.where(is_zero.any(axis=1, keepdims=True), share * as_float32(hidden_states), np.float32(0))
    weights = np.where(is_zero, np.float32(0), topk_weights)
    return ZeroExpertRouting(weights, np.where(is_zero, np.int32(-1), topk_ids), zero_output)


class ZeroExpertRouter:
    """Route over real and zero experts, and compute the zero experts' share of the output.

    Parameters
    ----------
    config : RoutingConfig
        Chooses among all columns of the logits, the real experts first.
    num_experts : int
        Real experts; a chosen id at or above it is a zero expert.

    Notes
    -----
    A slot of a zero expert leaves the routing as id -1 with weight 0, so it takes no row of a GEMM.

    Source
    ------
    vLLM 0.33.0 `ZeroExpertRouter`, identity type.  Differs: vLLM writes id 0 with weight 0, which computes an expert
    only to multiply it by 0.

    Examples
    --------
    >>> import numpy as np
    >>> from pymoe.config import RoutingConfig
    >>> from pymoe.ops.route import ZeroExpertRouter
    >>> router = ZeroExpertRouter(RoutingConfig(1), num_experts=2)
    >>> routing = router(np.ones((2, 3), np.float32), np.array([[1, 0, 0], [0, 0, 1]], np.float32))
    >>> routing.topk_ids.tolist(), routing.zero_output[:, 0].tolist()
    ([[0], [-1]], [0.0, 1.0])
    """

    def __init__(self, config: RoutingConfig, num_experts: int) -> None:
        call = "ZeroExpertRouter"
        if not isinstance(config, RoutingConfig):
            raise DTypeError(complaint(call, "config", "be a RoutingConfig", type(config).__name__))
        self.config = config
        self.num_experts = checks.integer(call, "num_experts", num_experts, 1)

    def __call__(
        self, hidden_states: Array, router_logits: Array, *, input_ids: Array | None = None
    ) -> ZeroExpertRouting:
        """Return the routing of the real experts and the zero experts' output, float32 (M, K).

        Parameters
        ----------
        hidden_states : ndarray, (M, K), float32 | float16 | bfloat16
        router_logits : ndarray, (M, num_experts + zero experts), float
        input_ids : ndarray, (M,), integer, optional

        Raises
        ------
        ShapeError, DTypeError, ArgumentError
            As `route`; fewer logits than real experts.
        """
        call = "ZeroExpertRouter"
        logits = as_numpy(call, "router_logits", router_logits)
        checks.shape(call, "router_logits", logits, (None, None))
        if logits.shape[1] < self.num_experts:
            rule = f"have at least num_experts = {self.num_experts} columns"
            raise ArgumentError(complaint(call, "router_logits", rule, logits.shape[1]))
        x = as_numpy(call, "hidden_states", hidden_states)
        checks.hidden(call, "hidden_states", x)
        checks.shape(call, "hidden_states", x, (logits.shape[0], None))
        weights, ids = route_as(call, logits, self.config, hidden_states=x, input_ids=input_ids)
        return split_zero_experts(x, weights, ids, self.num_experts)
