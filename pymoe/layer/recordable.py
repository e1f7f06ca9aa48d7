"""What the tapes of both devices ask of a layer and of a call's arrays."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pymoe.config import RoutingMethodType

__all__ = ["overlaps", "runs_kernels_only"]


def runs_kernels_only(layer: Any) -> bool:
    """Return whether nothing but the stages' kernels computes in a call: no ranks, shared experts or user's router."""
    return (
        layer._ranks is None
        and layer.shared_experts is None
        and not layer.routing.apply_router_weight_on_input
        and layer.routing.method not in (RoutingMethodType.Custom, RoutingMethodType.Simulated)
    )


def overlaps(inputs: Iterable[tuple[int, int]], out: tuple[int, int]) -> bool:
    """Return whether a written range of addresses, (first, end), meets one that is read."""
    return any(start < out[1] and out[0] < stop for start, stop in inputs)
