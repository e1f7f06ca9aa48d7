"""`MoELayer`: router, routed experts and shared experts of one layer."""

from pymoe.layer.layer import MoELayer
from pymoe.layer.plan import Plan

__all__ = ["MoELayer", "Plan"]
