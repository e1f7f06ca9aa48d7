"""Repeated calls on the CPU: a tape's kernels are those of the ordinary path, for whatever comes next."""

from __future__ import annotations

import threading

import ml_dtypes
import numpy as np
import pytest

import pymoe

pytest.importorskip("numba")

BF16 = np.dtype(ml_dtypes.bfloat16)
E, TOPK, K, I = 6, 3, 256, 128
SCHEMES = [None, "fp8_w8a8", "fp8_w8a8_block", "int8_w8a8", "fp8_w8a16", "int8_w8a16", "int4_w4a16", "mxfp4_w4a16"]


def normal(rng, *shape):
    return rng.standard_normal(shape, dtype=np.float32)


def made(scheme=None, dtype=BF16, tapes=True, **options):
    rng = np.random.default_rng(3)
    w1, w2, config = normal(rng, E, 2 * I, K) / 8, normal(rng, E, K, I) / 8, None
    if scheme is None:
        w1, w2 = w1.astype(dtype), w2.astype(dtype)
    else:
        w1, w2, config = pymoe.quantize_experts(w1, w2, scheme)
    options = {"gate": normal(rng, E, K).astype(dtype)} | options
    layer = pymoe.MoELayer(w1, w2, topk=TOPK, quant_config=config, **options)
    layer.dtype = dtype
    if not tapes:
        layer._tapes = None
    return layer


def tokens(M, seed, dtype=BF16):
    return normal(np.random.default_rng(seed), M, K).astype(dtype)


def proved(layer):
    return [entry.is_proved for entry in layer._tapes._entries.values() if entry is not None and entry.tape is not None]


def refused(layer):
    return [key for key, entry in layer._tapes._entries.items() if entry is not None and entry.tape is None]


@pytest.fixture(autouse=True, params=["amx", "plain"])
def level(request, monkeypatch):
    monkeypatch.setenv("PYMOE_CPU_KERNELS", request.param)
    return request.param


@pytest.mark.parametrize("M", [1, 2, 17])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float32)], ids=str)
def test_a_tape_has_the_ordinary_paths_bits(dtype, scheme, M):
    ours, plain = made(scheme, dtype), made(scheme, dtype, tapes=False)
    for seed in range(6):
        x = tokens(M, seed, dtype)
        out = None if seed % 2 else np.full_like(x, 9)
        y = ours(x, out=out)
        assert out is None or y is out
        assert y.tobytes() == plain(x).tobytes()
        assert (ours.last_load == plain.last_load).all()
    assert proved(ours) == [True] * 2 and not refused(ours)


@pytest.mark.parametrize(
    "options",
    [
        {"routing": pymoe.RoutingConfig(TOPK, renormalize=False)},
        {"routing": pymoe.RoutingConfig(TOPK, scoring_func="sigmoid", num_expert_group=3, topk_group=2)},
        {"activation": "gelu"},
        {"activation": "swigluoai"},
        {"activation": "silu_no_mul"},
    ],
    ids=str,
)
def test_routers_and_activations(options):
    if options.get("activation") == "silu_no_mul":
        rng = np.random.default_rng(3)
        weights = normal(rng, E, I, K).astype(BF16), normal(rng, E, K, I).astype(BF16)
        layers = [pymoe.MoELayer(*weights, topk=TOPK, activation="silu_no_mul") for _ in range(2)]
        layers[1]._tapes = None
    else:
        layers = [made(gate=None, tapes=tapes, **options) for tapes in (True, False)]
    for seed in range(5):
        x, logits = tokens(5, seed), normal(np.random.default_rng(seed), 5, E)
        logits[0, :4] = -np.inf
        logits[1] = np.nan
        logits[2] = 1.0
        assert layers[0](x, logits).tobytes() == layers[1](x, logits).tobytes()
    assert proved(layers[0]) == [True]


