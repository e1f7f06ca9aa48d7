"""`deterministic=False` on the GPU: rows are added to their tokens as they come.

On the exact oracle a sum is the same in every order, so that every bit is known all the same.
"""

from __future__ import annotations

import numpy as np
import pytest

import pymoe
from tests import gpu
from tests.cuda.test_layer import BF16, GATE, TOPK, E, K, bits, layer, tokens
from tests.cuda.test_tapes import SCHEMES, graph_nodes, tape_count
from tests.cuda.transfer import to_device, to_host
from tests.selection import selection
from tests.test_selection import sizes

pytestmark = pytest.mark.gpu


def loose(given, **options):
    """Return a layer of a selection problem, and the arguments of its call."""
    made = pymoe.MoELayer(
        to_device(given.w1), to_device(given.w2), topk=given.topk_ids.shape[1], activation=given.activation,
        deterministic=False, **options,
    )  # fmt: skip
    return made, (to_device(given.x), None, to_device(given.topk_weights), to_device(given.topk_ids))


@pytest.mark.parametrize("block", range(4))
def test_random_sizes(cuda, block):
    for size in sizes(20, 900 + block):
        given = selection(**size | {"mapped": False})
        ours, call = loose(given)
        np.testing.assert_array_equal(to_host(ours(*call)), given.expected(), err_msg=str(size))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16])
@pytest.mark.parametrize("M, E, topk", [(1, 8, 2), (40, 8, 2), (400, 8, 2), (3000, 8, 2), (700, 64, 6), (4000, 2, 2)])
@pytest.mark.parametrize("K, width", [(256, 192), (130, 66)])
def test_every_tile_class_from_tape_and_graph(cuda, M, E, topk, K, width, dtype):
    given = selection(M, K, width, E, topk, dtype=dtype)
    ours, call = loose(given)
    for turn in range(5):
        gpu.dirty_pool(gpu.FILLS[turn % 3], 1 << 24)
        np.testing.assert_array_equal(to_host(ours(*call)), given.expected(), err_msg=f"turn {turn}")
    other = selection(M, K, width, E, topk, dtype=dtype, seed=1)
    other.w1, other.w2, other.up_column, other.up_sign = given.w1, given.w2, given.up_column, given.up_sign
    other.down_column, other.down_sign = given.down_column, given.down_sign
    y = ours(to_device(other.x), None, to_device(other.topk_weights), to_device(other.topk_ids))
    np.testing.assert_array_equal(to_host(y), other.expected())
    graph = ours.capture(M, inputs="topk")
    for problem in (given, other, given):
        for name in ("topk_weights", "topk_ids"):
            graph.inputs[name][...] = to_device(getattr(problem, name).astype(graph.inputs[name].dtype))
        graph.inputs["hidden_states"][...] = to_device(problem.x)
        graph.output.fill(np.nan)
        np.testing.assert_array_equal(to_host(graph.replay()), problem.expected())


def test_chunks(cuda):
    given = selection(300, 64, 64, 5, 2, dtype=BF16)
    ours, call = loose(given, chunk_size=64)
    np.testing.assert_array_equal(to_host(ours(*call)), given.expected())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_two_rows_have_one_sum_and_all_of_it_is_on_the_tape(cuda, scheme):
    ours = layer(scheme, gate=to_device(GATE), deterministic=False)
    ordered = layer(scheme, gate=to_device(GATE), routed_dtype=np.float32)
    for M in (1, 33, 700):
        x = to_device(tokens(M))
        for _ in range(4):
            assert (bits(ours(x)) == bits(ordered(x))).all()
    assert tape_count(ours) == 3
    untaped = layer(scheme, gate=to_device(GATE), deterministic=False)
    untaped._tapes = None
    tapes = [entry.tape for entry in ours._tapes._entries.values() if entry is not None]
    assert graph_nodes(cuda, untaped, to_device(tokens(33))) in {len(tape) for tape in tapes}


def test_shared_experts_get_float32_sums(cuda):
    rng = np.random.default_rng(0)
    shared = pymoe.SharedExperts(
        *(to_device((rng.standard_normal(shape) / 8).astype(BF16)) for shape in ((2 * 64, K), (K, 64)))
    )
    x = to_device(tokens(50))
    answers = [
        bits(layer(gate=to_device(GATE), shared_experts=shared, **options)(x))
        for options in ({"deterministic": False}, {"routed_dtype": np.float32})
    ]
    assert (answers[0] == answers[1]).all()


@pytest.mark.parametrize("M", [20, 1000])
def test_eight_rows_have_sums_of_the_same_size(cuda, M):
    """Last bits of float32 move an answer by an ulp of bfloat16 now and then."""
    rng = np.random.default_rng(0)
    w1, w2, x = (
        to_device((rng.standard_normal(shape) / size**0.5).astype(BF16))
        for shape, size in (((16, 512, 512), 512), ((16, 512, 256), 256), ((M, 512), 1))
    )
    logits = to_device(rng.standard_normal((M, 16)).astype(np.float32))
    answers = [
        to_host(pymoe.MoELayer(w1, w2, topk=8, **options)(x, logits)).astype(np.float64)
        for options in ({"deterministic": False}, {"routed_dtype": np.float32})
    ]
    assert np.linalg.norm(answers[0] - answers[1]) <= 3e-4 * np.linalg.norm(answers[1])


@pytest.mark.parametrize("M", [9, 2000])
def test_a_nan_stays_in_its_row(cuda, M):
    ours, x = layer(deterministic=False), tokens(M)
    weights = to_device(np.full((M, TOPK), 0.5, np.float32))
    ids = np.random.default_rng(0).integers(0, E, (M, TOPK)).astype(np.int32)
    ids[5] = -1
    x[4, 7] = np.nan
    y = bits(ours(to_device(x), None, weights, to_device(ids))).view(BF16).astype(np.float32)
    assert np.isnan(y[4]).all() and np.isfinite(np.delete(y, 4, 0)).all() and (y[5] == 0).all()


def test_workspaces_hold_the_intermediate_and_the_sums(cuda):
    """Quantized tokens are never copied together, so that the sums are all there is beside the intermediate."""
    M = 3000
    ours = layer("int4_w4a16", gate=to_device(GATE), deterministic=False)
    ours(to_device(tokens(M)))
    kernel = ours._kernel(BF16)[0]
    with kernel.impl.workspaces.current() as workspace:
        assert workspace.nbytes <= kernel.workspace_bytes(M)
