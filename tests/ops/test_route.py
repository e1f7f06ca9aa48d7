"""Every routing method against plain Python loops in float64, and the promises that hold for all of them."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest

from pymoe.config import RoutingConfig
from pymoe.ops.route import route as stage
from tests.ops.devices import BACKENDS, staged

route = staged(stage)

FLOAT32_MAX = float(np.finfo(np.float32).max)

# name: (RoutingConfig arguments, oracle arguments); "bias" and "group*" are filled in by `case`.
METHODS = {
    "default_flags": ({}, {"score": "softmax", "renorm": True}),
    "softmax_scaled": ({"routed_scaling_factor": 2.5}, {"score": "softmax", "renorm": True, "scale": 2.5}),
    "Default": ({"routing_method": "Default"}, {"score": "softmax"}),
    "Renormalize": ({"routing_method": "Renormalize"}, {"score": "softmax", "renorm": True}),
    "DeepSeekV3": (
        {
            "routing_method": "DeepSeekV3",
            "num_expert_group": 4,
            "topk_group": 2,
            "bias": True,
            "routed_scaling_factor": 2.5,
        },
        {"score": "sigmoid", "renorm": True, "groups": (4, 2), "best": 2, "eps": 1e-20, "scale": 2.5},
    ),
    "DeepSeekV3_without_bias": (
        {"routing_method": "DeepSeekV3", "num_expert_group": 4, "topk_group": 2},
        {"score": "sigmoid", "renorm": True, "groups": (4, 2), "best": 2, "eps": 1e-20},
    ),
    "DeepSeekV3_one_group": (
        {"scoring_func": "sigmoid", "num_expert_group": 1, "topk_group": 1, "bias": True},
        {"score": "sigmoid", "renorm": True, "eps": 1e-20},
    ),
    "RenormalizeNaive": ({"routing_method": "RenormalizeNaive"}, {"score": "softmax", "renorm": True}),
    "TopK": ({"routing_method": "TopK"}, {"score": "logit"}),
    "SigmoidRenorm": ({"routing_method": "SigmoidRenorm"}, {"score": "sigmoid", "renorm": True}),
    "MiniMax2": (
        {"routing_method": "MiniMax2", "bias": True, "routed_scaling_factor": 0.5},
        {"score": "sigmoid", "renorm": True, "eps": 1e-20, "scale": 0.5},
    ),
    "Sigmoid": ({"routing_method": "Sigmoid"}, {"score": "sigmoid"}),
    "softmax_bias": ({"bias": True}, {"score": "softmax", "renorm": True}),
    "softmax_bias_raw": ({"bias": True, "renormalize": False}, {"score": "softmax"}),
    "softmax_groups_best_one": (
        {"num_expert_group": 4, "topk_group": 2, "renormalize": False},
        {"score": "softmax", "groups": (4, 2), "best": 1},
    ),
    "sigmoid_groups_best_one": (
        {"scoring_func": "sigmoid", "num_expert_group": 4, "topk_group": 3},
        {"score": "sigmoid", "renorm": True, "groups": (4, 3), "best": 1, "eps": 1e-20},
    ),
    "DeepseekV4": ({"routing_method": "DeepseekV4"}, {"score": "sqrtsoftplus", "renorm": True}),
    "DeepseekV4_bias": (
        {"routing_method": "DeepseekV4", "bias": True, "routed_scaling_factor": 1.5},
        {"score": "sqrtsoftplus", "renorm": True, "scale": 1.5},
    ),
    "sqrtsoftplus_raw": (
        {"scoring_func": "sqrtsoftplus", "renormalize": False},
        {"score": "sqrtsoftplus"},
    ),
}


def case(name, E, topk, seed=0):
    """Return (config, oracle arguments) of a method, with a random bias where it takes one."""
    arguments, rules = (dict(d) for d in METHODS[name])
    if arguments.pop("bias", False):
        bias = np.random.default_rng(seed).normal(0, 0.2, E).astype(np.float32)
        arguments["e_score_correction_bias"] = rules["bias"] = bias
    return RoutingConfig(topk, **arguments), rules


def oracle_row(logits, topk, *, score, renorm=False, bias=None, groups=None, best=1, eps=0.0, scale=1.0):
    """Return (weights, ids) of one row; only loops, math.exp and float64, with scores rounded to float32."""
    x = [-math.inf if math.isnan(v) else min(float(v), FLOAT32_MAX) for v in logits]
    E, top = len(x), max(x)
    if top == -math.inf:
        return [0.0] * topk, list(range(topk))
    if score == "softmax":
        powers = [math.exp(v - top) for v in x]
        scores = [p / math.fsum(powers) for p in powers]
    elif score == "sigmoid":
        scores = [1 / (1 + math.exp(-v)) if v > -700 else 0.0 for v in x]
    elif score == "sqrtsoftplus":
        scores = [math.sqrt(v if v > 20 else math.log1p(math.exp(v))) for v in x]
    else:
        scores = x
    scores = [float(np.float32(s)) for s in scores]
    by_logit = bias is None and groups is None
    shift = [0.0] * E if bias is None else [float(b) for b in bias]
    choice = x if by_logit else [float(np.float32(s + b)) for s, b in zip(scores, shift, strict=True)]
    open_experts = set(range(E))
    if groups is not None:
        count, kept = groups
        width = E // count
        totals = [sum(sorted(choice[g * width : (g + 1) * width], reverse=True)[:best]) for g in range(count)]
        totals = [float(np.float32(t)) for t in totals]
        order = sorted(range(count), key=lambda g: (-totals[g], g))[:kept]
        open_experts = {e for e in open_experts if e // width in order}
    ids = sorted(open_experts, key=lambda e: (-choice[e], e))[:topk]
    weights = [0.0 if scores[e] == -math.inf else scores[e] for e in ids]
    if renorm:
        total = sum(weights)
        weights = [w / (total + eps) if total > 0 else 0.0 for w in weights]
    return [w * scale for w in weights], ids


def check(logits, config, rules, backend):
    weights, ids = route(logits, config, backend=backend)
    assert weights.dtype == np.float32 and ids.dtype == np.int32
    assert weights.shape == ids.shape == (logits.shape[0], config.topk)
    for row in range(logits.shape[0]):
        want_weights, want_ids = oracle_row(np.float32(logits[row]), config.topk, **rules)
        assert ids[row].tolist() == want_ids, f"row {row}"
        # One rounding to float32 on each side of values that agree to 1e-14, and a softmax over the chosen logits where
        # the oracle divides rounded scores: half a unit for each rounding, 2 units in all.
        np.testing.assert_array_max_ulp(weights[row], np.array(want_weights, np.float32), maxulp=2)


def logits_like(rng, M, E, kind):
    x = rng.normal(0, 2, (M, E)).astype(np.float32)
    if kind == "ties":
        x = np.round(x)
    elif kind == "wide":
        x *= 12
    elif kind == "special":
        for value in (np.nan, np.inf, -np.inf, 0.0, -0.0):
            x[rng.random((M, E)) < 0.1] = value
        x[0], x[1 % M], x[2 % M] = np.nan, -np.inf, np.inf
    return x


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["normal", "ties", "wide", "special"])
@pytest.mark.parametrize("name", METHODS)
def test_methods_against_loops(name, kind, backend):
    rng = np.random.default_rng(7)
    for E, topk in ((8, 1), (8, 4), (16, 3), (64, 6), (160, 8)):
        config, rules = case(name, E, topk)
        logits = logits_like(rng, 12, E, kind)
        if rules["score"] == "softmax" and rules.get("renorm") and kind == "wide" and not rules.get("groups"):
            logits = logits / 2  # keeps the chosen scores normal: the oracle rounds them, "chosen" never forms them
        check(logits, config, rules, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["normal", "ties", "special"])
def test_llama4_is_top_1_sigmoid(kind, backend):
    logits = logits_like(np.random.default_rng(3), 40, 16, kind)
    check(logits, RoutingConfig(1, routing_method="Llama4"), {"score": "sigmoid"}, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", METHODS)
def test_topk_equals_eligible_experts(name, backend):
    E = 16
    groups = METHODS[name][1].get("groups")
    topk = E if groups is None else groups[1] * (E // groups[0])
    config, rules = case(name, E, topk)
    check(logits_like(np.random.default_rng(11), 10, E, "normal"), config, rules, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("E", [512, 2048])
def test_B14_many_experts(name, E, backend):
    config, rules = case(name, E, 22)
    logits = np.random.default_rng(E).normal(0, 2, (2, E)).astype(np.float32)
    check(logits, config, rules, backend)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_other_float_dtypes_are_taken_as_float32(dtype, backend):
    rng = np.random.default_rng(5)
    logits = rng.normal(0, 2, (9, 16)).astype(dtype)
    config = RoutingConfig(4)
    for got, want in zip(route(logits, config, backend=backend), route(logits.astype(np.float32), config), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_beyond_float32_is_infinite_without_a_warning(backend):
    logits = np.array([[1e300, 0.0, -1e300, 1.0]])
    with np.errstate(all="raise"):
        weights, ids = route(logits, RoutingConfig(3), backend=backend)
    assert ids.tolist() == [[0, 3, 1]] and weights.tolist() == [[1, 0, 0]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", METHODS)
def test_rows_are_independent_bit_for_bit(name, backend):
    E = 64
    config, _ = case(name, E, 6)
    logits = logits_like(np.random.default_rng(13), 259, E, "special")
    weights, ids = route(logits, config, backend=backend)
    for count in (1, 2, 7, 8, 9, 63, 64, 65, 128, 257):
        some_weights, some_ids = route(logits[-count:], config, backend=backend)
        np.testing.assert_array_equal(some_ids, ids[-count:])
        np.testing.assert_array_equal(some_weights.view(np.uint32), weights[-count:].view(np.uint32))


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides_and_read_only_inputs(backend):
    wide = np.random.default_rng(17).normal(size=(40, 32)).astype(np.float32)
    config = RoutingConfig(4, scoring_func="sigmoid", e_score_correction_bias=np.zeros(32, np.float32)[::2])
    wide.flags.writeable = False
    before = wide.copy()
    for view in (wide[::2, ::2], wide[::-1, 1::2], wide[:16, :20].T, np.broadcast_to(wide[:1, :16], (5, 16))):
        got, want = route(view, config, backend=backend), route(view.copy(), config, backend=backend)
        np.testing.assert_array_equal(got[0], want[0])
        np.testing.assert_array_equal(got[1], want[1])
    np.testing.assert_array_equal(wide, before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_are_fresh_and_error_state_is_untouched(backend):
    logits = np.full((3, 4), -np.inf, np.float32)
    with np.errstate(all="raise"):
        state = np.geterr()
        weights, ids = route(logits, RoutingConfig(2, renormalize=False), backend=backend)
        assert np.geterr() == state
    assert not np.shares_memory(weights, logits) and weights.flags.owndata and ids.flags.owndata
    again, _ = route(logits, RoutingConfig(2, renormalize=False), backend=backend)
    assert not np.shares_memory(weights, again)


def test_grouped_selection_masks_with_minus_infinity_not_zero():
    # All biased scores of the kept group are negative; a mask of 0 would pick the other group's experts.
    bias = np.array([-5, -6, -7, -8, -50, -50, -50, -50], np.float32)
    config = RoutingConfig(
        3, scoring_func="sigmoid", num_expert_group=2, topk_group=1, e_score_correction_bias=bias
    )  # fmt: skip
    _, ids = route(np.zeros((1, 8), np.float32), config)
    assert ids.tolist() == [[0, 1, 2]]


def test_bias_selects_but_never_weighs():
    bias = np.array([0, 0, 0, 10], np.float32)
    weights, ids = route(
        np.array([[3.0, 1.0, 0.0, 0.0]], np.float32),
        RoutingConfig(2, scoring_func="sigmoid", e_score_correction_bias=bias, renormalize=False),
    )
    assert ids.tolist() == [[3, 0]]
    np.testing.assert_array_equal(weights[0], np.float32([0.5, 1 / (1 + math.exp(-3))]))


def test_selection_by_logits_sees_what_scores_cannot():
    # Both sigmoids are 1 in float32 and both softmax scores of the small pair underflow; the logits still differ.
    for scoring in ("sigmoid", "softmax"):
        _, ids = route(np.array([[40.0, 50.0, -300.0, -299.0]], np.float32), RoutingConfig(4, scoring_func=scoring))
        assert ids.tolist() == [[1, 0, 3, 2]]
