"""Bad arguments of the router: the right kind, the house's sentence, before any work."""

from __future__ import annotations

import numpy as np
import pytest

from pymoe.config import RoutingConfig
from pymoe.errors import ArgumentError, DTypeError, ShapeError
from pymoe.ops.route import HashRouter, ZeroExpertRouter, route, route_as, simulate_routing

X = np.zeros((3, 8), np.float32)


class Foreign:
    def __dlpack__(self):
        raise AssertionError("must not be called")


def never(hidden_states, router_logits, topk, renormalize):
    raise AssertionError("work began before the checks")


LOGITS = [
    ([[1.0, 2.0]], DTypeError, "route: router_logits must be a NumPy, CuPy or DLPack array; got list"),
    (None, DTypeError, "route: router_logits must be a NumPy, CuPy or DLPack array; got NoneType"),
    (np.zeros(8, np.float32), ShapeError, r"route: router_logits must have shape \(any, any\); got \(8,\)"),
    (np.zeros((1, 3, 8), np.float32), ShapeError, r"router_logits must have shape .*got \(1, 3, 8\)"),
    (X.astype(np.int32), DTypeError, "route: router_logits must have a floating dtype; got int32"),
    (X.astype(bool), DTypeError, "router_logits must have a floating dtype; got bool"),
    (X.astype(complex), DTypeError, "router_logits must hold real numbers; got complex128"),
    (X.astype(">f4"), DTypeError, "router_logits must be in native byte order; got >f4"),
    (np.ma.masked_array(X), DTypeError, "router_logits must be a plain array; got a masked array"),
    (X.astype(object), DTypeError, "router_logits must hold real numbers; got object"),
    (Foreign(), DTypeError, "router_logits must be a NumPy, CuPy or DLPack array; got Foreign"),
    (np.zeros((3, 0), np.float32), ArgumentError, r"topk must be in 1..E, .*; got 1 with E = 0\."),
]


@pytest.mark.parametrize(("logits", "kind", "message"), LOGITS)
def test_bad_logits(logits, kind, message):
    with pytest.raises(kind, match=message):
        route(logits, RoutingConfig(1, custom_routing_function=never))
    with pytest.raises(kind, match=message):
        route(logits, RoutingConfig(1))


BIAS = np.zeros(8, np.float32)
CONFIGS = [
    ({"topk": 9}, ArgumentError, r"route: topk must be in 1..E, .*; got 9 with E = 8\."),
    (
        {"topk": 5, "num_expert_group": 4, "topk_group": 2},
        ArgumentError,
        r"route: topk must be at most the 4 experts of the kept groups; got 5 with 2 of 4 groups of 2\.",
    ),
    (
        {"topk": 1, "num_expert_group": 3, "topk_group": 2},
        ArgumentError,
        r"route: num_expert_group must divide E = 8; got 3\.",
    ),
    (
        {"topk": 1, "num_expert_group": 2, "topk_group": 3},
        ArgumentError,
        r"route: topk_group must be at most num_expert_group = 2; got 3\.",
    ),
    (
        {"topk": 1, "scoring_func": "sigmoid", "e_score_correction_bias": BIAS[:7]},
        ShapeError,
        r"route: e_score_correction_bias must have shape \(8\); got \(7,\)\.",
    ),
    (
        {"topk": 1, "scoring_func": "sigmoid", "e_score_correction_bias": BIAS.astype(int)},
        DTypeError,
        r"e_score_correction_bias must have a floating dtype; got int64\.",
    ),
    (
        {"topk": 1, "scoring_func": "sigmoid", "e_score_correction_bias": [0.0] * 8},
        DTypeError,
        r"e_score_correction_bias must be a NumPy, CuPy or DLPack array; got list\.",
    ),
    (
        {"topk": 1, "e_score_correction_bias": np.array([0, 0, np.nan, 0, 0, np.inf, 0, 0], np.float32)},
        ArgumentError,
        r"route: e_score_correction_bias must be finite; got nan for expert 2\.",
    ),
    (
        {"topk": 1, "custom_routing_function": never, "e_score_correction_bias": BIAS},
        ArgumentError,
        r"e_score_correction_bias must be None for the method Custom; got an array\.",
    ),
    (
        {"topk": 1, "custom_routing_function": never, "num_expert_group": 2, "topk_group": 1},
        ArgumentError,
        r"num_expert_group must be None for the method Custom; got 2\.",
    ),
]