def test_all_to_one_expert_after_a_tape_for_others():
    ours, plain = made(gate=None), made(gate=None, tapes=False)
    for seed in range(4):
        ours(tokens(40, seed), normal(np.random.default_rng(seed), 40, E))
    for expert in range(E):
        logits = np.zeros((40, E), np.float32)
        logits[:, expert] = 50
        x = tokens(40, expert)
        assert ours(x, logits).tobytes() == plain(x, logits).tobytes()
        assert (ours.last_load == plain.last_load).all() and ours.last_load[expert] == 40


def test_weights_are_read_when_the_tape_plays():
    ours = made()
    for seed in range(4):
        ours(tokens(3, seed))
    ours._w2[...] = 0
    assert not ours(tokens(3, 9)).astype(np.float32).any()


def test_what_a_tape_does_not_know_takes_the_ordinary_path():
    ours, plain = made(), made(tapes=False)
    for seed in range(4):
        ours(tokens(3, seed))
    x = tokens(6, 5)
    strided, wide = x[::2], x.astype(np.float64)
    assert ours(strided).tobytes() == plain(np.ascontiguousarray(strided)).tobytes()
    weights, ids = np.ones((3, TOPK), np.float32), np.array([[0, -1, 99], [5, 5, 1], [-1, -1, -1]])
    x = tokens(3, 6)
    for _ in range(4):
        assert (
            ours(x, topk_weights=weights, topk_ids=ids).tobytes()
            == plain(x, topk_weights=weights, topk_ids=ids).tobytes()
        )
    with pytest.raises(pymoe.DTypeError, match="hidden_states"):
        ours(wide)
    with pytest.raises(pymoe.ArgumentError, match="out"):
        ours(x, out=x)
    with pytest.raises(pymoe.ShapeError, match="out"):
        ours(x, out=np.empty((4, K), BF16))
    for _ in range(4):
        ours(x, out=np.empty_like(x))
    locked = np.zeros_like(x)
    locked.flags.writeable = False
    with pytest.raises(pymoe.ArgumentError, match="out"):
        ours(x, out=locked)
    assert not locked.astype(np.float32).any()
    with pytest.raises(pymoe.ShapeError, match="hidden_states"):
        ours(np.array(1, BF16))
    raw = np.empty(x.nbytes + 1, np.uint8)
    shifted = raw[1:].view(BF16).reshape(x.shape)
    shifted[...] = x
    assert ours(shifted).tobytes() == plain(x).tobytes()
    ours.close()
    with pytest.raises(pymoe.ClosedError):
        ours(x)


def test_a_tape_whose_bits_differ_is_dropped():
    ours, plain = made(), made(tapes=False)
    ours(tokens(4, 0))
    ours(tokens(4, 1))
    (entry,) = ours._tapes._entries.values()
    entry.ids[...] = 0  # nobody's: only the tape's words decide
    native, _ = entry.tape._held[-1]
    place = next(at for words, at, role, _ in entry.tape._patches if words is native.words and role == 1)
    native.words[place + 1] = 0
    entry.tape._patches[:] = [patch for patch in entry.tape._patches if patch[2] != 1]
    x = tokens(4, 2)
    assert ours(x).tobytes() == plain(x).tobytes()
    assert refused(ours) and not proved(ours)
    assert ours(x).tobytes() == plain(x).tobytes()


def test_threads_that_share_a_layer():
    ours, plain = made(), made(tapes=False)
    expected = {seed: plain(tokens(2, seed)).tobytes() for seed in range(8)}
    wrong = []

    def caller(first):
        for turn in range(60):
            seed = (first + turn) % 8
            if ours(tokens(2, seed)).tobytes() != expected[seed]:
                wrong.append(seed)

    callers = [threading.Thread(target=caller, args=(i,)) for i in range(4)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join(120)
    assert wrong == []


def test_tapes_keep_to_their_memory():
    ours = made()
    for M in range(1, 40):
        for seed in range(3):
            ours(tokens(M, seed))
    assert sum(entry.nbytes for entry in ours._tapes._entries.values() if entry) <= 1 << 24
    assert len(ours._tapes._entries) <= 64
