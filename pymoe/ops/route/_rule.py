"""A routing configuration resolved for E experts: what the backends read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pymoe import checks
from pymoe.config import RoutingConfig, RoutingMethodType
from pymoe.device.arrays import as_float32, as_numpy
from pymoe.errors import ArgumentError, complaint

_BIASED = (
    RoutingMethodType.DeepSeekV3,
    RoutingMethodType.MiniMax2,
    RoutingMethodType.DeepseekV4,
    RoutingMethodType.Unspecified,
)
GROUPED_EPSILON = 1e-20
"""Joins the sum that weights are divided by in grouped routing and in MiniMax2, as vLLM's kernel adds it."""


@dataclass(frozen=True)
class Rule:
    """One row's arithmetic.

    `scoring` is one of "softmax", "sigmoid", "sqrtsoftplus" (scores of all experts), "chosen" (softmax over the chosen
    logits alone) and "logit".  `groups` is 0 without groups; `group_best` counts the experts whose sum stands for a
    group.  Selection compares logits where `by_logit`, else scores plus `bias`.
    """

    topk: int
    scoring: str
    renormalize: bool
    groups: int
    topk_group: int
    group_best: int
    epsilon: float
    scale: float
    bias: np.ndarray | None

    @property
    def by_logit(self) -> bool:
        """Whether selection compares the logits themselves."""
        return self.bias is None and self.groups == 0


def resolve(call: str, config: RoutingConfig, E: int) -> Rule:
    """Return the rule of `config` for E experts.

    Raises
    ------
    ArgumentError
        topk above E or above the experts of the kept groups, groups that do not divide E, a bias that is not finite or
        that the method does not read.
    ShapeError, DTypeError
        A bias that is not (E,) float.
    """
    _topk(call, config, E)
    method = config.method
    bias = _bias(call, config, E)
    groups = config.num_expert_group or 0
    grouped = groups > 1
    scoring = str(config.scoring_func)
    renormalize = bool(config.renormalize)
    if method is RoutingMethodType.TopK:
        scoring = "logit"
    elif scoring == "softmax" and renormalize and bias is None and not grouped:
        # The softmax over all, divided by the chosen ones' sum, is the softmax over the chosen.
        scoring, renormalize = "chosen", False
    two_best = bias is not None or method is RoutingMethodType.DeepSeekV3
    epsilon = grouped or method in (RoutingMethodType.DeepSeekV3, RoutingMethodType.MiniMax2)
    return Rule(
        topk=config.topk,
        scoring=scoring,
        renormalize=renormalize,
        groups=groups if grouped else 0,
        topk_group=(config.topk_group or 0) if grouped else 0,
        group_best=min(2, E // groups) if grouped and two_best else 1,
        epsilon=GROUPED_EPSILON if epsilon else 0.0,
        scale=float(config.routed_scaling_factor),
        bias=bias,
    )


def _topk(call: str, config: RoutingConfig, E: int) -> None:
    """Refuse more experts a token than there are, or than the kept groups hold."""
    if config.topk > E:
        got = f"{config.topk} with E = {E}"
        raise ArgumentError(complaint(call, "topk", "be in 1..E, the columns of router_logits", got))
    groups, kept = config.num_expert_group, config.topk_group
    if groups is None or kept is None:
        return
    if config.method in (RoutingMethodType.Custom, RoutingMethodType.Simulated):
        raise ArgumentError(complaint(call, "num_expert_group", f"be None for the method {config.method.name}", groups))
    if E % groups:
        raise ArgumentError(complaint(call, "num_expert_group", f"divide E = {E}", groups))
    if kept > groups:
        raise ArgumentError(complaint(call, "topk_group", f"be at most num_expert_group = {groups}", kept))
    eligible = kept * (E // groups)
    if config.topk > eligible:
        got = f"{config.topk} with {kept} of {groups} groups of {E // groups}"
        raise ArgumentError(complaint(call, "topk", f"be at most the {eligible} experts of the kept groups", got))


def _bias(call: str, config: RoutingConfig, E: int) -> np.ndarray | None:
    """Return the correction bias as float32, or refuse it."""
    if config.e_score_correction_bias is None:
        return None
    label = "e_score_correction_bias"
    if config.method not in _BIASED:
        raise ArgumentError(complaint(call, label, f"be None for the method {config.method.name}", "an array"))
    bias = as_numpy(call, label, config.e_score_correction_bias)
    checks.shape(call, label, bias, (E,))
    checks.float_dtype(call, label, bias)
    bias = as_float32(bias)
    wrong = np.flatnonzero(~np.isfinite(bias))
    if wrong.size:
        raise ArgumentError(complaint(call, label, "be finite", f"{bias[wrong[0]]} for expert {wrong[0]}"))
    return bias