@pytest.mark.parametrize(("arguments", "kind", "message"), CONFIGS)
def test_bad_configurations(arguments, kind, message):
    config = RoutingConfig(**arguments)
    with pytest.raises(kind, match=message):
        route(X, config)


@pytest.mark.parametrize(
    "method", ["Default", "Renormalize", "TopK", "Llama4", "Sigmoid", "SigmoidRenorm", "Simulated"]
)
def test_bias_of_a_method_that_reads_none(method):
    config = RoutingConfig(1, routing_method=method, e_score_correction_bias=BIAS)
    with pytest.raises(ArgumentError, match=f"e_score_correction_bias must be None for the method {method}; got"):
        route(X, config)


def test_config_and_backend():
    with pytest.raises(DTypeError, match=r"route: config must be a RoutingConfig; got int\."):
        route(X, 2)
    with pytest.raises(ArgumentError, match=r"route: backend must be .*; got 'cuda'\."):
        route(X, RoutingConfig(1), backend="cuda")


@pytest.mark.parametrize(
    ("extra", "kind", "message"),
    [
        ({"hidden_states": X[:2]}, ShapeError, r"route: hidden_states must have shape \(3, any\); got \(2, 8\)\."),
        ({"hidden_states": X[0]}, ShapeError, r"hidden_states must have shape \(3, any\); got \(8,\)\."),
        ({"hidden_states": X.astype(int)}, DTypeError, r"hidden_states must have a floating dtype; got int64\."),
        ({"input_ids": np.zeros(2, int)}, ShapeError, r"route: input_ids must have shape \(3\); got \(2,\)\."),
        ({"input_ids": np.zeros((3, 1), int)}, ShapeError, r"input_ids must have shape \(3\); got \(3, 1\)\."),
        ({"input_ids": np.zeros(3)}, DTypeError, r"route: input_ids must have an integer dtype; got float64\."),
        ({"input_ids": [0, 1, 2]}, DTypeError, r"route: input_ids must be a NumPy, CuPy or DLPack array; got list\."),
    ],
)
def test_bad_tokens(extra, kind, message):
    with pytest.raises(kind, match=message):
        route(X, RoutingConfig(1, custom_routing_function=never), **extra)


W, IDS = np.ones((3, 2), np.float32), np.zeros((3, 2), np.int64)


@pytest.mark.parametrize(
    ("answer", "kind", "message"),
    [
        (None, DTypeError, r"route: custom_routing_function must return the tuple \(weights, ids\); got NoneType\."),
        ((W,), DTypeError, r"custom_routing_function must return the tuple \(weights, ids\); got 1 values\."),
        ((W, IDS[:2]), ShapeError, r"custom_routing_function's ids must have shape \(3, 2\); got \(2, 2\)\."),
        ((W[:, :1], IDS), ShapeError, r"custom_routing_function's weights must have shape \(3, 2\); got \(3, 1\)\."),
        ((IDS, IDS), DTypeError, r"custom_routing_function's weights must have a floating dtype; got int64\."),
        ((W, W), DTypeError, r"custom_routing_function's ids must have an integer dtype; got float32\."),
        ((W, IDS.astype(bool)), DTypeError, r"custom_routing_function's ids must have an integer dtype; got bool\."),
        (
            (W.tolist(), IDS),
            DTypeError,
            r"custom_routing_function's weights must be a NumPy, CuPy or DLPack array; got list\.",
        ),
    ],
)
def test_bad_answers_of_custom_functions(answer, kind, message):
    with pytest.raises(kind, match=message):
        route(X, RoutingConfig(2, custom_routing_function=lambda *a: answer))


def test_a_custom_function_s_own_error_passes_through():
    def fails(hidden_states, router_logits, topk, renormalize):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        route(X, RoutingConfig(2, custom_routing_function=fails))


@pytest.mark.parametrize(
    ("table", "arguments", "kind", "message"),
    [
        (np.zeros((4, 2)), {}, DTypeError, r"HashRouter: table must have an integer dtype; got float64\."),
        (np.zeros(4, int), {}, ShapeError, r"HashRouter: table must have shape \(any, any\); got \(4,\)\."),
        (np.array([[0, -1]]), {}, ArgumentError, r"HashRouter: table must hold expert ids; got -1\."),
        (np.array([[0, 2**40]]), {}, ArgumentError, r"HashRouter: table must hold expert ids; got 1099511627776\."),
        ([[0, 1]], {}, DTypeError, r"HashRouter: table must be a NumPy, CuPy or DLPack array; got list\."),
        (np.zeros((4, 2), int), {"scoring_func": "tanh"}, ArgumentError, r"HashRouter: scoring_func must be one of"),
    ],
)
def test_hash_router_tables(table, arguments, kind, message):
    with pytest.raises(kind, match=message):
        HashRouter(table, **arguments)


