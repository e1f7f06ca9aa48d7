"""Routers under bad logits: the letter B of the failure catalogue, ties, and sums of nothing."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import sys

import numpy as np
import pytest

from pymoe.config import RoutingConfig, RoutingMethodType
from pymoe.errors import ArgumentError
from pymoe.ops.route import route as stage
from tests.ops.devices import BACKENDS, staged

route = staged(stage)


NAN, INF = np.float32(np.nan), np.float32(np.inf)


def config_of(name, topk, E=16, groups=4, topk_group=2):
    """Return a configuration of each kind for E experts."""
    bias = np.linspace(-0.3, 0.3, E, dtype=np.float32)
    return {
        "softmax": lambda: RoutingConfig(topk),
        "softmax_raw": lambda: RoutingConfig(topk, renormalize=False),
        "sigmoid": lambda: RoutingConfig(topk, scoring_func="sigmoid"),
        "sigmoid_raw": lambda: RoutingConfig(topk, scoring_func="sigmoid", renormalize=False),
        "topk": lambda: RoutingConfig(topk, routing_method="TopK"),
        "bias": lambda: RoutingConfig(topk, scoring_func="sigmoid", e_score_correction_bias=bias),
        "softplus": lambda: RoutingConfig(topk, scoring_func="sqrtsoftplus"),
        "softplus_bias": lambda: RoutingConfig(topk, scoring_func="sqrtsoftplus", e_score_correction_bias=bias),
        "deepseek": lambda: RoutingConfig(
            topk,
            scoring_func="sigmoid",
            num_expert_group=groups,
            topk_group=topk_group,
            e_score_correction_bias=bias,
        ),
        "groups": lambda: RoutingConfig(topk, num_expert_group=groups, topk_group=topk_group),
    }[name]()


KINDS = (
    "softmax", "softmax_raw", "sigmoid", "sigmoid_raw", "topk", "bias", "softplus", "softplus_bias", "deepseek",
    "groups",
)  # fmt: skip


def assert_legal(weights, ids, E):
    assert ((ids >= 0) & (ids < E)).all()
    assert all(len(set(row)) == len(row) for row in ids.tolist())
    assert np.isfinite(weights).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fill", [NAN, -INF])
def test_B5_all_nan_logits_give_ids_0_to_topk_and_weights_0(kind, fill, backend):
    weights, ids = route(np.full((3, 16), fill), config_of(kind, 4), backend=backend)
    assert ids.tolist() == [[0, 1, 2, 3]] * 3
    assert weights.tolist() == [[0.0] * 4] * 3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_B6_nan_padding_rows_leave_live_rows_bitwise_alone(kind, backend):
    logits = np.random.default_rng(1).normal(0, 3, (32, 16)).astype(np.float32)
    padded = np.full((64, 16), NAN)
    padded[::2] = logits
    want = route(logits, config_of(kind, 4), backend=backend)
    got = route(padded, config_of(kind, 4), backend=backend)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_array_equal(g[::2].view(np.uint32), w.view(np.uint32))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("place", range(8))
def test_B7_one_nan_logit_keeps_the_finite_experts(place, backend):
    logits = np.arange(8, dtype=np.float32)[None].repeat(2, axis=0)
    logits[0, place] = NAN
    weights, ids = route(logits, RoutingConfig(3), backend=backend)
    finite = [e for e in (7, 6, 5, 4) if e != place][:3]
    assert ids[0].tolist() == finite
    assert abs(float(weights[0].astype(np.float64).sum()) - 1) <= 3 * 2.0**-24
    assert ids[1].tolist() == [7, 6, 5]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_B7_more_slots_than_finite_experts(kind, backend):
    logits = np.full((1, 16), NAN)
    logits[0, [3, 9]] = 1.0, 2.0
    weights, ids = route(logits, config_of(kind, 6), backend=backend)
    assert_legal(weights, ids, 16)
    chosen_nothing = ~np.isin(ids[0], [3, 9])
    assert (weights[0, chosen_nothing] == 0).all()
    if kind in ("softmax", "softmax_raw", "sigmoid", "sigmoid_raw", "topk", "softplus"):
        assert ids[0].tolist() == [9, 3, 0, 1, 2, 4]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="guard pages are set with mprotect")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_B8_logits_at_the_end_of_their_memory(kind, backend):
    page = mmap.PAGESIZE
    memory = mmap.mmap(-1, 3 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    for guard in (start, start + 2 * page):
        assert libc.mprotect(ctypes.c_void_p(guard), page, mmap.PROT_READ * 0) == 0
    buffer = (ctypes.c_float * (page // 4)).from_address(start + page)
    everything = np.frombuffer(buffer, np.float32)
    for M in (1, 3, 5):
        for logits in (everything[-M * 16 :].reshape(M, 16), everything[: M * 16].reshape(M, 16)):
            logits[:] = np.random.default_rng(M).normal(size=(M, 16))
            logits[0, 5] = NAN
            assert_legal(*route(logits, config_of(kind, 6), backend=backend), 16)
    for guard in (start, start + 2 * page):
        libc.mprotect(ctypes.c_void_p(guard), page, mmap.PROT_READ | mmap.PROT_WRITE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_B9_negative_bias_never_leaves_the_kept_groups(backend):
    E, groups, kept, topk = 32, 8, 4, 8
    logits = np.random.default_rng(2).normal(size=(50, E)).astype(np.float32)
    bias = np.full(E, -10, np.float32)
    config = RoutingConfig(
        topk, scoring_func="sigmoid", num_expert_group=groups, topk_group=kept, e_score_correction_bias=bias
    )  # fmt: skip
    _, ids = route(logits, config, backend=backend)
    biased = (1 / (1 + np.exp(-logits.astype(np.float64)))).astype(np.float32) + bias
    for row in range(50):
        best_total, best_groups = -np.inf, ()
        for combination in itertools.combinations(range(groups), kept):
            total = sum(np.sort(biased[row].reshape(groups, -1)[g])[-2:].sum(dtype=np.float64) for g in combination)
            if total > best_total:
                best_total, best_groups = total, combination
        assert set(ids[row] // (E // groups)) <= set(best_groups)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [-1e4, -3e38, -700.0, -104.0, -88.0])
def test_B10_vanishing_scores_divide_by_no_zero(kind, value, backend):
    weights, ids = route(np.full((2, 16), value, np.float32), config_of(kind, 4), backend=backend)
    assert_legal(weights, ids, 16)
    if kind in ("sigmoid", "bias", "deepseek") and value <= -700:
        assert (weights == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_B11_topk_above_E_names_both_numbers(kind, backend):
    with pytest.raises(ArgumentError, match=r"route: topk must .*17.*16"):
        route(np.zeros((2, 16), np.float32), config_of(kind, 17), backend=backend)
    assert issubclass(ArgumentError, ValueError)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["deepseek", "groups"])
@pytest.mark.parametrize("topk_group", [4, 8])
def test_B12_groups_of_one_expert(kind, topk_group, backend):
    logits = np.random.default_rng(3).normal(size=(20, 8)).astype(np.float32)
    weights, ids = route(logits, config_of(kind, 4, 8, groups=8, topk_group=topk_group), backend=backend)
    assert_legal(weights, ids, 8)
    if kind == "groups":
        assert ids.tolist() == np.argsort(-logits, axis=1, kind="stable")[:, :4].tolist()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("E", [6, 96, 160, 384])
def test_B13_row_counts_on_both_sides_of_every_block(E, backend):
    config = config_of("sigmoid", 6, E)
    base = np.random.default_rng(E).normal(size=(5, E)).astype(np.float32)
    want_weights, want_ids = route(base, config)
    for M in (1, 15, 16, 17, 255, 256, 257, 1023, 1024, 1025, 4095, 4097):
        weights, ids = route(np.resize(base, (M, E)), config, backend=backend)
        np.testing.assert_array_equal(ids, np.resize(want_ids, (M, 6)))
        np.testing.assert_array_equal(weights, np.resize(want_weights, (M, 6)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["softmax", "softmax_raw", "bias", "topk", "softplus_bias"])
@pytest.mark.parametrize("E", [1, 127, 128, 129, 511, 512, 1023, 1024, 1025, 2048])
def test_B14_expert_counts(kind, E, backend):
    logits = np.random.default_rng(E).permutation(E).astype(np.float32)[None] / 64
    for topk in sorted({1, min(8, E), E}):
        weights, ids = route(logits, config_of(kind, topk, E), backend=backend)
        assert_legal(weights, ids, E)
        if kind != "bias" and kind != "softplus_bias":
            assert ids[0].tolist() == np.argsort(-logits[0])[:topk].tolist()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["softmax", "softmax_raw", "sigmoid", "topk", "softplus_bias", "softplus"])
def test_B15_five_experts(kind, backend):
    # Each expert wins the rows that are its own: a wrap at a multiple of some block would move one.
    weights, ids = route(np.float32(9) * np.eye(5, dtype=np.float32), config_of(kind, 1, 5), backend=backend)
    assert ids[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert_legal(weights, ids, 5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["softmax", "softmax_raw", "sigmoid", "topk", "bias", "softplus"])
def test_B16_every_pair_of_E_and_topk(kind, backend):
    rng = np.random.default_rng(4)
    for E in range(1, 20):
        logits = rng.normal(size=(2, E)).astype(np.float32)
        for topk in range(1, E + 1):
            weights, ids = route(logits, config_of(kind, topk, E), backend=backend)
            assert weights.shape == ids.shape == (2, topk)
            assert_legal(weights, ids, E)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "bias", "softplus", "softplus_bias", "deepseek", "groups"])
def test_B17_topk_1_renormalized_is_exactly_1(kind, backend):
    logits = np.random.default_rng(5).normal(0, 5, (200, 16)).astype(np.float32)
    weights, _ = route(logits, config_of(kind, 1), backend=backend)
    assert (weights == 1).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_B18_repeats_are_bitwise_equal(kind, backend):
    logits = np.random.default_rng(6).normal(0, 3, (300, 16)).astype(np.float32)
    first = [a.tobytes() for a in route(logits, config_of(kind, 4), backend=backend)]
    for _ in range(20):
        assert [a.tobytes() for a in route(logits, config_of(kind, 4), backend=backend)] == first


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["deepseek", "groups"])
@pytest.mark.parametrize("group", range(4))
def test_B19_all_but_one_group_minus_infinity(kind, group, backend):
    logits = np.full((1, 16), -INF)
    logits[0, 4 * group : 4 * group + 4] = [0.0, 1.0, 2.0, 3.0]
    config = config_of("groups", 4, topk_group=1)
    if kind == "deepseek":
        config = RoutingConfig(
            4,
            scoring_func="sigmoid",
            num_expert_group=4,
            topk_group=1,
            e_score_correction_bias=np.zeros(16, np.float32),
        )
    _, ids = route(logits, config, backend=backend)
    assert ids[0].tolist() == [4 * group + e for e in (3, 2, 1, 0)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_A2_no_tokens(kind, backend):
    weights, ids = route(np.zeros((0, 96), np.float32), config_of(kind, 6, 96), backend=backend)
    assert weights.shape == ids.shape == (0, 6) and weights.dtype == np.float32 and ids.dtype == np.int32


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [k for k in KINDS if "bias" not in k and k != "deepseek"])
@pytest.mark.parametrize("value", [0.0, 3.0, INF, -50.0])
def test_ties_go_to_the_lowest_id_and_the_lowest_group(kind, value, backend):
    _, ids = route(np.full((1, 16), value, np.float32), config_of(kind, 5), backend=backend)
    assert ids.tolist() == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_minus_zero_ties_with_zero(backend):
    _, ids = route(np.array([[-0.0, 0.0, -0.0, 0.0]], np.float32), RoutingConfig(3), backend=backend)
    assert ids.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_plus_infinity_is_the_largest_float32(backend):
    largest = np.finfo(np.float32).max
    logits = np.array([[INF, 0.0, largest, -largest]], np.float32)
    weights, ids = route(logits, RoutingConfig(2), backend=backend)
    assert ids.tolist() == [[0, 2]] and weights.tolist() == [[0.5, 0.5]]
    weights, ids = route(logits, RoutingConfig(4, routing_method="TopK"), backend=backend)
    assert ids.tolist() == [[0, 2, 1, 3]] and weights.tolist() == [[largest, largest, 0.0, -largest]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_topk_method_gives_minus_infinity_weight_0(backend):
    weights, ids = route(np.array([[-INF, -2.0, NAN]], np.float32), RoutingConfig(3, routing_method="TopK"))
    assert ids.tolist() == [[1, 0, 2]] and weights.tolist() == [[-2.0, 0.0, 0.0]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [0.0, -2.0, 1e300])
def test_scale_multiplies_last_and_warns_never(scale, backend):
    logits = np.array([[1.0, 1.0], [NAN, NAN]], np.float32)
    with np.errstate(all="raise"):
        weights, _ = route(logits, RoutingConfig(2, routed_scaling_factor=scale), backend=backend)
    assert weights[0].tolist() == [float(np.float64(0.5 * scale)) if abs(scale) < 1e38 else np.inf] * 2
    assert weights[1].tolist() == [0, 0] and not np.signbit(weights[1]).any()


def test_every_method_is_covered():
    # Fails when a method is added without a line in these files.
    assert {m.name for m in RoutingMethodType} == {
        "Default", "Renormalize", "DeepSeekV3", "Llama4", "RenormalizeNaive", "TopK", "SigmoidRenorm", "MiniMax2",
        "Sigmoid", "Unspecified", "DeepseekV4", "Custom", "Simulated",
    }  # fmt: skip
