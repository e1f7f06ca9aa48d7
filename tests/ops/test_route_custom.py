"""Routers that are not a formula over logits: custom functions, hash tables, zero experts, simulated load."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pymoe.config import RoutingConfig
from pymoe.ops.route import HashRouter, ZeroExpertRouter, route, simulate_routing

LOGITS = np.random.default_rng(0).normal(0, 2, (6, 8)).astype(np.float32)


def test_custom_function_gets_its_four_arguments_and_nothing_else():
    seen = []

    def custom(hidden_states, router_logits, topk, renormalize):
        seen.append((hidden_states, router_logits, topk, renormalize))
        return np.ones((6, 2), np.float64), np.zeros((6, 2), np.uint8)

    x = np.ones((6, 4), np.float16)
    config = RoutingConfig(2, custom_routing_function=custom, renormalize=False, routed_scaling_factor=3.0)
    weights, ids = route(LOGITS, config, hidden_states=x, input_ids=np.arange(6))
    ((hidden, logits, topk, renormalize),) = seen
    assert np.shares_memory(hidden, x) and np.shares_memory(logits, LOGITS) and (topk, renormalize) == (2, False)
    assert weights.dtype == np.float32 and (weights == 3).all()
    assert ids.dtype == np.int32 and (ids == 0).all()


def test_input_ids_go_to_functions_that_name_them():
    class Lookup:
        def __call__(self, hidden_states, router_logits, topk, renormalize, input_ids=None):
            return np.ones((6, 1), np.float32), input_ids[:, None]

    config = RoutingConfig(1, custom_routing_function=Lookup())
    _, ids = route(LOGITS, config, input_ids=np.arange(6, dtype=np.uint16))
    assert ids[:, 0].tolist() == list(range(6))


def test_custom_answers_are_copied_and_ids_never_wrap():
    kept_weights = np.ones((6, 2), np.float32)
    kept_ids = np.array([[2**40 + 1, -(2**40)]] * 6)
    config = RoutingConfig(2, custom_routing_function=lambda *a: (kept_weights, kept_ids))
    weights, ids = route(LOGITS, config)
    assert not np.shares_memory(weights, kept_weights)
    assert ids[0].tolist() == [2**31 - 1, -(2**31)]
    for dtype, value, want in ((np.uint64, 2**63 + 3, 2**31 - 1), (np.uint32, 2**32 - 1, 2**31 - 1), (np.int8, -3, -3)):
        wide = np.full((6, 2), value, dtype)
        config = RoutingConfig(2, custom_routing_function=lambda *a, wide=wide: (kept_weights, wide))
        assert (route(LOGITS, config)[1] == want).all()


@pytest.mark.parametrize("scoring_func", ["sqrtsoftplus", "sigmoid", "softmax"])
@pytest.mark.parametrize("renormalize", [True, False])
def test_hash_router_against_loops(scoring_func, renormalize):
    rng = np.random.default_rng(1)
    table = rng.integers(0, 8, (11, 3)).astype(np.uint8)
    tokens = rng.integers(0, 11, 6)
    config = RoutingConfig(
        3,
        renormalize=renormalize,
        custom_routing_function=HashRouter(table, scoring_func=scoring_func),
        routed_scaling_factor=1.5,
    )
    weights, ids = route(LOGITS, config, input_ids=tokens)
    for row, token in enumerate(tokens):
        x = [float(v) for v in LOGITS[row]]
        scores = {
            "sqrtsoftplus": [math.sqrt(math.log1p(math.exp(v))) for v in x],
            "sigmoid": [1 / (1 + math.exp(-v)) for v in x],
            "softmax": [math.exp(v) / sum(map(math.exp, x)) for v in x],
        }[scoring_func]
        want = [scores[e] for e in table[token]]
        total = sum(want) if renormalize else 1.0
        assert ids[row].tolist() == table[token].tolist()
        # Scores, quotient and scaled weight are each rounded once: three half units, 2 units in all.
        np.testing.assert_array_max_ulp(weights[row], np.float32([1.5 * w / total for w in want]), maxulp=2)


def test_hash_router_copies_its_table_and_survives_dead_rows():
    table = np.array([[3, 1]], np.int32)
    router = HashRouter(table)
    table[:] = 7
    dead = np.full((1, 8), np.nan, np.float32)
    weights, ids = route(dead, RoutingConfig(2, custom_routing_function=router), input_ids=np.array([0]))
    assert ids.tolist() == [[3, 1]] and weights.tolist() == [[0.0, 0.0]]


def test_zero_experts_return_the_token():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(6, 4)).astype(np.float32)
    config = RoutingConfig(3, routed_scaling_factor=2.0)
    weights, ids = route(LOGITS, config)
    routing = ZeroExpertRouter(config, num_experts=5)(x, LOGITS)
    is_zero = ids >= 5
    assert is_zero.any() and not is_zero.all()
    np.testing.assert_array_equal(routing.topk_ids, np.where(is_zero, -1, ids))
    np.testing.assert_array_equal(routing.topk_weights, np.where(is_zero, 0, weights))
    assert routing.topk_ids.dtype == np.int32 and routing.zero_output.dtype == np.float32
    for row in range(6):
        share = sum(float(w) for w, z in zip(weights[row], is_zero[row], strict=True) if z)
        # Two float32 additions and one product of values of one sign: three half units, 2 units in all.
        np.testing.assert_array_max_ulp(routing.zero_output[row], np.float32(share * x[row].astype(float)), maxulp=2)


def test_a_token_without_zero_experts_gets_exactly_0_though_it_is_nan():
    logits = np.array([[5.0, 0.0, -5.0], [-5.0, 0.0, 5.0]], np.float32)
    x = np.full((2, 3), np.nan, np.float32)
    routing = ZeroExpertRouter(RoutingConfig(1), num_experts=2)(x, logits)
    assert routing.zero_output[0].tolist() == [0, 0, 0] and np.isnan(routing.zero_output[1]).all()


@pytest.mark.parametrize("distribution", ["uniform", "normal", "zipf", "balanced", "single", np.arange(16) / 7])
def test_simulated_routings_are_legal_and_prefixes_of_each_other(distribution):
    weights, ids = simulate_routing(5000, 16, 4, distribution, seed=3)
    assert weights.dtype == np.float32 and ids.dtype == np.int32
    assert ((ids >= 0) & (ids < 16)).all() and (np.sort(ids)[:, 1:] != np.sort(ids)[:, :-1]).all()
    assert (weights > 0).all()
    # Each of the 4 weights is rounded once, and is at most 1.
    assert np.abs(weights.astype(np.float64).sum(axis=1) - 1).max() <= 4 * 2.0**-25
    for M in (0, 1, 4095, 4097):
        fewer_weights, fewer_ids = simulate_routing(M, 16, 4, distribution, seed=3)
        np.testing.assert_array_equal(fewer_ids, ids[:M])
        np.testing.assert_array_equal(fewer_weights, weights[:M])


def test_simulated_loads_follow_the_distribution():
    M, E = 20_000, 8
    for distribution, want in (
        ("uniform", np.full(E, 1 / E)),
        ("zipf", 1 / np.arange(1, E + 1) / sum(1 / np.arange(1, E + 1))),
        (np.array([0, 1, 0, 3, 0, 0, 0, 0.0]), np.array([0, 0.25, 0, 0.75, 0, 0, 0, 0])),
    ):
        _, ids = simulate_routing(M, E, 1, distribution, seed=1)
        share = np.bincount(ids[:, 0], minlength=E) / M
        # Five standard deviations of a binomial share.
        assert (np.abs(share - want) <= 5 * np.sqrt(want * (1 - want) / M)).all(), distribution
    _, ids = simulate_routing(M, E, 2, "balanced")
    assert np.bincount(ids.ravel()).tolist() == [2 * M // E] * E
    assert (simulate_routing(10, E, 2, "single")[1] == [0, 1]).all()
    assert (simulate_routing(64, E, 2, seed=1)[1] != simulate_routing(64, E, 2, seed=2)[1]).any()


def test_method_simulated_reads_only_the_shape():
    logits = np.full((6, 8), np.nan, np.float32)
    weights, ids = route(logits, RoutingConfig(2, routing_method="Simulated"))
    np.testing.assert_array_equal(ids, simulate_routing(6, 8, 2)[1])
    np.testing.assert_array_equal(weights, simulate_routing(6, 8, 2)[0])