@pytest.mark.parametrize(
    ("topk", "largest", "input_ids", "kind", "message"),
    [
        (2, 7, None, ArgumentError, r"HashRouter: input_ids must be given; got None\."),
        (2, 7, np.array([0, 4, 1]), ArgumentError, r"input_ids must be in 0..3, the table's rows; got 4 at row 1\."),
        (2, 7, np.array([0, 1, -1]), ArgumentError, r"input_ids must be in 0..3, the table's rows; got -1 at row 2\."),
        (2, 7, np.array([2**63, 0, 0], np.uint64), ArgumentError, r"input_ids must be in 0..3, .*at row 0\."),
        (3, 7, np.array([0, 1, 2]), ArgumentError, r"HashRouter: topk must be 2, the table's columns; got 3\."),
        (2, 8, np.array([0, 1, 2]), ArgumentError, r"router_logits must have more than 8 columns, .*; got 8\."),
    ],
)
def test_hash_router_calls(topk, largest, input_ids, kind, message):
    table = np.array([[0, 1], [1, 2], [2, 3], [3, largest]], np.int16)
    with pytest.raises(kind, match=message):
        route(X, RoutingConfig(topk, custom_routing_function=HashRouter(table)), input_ids=input_ids)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ((-1, 8, 2), ArgumentError, r"simulate_routing: M must be at least 0; got -1\."),
        ((3, 0, 1), ArgumentError, r"simulate_routing: E must be at least 1; got 0\."),
        ((3, 8, 9), ArgumentError, r"simulate_routing: topk must be in 1..E; got 9 with E = 8\."),
        ((3, 8, 0), ArgumentError, r"simulate_routing: topk must be at least 1; got 0\."),
        ((3.0, 8, 2), DTypeError, r"simulate_routing: M must be an integer; got 3\.0\."),
        ((3, 8, 2, "pareto"), ArgumentError, r"simulate_routing: distribution must be one of .*; got 'pareto'\."),
        ((3, 8, 2, np.ones(7)), ShapeError, r"distribution must have shape \(8\); got \(7,\)\."),
        ((3, 8, 2, np.ones(8, int)), DTypeError, r"distribution must have a floating dtype; got int64\."),
        ((3, 8, 2, -np.ones(8)), ArgumentError, r"distribution must be finite and at least 0; got -1\.0\."),
        ((3, 8, 2, np.full(8, np.nan)), ArgumentError, r"distribution must be finite and at least 0; got nan\."),
        ((3, 8, 2, np.eye(8)[0]), ArgumentError, r"distribution must have at least topk = 2 entries above 0; got 1 "),
        ((3, 8, 2, "uniform", -1), ArgumentError, r"simulate_routing: seed must be at least 0; got -1\."),
    ],
)
def test_simulate_routing(arguments, kind, message):
    with pytest.raises(kind, match=message):
        simulate_routing(*arguments)


def test_zero_expert_router():
    with pytest.raises(DTypeError, match=r"ZeroExpertRouter: config must be a RoutingConfig; got int\."):
        ZeroExpertRouter(2, 8)
    with pytest.raises(ArgumentError, match=r"ZeroExpertRouter: num_experts must be at least 1; got 0\."):
        ZeroExpertRouter(RoutingConfig(2), 0)
    router = ZeroExpertRouter(RoutingConfig(2), 9)
    with pytest.raises(ArgumentError, match=r"router_logits must have at least num_experts = 9 columns; got 8\."):
        router(X, X)
    router = ZeroExpertRouter(RoutingConfig(2), 6)
    with pytest.raises(ShapeError, match=r"hidden_states must have shape \(3, any\); got \(2, 8\)\."):
        router(X[:2], X)
    with pytest.raises(DTypeError, match=r"hidden_states must have dtype float32, float16, bfloat16; got float64"):
        router(X.astype(np.float64), X)


def test_errors_name_the_public_call():
    with pytest.raises(ArgumentError, match=r"select_experts: topk must be in 1..E, .*; got 9 with E = 8\."):
        route_as("select_experts", X, RoutingConfig(9))
    with pytest.raises(ArgumentError, match=r"ZeroExpertRouter: topk must be in 1..E, .*; got 9 with E = 8\."):
        ZeroExpertRouter(RoutingConfig(9), 6)(X, X)
