"""Repeated calls: a tape's launches are those of the ordinary path, for whatever arrays and routings come next."""

from __future__ import annotations

import numpy as np
import pytest

import pymoe
from tests import gpu
from tests.cuda.test_layer import BF16, GATE, TOPK, E, K, bits, layer, tokens
from tests.cuda.transfer import to_device

pytestmark = pytest.mark.gpu


def without_tapes(scheme=None, **options):
    made = layer(scheme, **options)
    made._tapes = None
    return made


def tape_count(made):
    return sum(entry is not None and entry.tape is not None for entry in made._tapes._entries.values())


SCHEMES = [None, "fp8_w8a8", "fp8_w8a8_tensor", "fp8_w8a8_block", "int8_w8a8", "int4_w4a16", "mxfp4", "nvfp4", "mxfp8"]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", ["gate", "logits", "topk"])
def test_every_kind_of_call_plays_the_ordinary_paths_bits(cuda, scheme, kind):
    ours, plain = layer(scheme, gate=to_device(GATE)), without_tapes(scheme, gate=to_device(GATE))
    rng = np.random.default_rng(0)
    for M in (1, 33):
        for turn in range(5):
            x = to_device(tokens(M, turn))
            given = {
                "gate": (),
                "logits": (to_device(rng.standard_normal((M, E)).astype(np.float32)),),
                "topk": (
                    None,
                    to_device(rng.random((M, TOPK)).astype(np.float32)),
                    to_device(rng.integers(-1, E + 1, (M, TOPK)).astype(np.int64)),
                ),
            }[kind]
            gpu.dirty_pool(gpu.FILLS[turn % 3], 1 << 24)
            y = ours(x, *given)
            assert (bits(y) == bits(plain(x, *given))).all(), (M, turn)
            assert (ours.last_load == plain.last_load).all()
    assert tape_count(ours) == 2


def graph_nodes(cuda, ours, x):
    """Return how many nodes the graph of one untaped call has."""
    from cuda.bindings import driver

    out, stream = cuda.empty(x.shape, BF16), cuda.cuda.Stream(non_blocking=True)
    with stream:
        ours(x, out=out)
        stream.begin_capture()
        ours(x, out=out)
        graph = stream.end_capture()
    status, _, count = driver.cuGraphGetNodes(driver.CUgraph(graph.graph), 0)
    assert int(status) == 0
    return count


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_tape_holds_every_node_of_the_calls_graph(cuda, scheme):
    """What CuPy itself would launch, an elementwise kernel or a copy, is a node that no recorder sees."""
    ours = layer(scheme, gate=to_device(GATE))
    x = to_device(tokens(24))
    for _ in range(3):
        ours(x)
    (tape,) = [entry.tape for entry in ours._tapes._entries.values() if entry is not None]
    assert graph_nodes(cuda, without_tapes(scheme, gate=to_device(GATE)), x) == len(tape)


def test_out_is_written_returned_and_checked_for_overlap(cuda):
    ours = layer(gate=to_device(GATE))
    x = to_device(tokens(9))
    expected = bits(ours(x))
    for _ in range(4):
        out = gpu.filled((9, K), BF16)
        assert ours(x, out=out) is out
        assert (bits(out) == expected).all()
    with pytest.raises(pymoe.ArgumentError, match="out must not overlap hidden_states"):
        ours(x, out=x)


def test_bad_arguments_are_still_refused_after_many_good_ones(cuda):
    ours = layer(gate=to_device(GATE))
    x = to_device(tokens(9))
    for _ in range(4):
        ours(x)
    with pytest.raises(pymoe.ShapeError):
        ours(x[:, :-8])
    with pytest.raises(pymoe.DTypeError):
        ours(x.astype(np.float64))
    assert (bits(ours(cuda.asfortranarray(x))) == bits(ours(x))).all()
    ours.close()
    with pytest.raises(pymoe.ClosedError):
        ours(x)


def test_a_larger_call_in_between_moves_the_workspace(cuda):
    ours, plain = layer(gate=to_device(GATE)), without_tapes(gate=to_device(GATE))
    small, large = to_device(tokens(4)), to_device(tokens(900))
    for _ in range(4):
        assert (bits(ours(small)) == bits(plain(small))).all()
    for _ in range(4):
        assert (bits(ours(large)) == bits(plain(large))).all()
        gpu.dirty_pool(0xFF, 1 << 24)
        assert (bits(ours(small)) == bits(plain(small))).all()


def test_streams_have_tapes_of_their_own(cuda):
    ours, plain = layer(gate=to_device(GATE)), without_tapes(gate=to_device(GATE))
    x = to_device(tokens(40))
    expected = bits(plain(x))
    streams = [cuda.cuda.Stream(non_blocking=True) for _ in range(3)]
    cuda.cuda.runtime.deviceSynchronize()
    results = []
    for _ in range(5):
        for stream in streams:
            with stream:
                results.append(ours(x))
    cuda.cuda.runtime.deviceSynchronize()
    assert all((bits(y) == expected).all() for y in results) and tape_count(ours) == 3


def test_answers_are_apart_and_stay(cuda):
    ours = layer(gate=to_device(GATE))
    inputs = [to_device(tokens(12, seed)) for seed in range(6)]
    expected = [bits(ours(x)) for x in inputs]
    kept = [ours(x) for x in inputs]
    assert all((bits(y) == want).all() for y, want in zip(kept, expected, strict=True))


def test_the_checked_mode_takes_the_ordinary_path(cuda):
    ours = layer()
    x, weights = to_device(tokens(4)), to_device(np.ones((4, TOPK), np.float32))
    ids = to_device(np.zeros((4, TOPK), np.int32))
    for _ in range(4):
        ours(x, None, weights, ids)
    ids[2, 1] = E
    ours(x, None, weights, ids)
    pymoe.checked(True)
    with pytest.raises(pymoe.ArgumentError, match="at row 2, slot 1"):
        ours(x, None, weights, ids)


def test_a_tape_in_a_users_capture(cuda):
    ours = layer(gate=to_device(GATE))
    x, out = to_device(tokens(24)), cuda.empty((24, K), BF16)
    expected = bits(ours(x))
    stream = cuda.cuda.Stream(non_blocking=True)
    with stream:
        for _ in range(4):
            ours(x, out=out)
        stream.begin_capture()
        ours(x, out=out)
        graph = stream.end_capture()
        out.fill(0)
        graph.launch(stream)
        stream.synchronize()
    assert (bits(out) == expected).all()
