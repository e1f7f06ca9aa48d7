"""Reliability rows A and B of whole calls: no tokens, idle experts, ids that must not index."""

from __future__ import annotations

import numpy as np
import pytest

import pymoe
from tests.corpus.memory import dirty
from tests.selection import BF16, selection

SCHEMES = [None, "fp8_w8a8", "fp8_w8a8_tensor", "fp8_w8a8_block", "int8_w8a8", "int4_w4a16", "mxfp4", "nvfp4"]


def quantized(problem, scheme):
    given = problem.arguments()
    if scheme is not None:
        w1, w2, config = pymoe.quantize_experts(given["w1"].astype("f4"), given["w2"].astype("f4"), scheme)
        given |= {"w1": w1, "w2": w2, "quant_config": config}
    return given


@pytest.mark.parametrize("scheme", SCHEMES)
def test_A1_A3_no_tokens_then_some(scheme):
    given = quantized(selection(4, 256, 128, 5, 3, dtype=BF16), scheme)
    before = pymoe.fused_experts(**given)
    none = given | {name: given[name][:0] for name in ("hidden_states", "topk_weights", "topk_ids")}
    y = pymoe.fused_experts(**none)
    assert y.shape == (0, 256) and y.dtype == BF16
    np.testing.assert_array_equal(pymoe.fused_experts(**given), before)


@pytest.mark.parametrize("E", [1, 96, 257])
def test_A2_no_tokens_with_a_router(E):
    problem = selection(0, 16, 8, E, 1)
    y = pymoe.fused_moe(problem.x, problem.w1, problem.w2, np.zeros((0, E), np.float32), 1)
    assert y.shape == (0, 16)


@pytest.mark.parametrize("idle", ["first", "middle", "last", "all_but_first", "all_but_last"])
@pytest.mark.parametrize("scheme", [None, "fp8_w8a8_block", "mxfp4"])
def test_A10_A11_A12_idle_experts_on_dirty_memory(scheme, idle):
    E = 6
    busy = {
        "first": range(1, E),
        "middle": [0, 1, 4, 5],
        "last": range(E - 1),
        "all_but_first": [0],
        "all_but_last": [5],
    }
    problem = selection(33, 256, 128, E, 3, dtype=BF16, dead=0)
    allowed = np.array(list(busy[idle]))
    problem.topk_ids = allowed[problem.topk_ids % len(allowed)]
    given = quantized(problem, scheme)
    answers = [pymoe.fused_experts(**given)]
    for fill in (0xFF, 0x7F, 0x00):
        with dirty(fill):
            answers.append(pymoe.fused_experts(**given))
    for y in answers:
        np.testing.assert_array_equal(y.view(np.uint16), answers[0].view(np.uint16))
    if scheme is None:
        np.testing.assert_array_equal(answers[0], problem.expected())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_A15_a_map_without_local_experts_gives_exactly_zero(scheme):
    given = quantized(selection(9, 256, 128, 5, 3, dtype=BF16), scheme) | {"expert_map": np.full(5, -1)}
    assert not pymoe.fused_experts(**given).any()
    for fill in (0xFF, 0x7F):
        with dirty(fill):
            assert not pymoe.fused_experts(**given).any()


@pytest.mark.parametrize("bad", [-1, -5, 5, 123456789, 2071690107, 2**31 - 1, -(2**31), 2**32 + 1, -(2**63), 2**63 - 1])
@pytest.mark.parametrize("slot", [0, 1, 2])
@pytest.mark.parametrize("scheme", [None, "fp8_w8a8_tensor"])
def test_B1_B2_B3_B4_ids_outside_the_range_in_each_slot(scheme, slot, bad):
    problem = selection(12, 256, 128, 5, 3, dtype=BF16, dead=0)
    problem.topk_ids[::2, slot] = bad
    problem.topk_ids[0] = bad
    given = quantized(problem, scheme)
    canaries = {name: given[name].copy() for name in ("hidden_states", "topk_ids", "topk_weights", "w1")}
    y = pymoe.fused_experts(**given)
    assert not y[0].any()
    kept = given | {"topk_ids": np.where(problem.topk_ids == bad, -1, problem.topk_ids)}
    np.testing.assert_array_equal(y, pymoe.fused_experts(**kept))
    for name, copy in canaries.items():
        assert given[name].tobytes() == copy.tobytes()


def test_B5_B6_rows_of_nan_logits_leave_live_rows_alone():
    problem = selection(20, 33, 17, 8, 2, dtype=np.float32)
    logits = np.random.default_rng(0).standard_normal((20, 8)).astype(np.float32)
    clean = pymoe.fused_moe(problem.x, problem.w1, problem.w2, logits, 2)
    padded, x = logits.copy(), problem.x.copy()
    padded[5:9], x[5:9] = np.nan, np.nan
    y = pymoe.fused_moe(x, problem.w1, problem.w2, padded, 2)
    live = np.r_[0:5, 9:20]
    np.testing.assert_array_equal(y[live], clean[live])


def test_B20_global_ids_where_local_ones_are_expected_raise_in_the_checked_mode():
    given = selection(6, 8, 4, 4, 2, dead=0).arguments()
    given["topk_ids"] = given["topk_ids"] + 60
    assert not pymoe.fused_experts(**given).any()
    pymoe.checked(True)
    with pytest.raises(pymoe.ArgumentError, match="row 0, slot 0"):
        pymoe.fused_experts(**given)


def test_B21_the_load_is_a_host_bincount():
    problem = selection(300, 16, 8, 7, 3)
    layer = pymoe.MoELayer(problem.w1, problem.w2, topk=3)
    layer(problem.x, topk_weights=problem.topk_weights, topk_ids=problem.topk_ids)
    legal = problem.topk_ids[(problem.topk_ids >= 0) & (problem.topk_ids < 7)]
    np.testing.assert_array_equal(layer.last_load, np.bincount(legal, minlength=7))


@pytest.mark.parametrize("E", [1, 127, 128, 129, 511, 512, 1023, 1024, 1025, 2048])
def test_B14_numbers_of_experts(E):
    problem = selection(40, 9, 5, E, min(E, 3), dtype=BF16)
    np.testing.assert_array_equal(pymoe.fused_experts(**problem.arguments()), problem.expected())


def test_B17_topk_of_one_renormalized_weighs_exactly_one():
    logits = np.random.default_rng(1).standard_normal((50, 6)).astype(np.float32)
    for scoring in ("softmax", "sigmoid"):
        assert (pymoe.select_experts(logits, 1, scoring_func=scoring)[0] == 1).all()
