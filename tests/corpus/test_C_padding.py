"""Reliability rows C: padding, memory that was never written, tails."""

from __future__ import annotations

import contextlib
import mmap

import numpy as np
import pytest

import pymoe
from pymoe import BatchedPrepareAndFinalize, FusedMoEKernel, NaiveBatchedExperts
from pymoe.config import FusedMoEConfig
from pymoe.quantization import FUSED_MOE_UNQUANTIZED_CONFIG
from tests.corpus.memory import dirty
from tests.corpus.test_AB_empty_and_ids import SCHEMES, quantized
from tests.selection import BF16, selection

FILLS = (0xFF, 0x7F, 0x00)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_C1_C4_C8_C13_bits_do_not_depend_on_what_memory_held(scheme):
    given = quantized(selection(37, 256, 128, 5, 3, dtype=BF16), scheme)
    answers = [pymoe.fused_experts(**given).tobytes()]
    for fill in FILLS:
        with dirty(fill):
            answers.append(pymoe.fused_experts(**given).tobytes())
    assert len(set(answers)) == 1


def test_C1_the_first_call_and_the_fiftieth():
    given = selection(37, 64, 33, 5, 3, dtype=BF16).arguments()
    first = pymoe.fused_experts(**given).tobytes()
    assert all(pymoe.fused_experts(**given).tobytes() == first for _ in range(50))


@pytest.mark.parametrize("weight", [np.nan, 0.0, np.inf])
def test_C2_C12_weights_and_tokens_of_padded_slots_are_never_used(weight):
    problem = selection(12, 32, 16, 4, 2, dtype=np.float32, dead=0)
    expected = problem.expected()
    problem.topk_ids[3:6] = -1
    problem.topk_weights[3:6] = weight
    problem.x[3:6] = np.nan
    expected[3:6] = 0
    np.testing.assert_array_equal(pymoe.fused_experts(**problem.arguments()), expected)


@pytest.mark.parametrize("counts", [(1, 31, 33), (33, 1, 31), (16, 15, 17), (1, 1, 1)])
def test_C3_counts_around_the_tiles_on_dirty_memory(counts):
    ids = np.repeat(np.arange(3), counts)[:, None]
    problem = selection(len(ids), 48, 17, 3, 1, dtype=BF16, dead=0)
    problem.topk_ids = np.random.default_rng(0).permutation(ids)
    for fill in (None, *FILLS):
        with dirty(fill) if fill is not None else contextlib.nullcontext():
            np.testing.assert_array_equal(pymoe.fused_experts(**problem.arguments()), problem.expected())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_C5_C16_a_token_that_nobody_wants_gets_exactly_zero(scheme):
    problem = selection(7, 256, 128, 4, 2, dtype=BF16, dead=0)
    problem.topk_ids[2] = -1
    given = quantized(problem, scheme)
    assert not pymoe.fused_experts(**given)[2].any()
    for fill in FILLS:
        with dirty(fill):
            assert not pymoe.fused_experts(**given)[2].any()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_C6_C11_the_batched_format_on_dirty_memory(scheme):
    problem = selection(9, 256, 128, 6, 2, dtype=BF16)
    problem.topk_ids %= 3  # experts 3 to 5 stay idle
    given = quantized(problem, scheme)
    config = FusedMoEConfig(6, 2, 256, 128, 6, in_dtype=BF16)
    quant_config = given.get("quant_config", FUSED_MOE_UNQUANTIZED_CONFIG)
    kernel = FusedMoEKernel(BatchedPrepareAndFinalize(12, 6), NaiveBatchedExperts(config, quant_config, 12, 1))
    answers = []
    expected = pymoe.fused_experts(**given).tobytes()
    for fill in FILLS:
        with dirty(fill):
            y = kernel.apply(
                given["hidden_states"], given["w1"], given["w2"],
                topk_weights=given["topk_weights"], topk_ids=given["topk_ids"],
            )  # fmt: skip
        answers.append(y.tobytes())
    assert len(set(answers)) == 1
    assert answers[0] == expected


def at_the_end_of_a_mapping(array):
    """Return a copy whose last byte is the last of its pages, so that a read behind it leaves the mapping."""
    size = -(-max(array.nbytes, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
    pages = np.frombuffer(mmap.mmap(-1, size), np.uint8)
    copy = pages[size - array.nbytes :].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def test_C7_arrays_at_the_end_of_their_mapping():
    problem = selection(13, 48, 17, 5, 3, dtype=np.float32)
    given = problem.arguments()
    placed = {name: at_the_end_of_a_mapping(a) if isinstance(a, np.ndarray) else a for name, a in given.items()}
    np.testing.assert_array_equal(pymoe.fused_experts(**placed), problem.expected())


def test_C10_C14_an_output_full_of_nan_and_its_surroundings():
    problem = selection(13, 47, 17, 5, 3, dtype=np.float32)
    around = np.full((15, 49), np.nan, np.float32)
    out = around[1:14, 1:48]
    assert pymoe.fused_experts(**problem.arguments(), out=out) is out
    np.testing.assert_array_equal(out, problem.expected())
    around[1:14, 1:48] = np.nan
    assert np.isnan(around).all()


def test_C15_one_token():
    for seed in range(20):
        problem = selection(1, 31, 7, 3, 2, dtype=BF16, seed=seed)
        np.testing.assert_array_equal(pymoe.fused_experts(**problem.arguments()), problem.expected())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e38])
def test_C17_O3_a_poisoned_token_reaches_its_own_row_and_no_other(scheme, poison):
    problem = selection(9, 256, 128, 4, 2, dtype=BF16, dead=0)
    given = quantized(problem, scheme)
    clean = pymoe.fused_experts(**given)
    given["hidden_states"] = problem.x.copy()
    given["hidden_states"][4] = poison
    y = pymoe.fused_experts(**given)
    others = np.arange(9) != 4
    per_tensor = given.get("quant_config") is not None and given["quant_config"].is_dynamic_per_tensor
    if not per_tensor or np.isnan(poison):
        # An infinite or huge token moves a scale that all tokens share: that scheme's own coupling, not a leak.
        np.testing.assert_array_equal(y[others], clean[others])
    assert np.isfinite(y[others].astype(np.float32)).all()
    if np.isnan(poison):
        # Per-tensor int8 has no NaN: code 0, as docs/numerics says.
        assert np.isnan(y[4].astype(np.float32)).any()
