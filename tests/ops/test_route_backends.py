"""The numba backend has the definition's bits, and the shared exponential is as accurate as it says."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from pymoe.config import RoutingConfig
from pymoe.ops.route import _scores
from pymoe.ops.route import route as stage
from tests.ops.devices import DEVICES, staged

route = staged(stage)
FAST = [("numba", None), *(pytest.param((p.values[0],), marks=p.marks, id=p.values[0]) for p in DEVICES)]
"""Backends that have the definition's bits."""

BIAS = np.random.default_rng(9).normal(0, 0.2, 2048).astype(np.float32)


def configs(E, topk):
    """Yield every combination of scoring, renormalization, bias and groups that E and topk allow."""
    yield RoutingConfig(topk, routing_method="TopK", routed_scaling_factor=0.3)
    for scoring in ("softmax", "sigmoid", "sqrtsoftplus"):
        for renormalize in (True, False):
            for bias in (None, BIAS[:E]):
                for groups in (None, 1, 2, 8):
                    if groups and (E % groups or topk > (E // groups) * max(1, groups // 2)):
                        continue
                    yield RoutingConfig(
                        topk,
                        renormalize,
                        scoring,
                        groups,
                        groups and max(1, groups // 2),
                        bias,
                        routed_scaling_factor=2.5 if renormalize else 1.0,
                    )
    if E % 4 == 0 and topk <= E // 2:
        yield RoutingConfig(topk, num_expert_group=4, topk_group=2, routing_method="DeepSeekV3")


def assert_same_bits(logits, config, backends=("numba", None)):
    want_weights, want_ids = route(logits, config, backend="numpy")
    for backend in backends:
        weights, ids = route(logits, config, backend=backend)
        np.testing.assert_array_equal(ids, want_ids)
        np.testing.assert_array_equal(weights.view(np.uint32), want_weights.view(np.uint32))


@pytest.mark.parametrize("kind", ["normal", "wide", "ties", "any_bits"])
@pytest.mark.parametrize(("E", "topk"), [(1, 1), (5, 3), (8, 2), (16, 16), (33, 8), (64, 6), (256, 8), (512, 100)])
@pytest.mark.parametrize("backends", FAST)
def test_fast_backends_have_the_bits_of_numpy(E, topk, kind, backends):
    rng = np.random.default_rng(E)
    logits = rng.normal(0, 3, (40, E)).astype(np.float32)
    if kind == "wide":
        logits *= rng.choice(np.float32([1, 30, 1e3, 1e30]), (40, 1))
    elif kind == "ties":
        logits = np.round(logits / 2)
    elif kind == "any_bits":  # every exponent, both infinities, NaN of either sign
        logits = rng.integers(0, 2**32, (40, E), dtype=np.uint32).view(np.float32)
        logits[::3, :: max(1, E // 3)] = rng.choice(np.float32([np.nan, np.inf, -np.inf, -0.0]), 1)
        logits[1 % len(logits)] = -np.inf
    for config in configs(E, topk):
        assert_same_bits(logits, config, backends)


@pytest.mark.parametrize("backends", FAST)
def test_fast_backends_have_the_bits_of_numpy_for_2048_experts(backends):
    logits = np.random.default_rng(3).normal(0, 3, (5, 2048)).astype(np.float32)
    for config in configs(2048, 22):
        assert_same_bits(logits, config, backends)


def test_numba_has_the_bits_of_numpy_over_many_blocks():
    logits = np.random.default_rng(4).normal(0, 3, (5000, 64)).astype(np.float32)
    for config in (RoutingConfig(6), RoutingConfig(6, False, "sigmoid", 8, 4, BIAS[:64])):
        assert_same_bits(logits, config)


@pytest.mark.parametrize("num_threads", ["1", "2", "3", "7"])
def test_bits_do_not_depend_on_the_threads(num_threads, monkeypatch):
    logits = np.random.default_rng(5).normal(0, 3, (3001, 64)).astype(np.float32)
    for config in (RoutingConfig(6), RoutingConfig(6, True, "sqrtsoftplus", None, None, BIAS[:64])):
        monkeypatch.setenv("PYMOE_NUM_THREADS", "4")
        want = [a.tobytes() for a in route(logits, config)]
        monkeypatch.setenv("PYMOE_NUM_THREADS", num_threads)
        assert [a.tobytes() for a in route(logits, config)] == want


def test_callers_in_many_threads_do_not_disturb_each_other():
    rng = np.random.default_rng(6)
    cases = [rng.normal(0, 3, (M, 64)).astype(np.float32) for M in (1, 300, 900, 2000)] * 4
    want = [route(logits, RoutingConfig(6), backend="numpy") for logits in cases]
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda logits: route(logits, RoutingConfig(6)), cases))
    for g, w in zip(got, want, strict=True):
        assert [a.tobytes() for a in g] == [a.tobytes() for a in w]


def test_exp_is_within_1e_15():
    t = np.concatenate([-np.linspace(0, 708, 20011), -np.geomspace(1e-300, 708, 5003)])
    got = _scores.exp(t)
    # Measured 2.3e-16; the polynomial's remainder is below 1e-17 and its steps round a handful of times.
    assert max(abs(g / math.exp(v) - 1) for g, v in zip(got.tolist(), t.tolist(), strict=True)) <= 1e-15
    assert _scores.exp(np.array([0.0, -0.0])).tolist() == [1.0, 1.0]
    assert np.float32(_scores.exp(np.array([-np.inf])))[0] == 0


def test_log1p_is_within_1e_15():
    z = np.concatenate([np.linspace(0, 1, 20011)[1:], np.geomspace(1e-300, 1, 5003)])
    got = _scores.log1p(z)
    assert max(abs(g / math.log1p(v) - 1) for g, v in zip(got.tolist(), z.tolist(), strict=True)) <= 1e-15
    assert _scores.log1p(np.zeros(1))[0] == 0


@pytest.mark.parametrize(
    ("function", "exact"),
    [
        (_scores.sigmoid, lambda v: 1 / (1 + math.exp(-v)) if v > -80 else math.exp(v)),
        (_scores.sqrtsoftplus, lambda v: math.sqrt(v if v > 20 else math.log1p(math.exp(v)))),
    ],
)
def test_scores_are_rounded_once(function, exact):
    x = np.concatenate([np.linspace(-100, 100, 40009), np.geomspace(1e-30, 1e30, 2001)]).astype(np.float32)
    got, want = function(x), np.float32([exact(float(v)) for v in x])
    # Two float64 values 1e-14 apart round to different float32 values about once in 10**6.
    assert np.count_nonzero(got != want) <= 2
    np.testing.assert_array_max_ulp(got, want, maxulp=1)


@pytest.mark.parametrize("E", [1, 31, 32, 33, 64, 100])
def test_lane_sum_is_the_sum_in_its_stated_order(E):
    x = np.random.default_rng(E).random((4, E)) * np.geomspace(1, 1e16, E)
    for row, got in zip(x, _scores.lane_sum(x), strict=True):
        lanes = [0.0] * 32
        for e, v in enumerate(row):
            lanes[e % 32] += float(v)
        while len(lanes) > 1:
            lanes = [a + b for a, b in zip(lanes[: len(lanes) // 2], lanes[len(lanes) // 2 :], strict=True)]
        assert got == lanes[0]
