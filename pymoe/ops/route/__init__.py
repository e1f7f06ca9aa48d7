"""Choose experts: router logits to ids and weights."""

from pymoe.ops.route.hash_router import HashRouter
from pymoe.ops.route.router import route, route_as
from pymoe.ops.route.simulate import simulate_routing
from pymoe.ops.route.zero_expert import ZeroExpertRouter, ZeroExpertRouting

__all__ = ["HashRouter", "ZeroExpertRouter", "ZeroExpertRouting", "route", "route_as", "simulate_routing"]
