"""The modular kernel's pipeline: order of stages, chunks, buffers, asynchronous pairs, shared experts."""

from __future__ import annotations

import numpy as np
import pytest

from pymoe.errors import ArgumentError, UnsupportedError
from pymoe.kernel import FusedMoEKernel
from tests.kernel.recording import RecordingExperts, RecordingPrepareAndFinalize, moe_config

K, N, E, TOPK = 8, 12, 4, 2


def problem(M, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "hidden_states": rng.standard_normal((M, K), dtype=np.float32),
        "w1": rng.standard_normal((E, N, K), dtype=np.float32),
        "w2": rng.standard_normal((E, K, N // 2), dtype=np.float32),
        "topk_weights": rng.random((M, TOPK), dtype=np.float32),
        "topk_ids": rng.integers(0, E, (M, TOPK)),
    }


def without_questions(log):
    return [entry for entry in log if not entry.startswith("workspace_shapes")]


def test_order_of_stages():
    log = []
    kernel = FusedMoEKernel(RecordingPrepareAndFinalize(log), RecordingExperts(log))
    given = problem(5)
    y = kernel.apply(**given)
    assert without_questions(log) == [
        "post_init_setup(RecordingExperts)", "prepare(defer=False)", "experts(5)", "finalize(5)",
    ]  # fmt: skip
    np.testing.assert_array_equal(y, 2 * given["hidden_states"])


@pytest.mark.parametrize("mode", ["hook", "receiver"])
def test_async_order_with_shared_experts(mode):
    log = []

    def shared(x):
        log.append("shared")
        return x + 1

    kernel = FusedMoEKernel(RecordingPrepareAndFinalize(log, mode), RecordingExperts(log), shared)
    given = problem(3)
    beside, y = kernel.apply(**given)
    hooks = (["prepare hook"], ["finalize hook"]) if mode == "hook" else ([], [])
    assert without_questions(log)[1:] == [
        *hooks[0], "prepare(defer=False)", "experts(3)", "finalize_async", "shared", *hooks[1], "finalize(3)",
    ]  # fmt: skip
    np.testing.assert_array_equal(beside, given["hidden_states"] + 1)
    np.testing.assert_array_equal(y, 2 * given["hidden_states"])


def test_sync_shared_experts_run_after_finalize_and_take_the_latent_input():
    log = []
    latent = np.ones((3, 4), np.float32)

    def shared(x):
        log.append("shared")
        assert x is latent
        return x.sum(axis=1)

    kernel = FusedMoEKernel(RecordingPrepareAndFinalize(log), RecordingExperts(log), shared)
    beside, _ = kernel.apply(**problem(3), shared_experts_input=latent)
    assert log[-2:] == ["finalize(3)", "shared"]
    np.testing.assert_array_equal(beside, [4, 4, 4])


@pytest.mark.parametrize("mode", ["hook", "receiver"])
def test_shared_experts_that_raise_still_let_the_asynchronous_finalize_end(mode):
    log = []

    def shared(x):
        raise RuntimeError("shared failed")

    kernel = FusedMoEKernel(RecordingPrepareAndFinalize(log, mode), RecordingExperts(log), shared)
    with pytest.raises(RuntimeError, match="shared failed"):
        kernel.apply(**problem(3))
    assert log[-1] == "finalize(3)"


@pytest.mark.parametrize(
    "M, chunk, parts", [(5, 2, [2, 2, 1]), (4, 2, [2, 2]), (2, 3, [2]), (3, 3, [3]), (7, 1, [1] * 7)]
)
def test_chunks(M, chunk, parts):
    log = []
    experts = RecordingExperts(log)
    kernel = FusedMoEKernel(RecordingPrepareAndFinalize(log, counts=[0] * E), experts, chunk_size=chunk)
    given = problem(M)
    y = kernel.apply(**given)
    assert [entry for entry in log if entry.startswith("experts")] == [f"experts({m})" for m in parts]
    np.testing.assert_array_equal(y, 2 * given["hidden_states"])
    if len(parts) > 1:
        starts = np.cumsum([0, *parts])
        for meta, start, stop in zip(experts.meta_seen, starts, starts[1:], strict=False):
            counts = np.bincount(given["topk_ids"][start:stop].ravel(), minlength=E)
            np.testing.assert_array_equal(meta.expert_num_tokens, counts)
        # Every chunk reuses workspace13; no chunk's output lies in it.
        first = experts.buffers[0][0]
        for workspace13, output in experts.buffers:
            assert np.shares_memory(workspace13, first)
            assert not np.shares_memory(workspace13, output)
    else:
        assert np.shares_memory(*experts.buffers[0])


def test_experts_without_chunking_get_all_tokens():
    log = []
    experts = RecordingExperts(log)
    experts.chunking = False
    FusedMoEKernel(RecordingPrepareAndFinalize(log), experts, chunk_size=2).apply(**problem(5))
    assert "experts(5)" in log


def test_no_rows_skip_the_experts_but_not_finalize():
    log = []
    kernel = FusedMoEKernel(RecordingPrepareAndFinalize(log), RecordingExperts(log))
    y = kernel.apply(**problem(0))
    assert y.shape == (0, K)
    assert without_questions(log)[1:] == ["prepare(defer=False)", "finalize(0)"]


def test_deferred_quantization_is_announced_to_prepare():
    log = []
    FusedMoEKernel(RecordingPrepareAndFinalize(log), RecordingExperts(log, unquantized=True)).apply(**problem(2))
    assert "prepare(defer=True)" in log


def test_ids_that_prepare_returns_are_in_force():
    log = []
    ids = np.zeros((2, TOPK), np.int32)
    pair = RecordingPrepareAndFinalize(log, replace_ids=ids)
    FusedMoEKernel(pair, RecordingExperts(log)).apply(**problem(2))
    assert pair.ids_at_finalize is ids


def test_errors_name_the_stage_and_the_pair():
    class Failing(RecordingExperts):
        def apply(self, *args):
            raise RuntimeError("boom")

    kernel = FusedMoEKernel(RecordingPrepareAndFinalize([]), Failing([]))
    with pytest.raises(RuntimeError, match="boom") as caught:
        kernel.apply(**problem(2))
    assert caught.value.__notes__ == [
        "in stage experts of FusedMoEKernel(RecordingPrepareAndFinalize with Failing)",
    ]


def test_allocate_buffers_shares_workspace13_with_a_single_chunks_output():
    kernel = FusedMoEKernel(RecordingPrepareAndFinalize([]), RecordingExperts([]))
    arguments = (N, K, TOPK, E, E, None, moe_config().activation)
    workspace13, workspace2, out = kernel.impl._allocate_buffers(np.float32, "cpu", 4, 4, *arguments)
    assert workspace13.size == 4 * TOPK * N and workspace2.size == 0 and out.shape == (4, K)
    assert np.shares_memory(workspace13, out)
    workspace13, _, out = kernel.impl._allocate_buffers(np.float32, "cpu", 4, 9, *arguments)
    assert workspace13.size == 4 * TOPK * N and out.shape == (9, K)
    assert not np.shares_memory(workspace13, out)


@pytest.mark.parametrize("M, chunk, info", [(0, 4, (0, 1)), (3, 4, (1, 3)), (4, 4, (1, 4)), (9, 4, (3, 4))])
def test_chunk_info(M, chunk, info):
    kernel = FusedMoEKernel(RecordingPrepareAndFinalize([]), RecordingExperts([]), chunk_size=chunk)
    assert kernel.impl._chunk_info(M) == info


@pytest.mark.parametrize("M, chunk", [(0, 4), (3, 4), (9, 4)])
def test_workspace_bytes_is_what_is_allocated(M, chunk):
    kernel = FusedMoEKernel(RecordingPrepareAndFinalize([]), RecordingExperts([]), chunk_size=chunk)
    expected = 0
    if M:
        arguments = (min(M, chunk), M, N, K, TOPK, E, E, None, moe_config().activation)
        workspace13, workspace2, out = kernel.impl._allocate_buffers(np.float32, "cpu", *arguments)
        shared = np.shares_memory(workspace13, out)
        both = max(workspace13.nbytes, out.nbytes) if shared else workspace13.nbytes + out.nbytes
        expected = workspace2.nbytes + both
    assert kernel.workspace_bytes(M) == expected


def test_out_is_written_and_returned():
    kernel = FusedMoEKernel(RecordingPrepareAndFinalize([]), RecordingExperts([]))
    given = problem(3)
    out = np.full((3, K), np.nan, np.float32)
    assert kernel.apply(**given, out=out) is out
    np.testing.assert_array_equal(out, 2 * given["hidden_states"])


def test_expert_map_is_refused_where_the_experts_take_none():
    kernel = FusedMoEKernel(RecordingPrepareAndFinalize([]), RecordingExperts([]))
    with pytest.raises(UnsupportedError, match="expert_map must be None for RecordingExperts"):
        kernel.apply(**problem(3), expert_map=np.arange(E))


@pytest.mark.parametrize("chunk_size", [0, -1])
def test_bad_chunk_size(chunk_size):
    with pytest.raises(ArgumentError, match="chunk_size must be at least 1"):
        FusedMoEKernel(RecordingPrepareAndFinalize([]), RecordingExperts([]), chunk_size=chunk_size)
