"""MoELayer: routing sources, shared experts, plan, load, life cycle, errors before work."""

from __future__ import annotations

import threading

import ml_dtypes
import numpy as np
import pytest

import pymoe
from pymoe import ArgumentError, ClosedError, DTypeError, MoELayer, RoutingConfig, ShapeError, UnsupportedError

E, N, K, TOPK, M = 6, 24, 16, 2, 9
BF16 = ml_dtypes.bfloat16


def weights(seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    w1 = (rng.standard_normal((E, N, K)) / 4).astype(dtype)
    w2 = (rng.standard_normal((E, K, N // 2)) / 4).astype(dtype)
    return w1, w2, rng.standard_normal((E, K)).astype(dtype)


def tokens(rows=M, seed=1, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal((rows, K)).astype(dtype)


def layer(**options):
    w1, w2, gate = weights()
    return MoELayer(w1, w2, **({"topk": TOPK, "gate": gate} | options))


def test_gate_logits_and_topk_agree_bit_for_bit():
    w1, w2, gate = weights()
    x = tokens()
    one = layer()
    logits = pymoe.Gate(gate)(x)
    ids_weights = pymoe.select_experts(logits, TOPK)
    y = one(x)
    np.testing.assert_array_equal(y, one(x, logits))
    np.testing.assert_array_equal(y, one(x, topk_weights=ids_weights[0], topk_ids=ids_weights[1]))
    np.testing.assert_array_equal(y, pymoe.fused_moe(x, w1, w2, logits, TOPK))
    np.testing.assert_array_equal(y, pymoe.fused_experts(x, w1, w2, *ids_weights))


def test_gate_with_bias():
    w1, w2, gate = weights()
    bias = np.zeros(E, np.float32)
    bias[[1, 4]] = 1e4
    one = MoELayer(w1, w2, topk=TOPK, gate=pymoe.Gate(gate, bias))
    one(tokens())
    assert one.last_load.tolist() == [0, M, 0, 0, M, 0]


def test_last_load_counts_rows():
    one = layer()
    assert one.last_load is None
    ids = np.array([[0, 5], [0, -1], [5, 99]])
    one(tokens(3), topk_weights=np.ones((3, 2)), topk_ids=ids)
    assert one.last_load.dtype == np.int64 and one.last_load.tolist() == [2, 0, 0, 0, 0, 2]
    with pytest.raises(ValueError, match="read-only"):
        one.last_load[0] = 1
    one(tokens(0))
    assert one.last_load.tolist() == [0] * E


def test_placement_maps_the_experts_that_are_not_here_to_zero():
    w1, w2, gate = weights()
    x = tokens()
    full = MoELayer(w1, w2, topk=TOPK)
    here = [4, 1]
    part = MoELayer(w1[here], w2[here], topk=TOPK, num_experts=E, placement=here)
    rng = np.random.default_rng(3)
    ids, scale = rng.integers(0, E, (M, TOPK)), rng.random((M, TOPK)).astype(np.float32)
    kept = np.where(np.isin(ids, here), ids, -1)
    np.testing.assert_array_equal(part(x, topk_weights=scale, topk_ids=ids), full(x, topk_weights=scale, topk_ids=kept))
    np.testing.assert_array_equal(part.last_load, full.last_load)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16])
def test_shared_experts_are_summed_in_float32_and_rounded_once(dtype):
    w1, w2, gate = weights(dtype=dtype)
    x = tokens(dtype=dtype)
    shared = pymoe.SharedExperts(w1[0], w2[0])
    routed = MoELayer(w1, w2, topk=TOPK, gate=gate)
    both = MoELayer(w1, w2, topk=TOPK, gate=gate, shared_experts=shared)
    kernel, _ = routed._kernel(np.dtype(dtype))
    scale, ids = pymoe.select_experts(routed.gate(x), TOPK)
    exact = kernel.apply_as(
        "test", x, w1, w2, topk_weights=scale, topk_ids=ids, activation="silu", global_num_experts=-1,
        expert_map=None, apply_router_weight_on_input=False, out_dtype=np.float32,
    )  # fmt: skip
    assert exact.dtype == np.float32
    np.testing.assert_array_equal(both(x), (exact + shared(x)).astype(dtype))


def test_shared_experts_equal_a_routed_expert_of_weight_one():
    w1, w2, _ = weights()
    x = tokens()
    ones, zeros = np.ones((M, 1), np.float32), np.zeros((M, 1), int)
    np.testing.assert_array_equal(
        pymoe.SharedExperts(w1[0], w2[0])(x), pymoe.fused_experts(x, w1[:1], w2[:1], ones, zeros)
    )


def test_shared_experts_gate():
    w1, w2, gate = weights()
    x = tokens()
    open_, gated = pymoe.SharedExperts(w1[0], w2[0]), pymoe.SharedExperts(w1[0], w2[0], gate=gate[0])
    sigmoid = 1 / (1 + np.exp(-(x.astype(np.float64) @ gate[0].astype(np.float64))))
    np.testing.assert_allclose(gated(x), open_(x) * sigmoid[:, None], rtol=1e-5, atol=1e-7)


def test_shared_experts_callable_gets_its_own_input():
    seen = []

    def shared(x):
        seen.append(x)
        return np.ones((M, K))

    latent = tokens(seed=9)
    base = layer()(tokens())
    y = layer(shared_experts=shared)(tokens(), shared_experts_input=latent)
    assert seen[0] is latent
    np.testing.assert_array_equal(y, base + np.float32(1))


def test_shared_experts_of_another_shape_are_refused():
    with pytest.raises(ShapeError, match="the shared experts' output must have shape"):
        layer(shared_experts=lambda x: x[:, :3])(tokens())


def test_out():
    one = layer()
    out = np.full((M, K), np.nan, np.float32)
    assert one(tokens(), out=out) is out
    np.testing.assert_array_equal(out, one(tokens()))
    summed = layer(shared_experts=lambda x: x)
    assert summed(tokens(), out=out) is out
    np.testing.assert_array_equal(out, summed(tokens()))


def test_plan_names_the_choice_and_every_refused_candidate():
    plan = layer(chunk_size=4).plan(M)
    assert plan[:2] == ("SingleProcessPrepareAndFinalize", "CpuExperts")
    assert plan.chunks == 3 and plan.packed_bytes == 0 and plan.workspace_bytes > 0
    reasons = dict(plan.refused)
    assert "CpuExperts is preferred" in reasons["NumpyReferenceExperts"]
    assert reasons["NaiveBatchedExperts"] == "kernel does not support activation format Standard"
    assert "router logits" in reasons["CpuMonolithicExperts"]
    assert layer().plan(0).chunks == 0


def test_warm_up_leaves_no_trace():
    one = layer()
    one.warm_up(4)
    assert one.last_load is None


def test_capture_needs_cuda():
    with pytest.raises(UnsupportedError, match="MoELayer.capture"):
        layer().capture(4)


def test_close_is_idempotent_and_final():
    one = layer()
    one.close()
    one.close()
    for use in (lambda: one(tokens()), lambda: one.plan(1), one.warm_up, lambda: one.capture(1)):
        with pytest.raises(ClosedError):
            use()
    with layer() as entered:
        entered(tokens())
    with pytest.raises(ClosedError):
        entered(tokens())


def test_one_layer_serves_every_hidden_dtype():
    one = layer()
    for dtype in (np.float32, np.float16, BF16):
        assert one(tokens(dtype=dtype)).dtype == dtype


def test_two_threads_get_the_bits_of_one():
    one = layer()
    inputs = [tokens(rows, seed=rows) for rows in range(1, 30)]
    expected = [layer()(x) for x in inputs]
    failures = []

    def work():
        for x, want in zip(inputs, expected, strict=True):
            if not np.array_equal(one(x), want):
                failures.append(len(x))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_routing_weight_on_input():
    w1, w2, gate = weights()
    routing = RoutingConfig(1, apply_router_weight_on_input=True, routing_method="Llama4")
    x = tokens()
    one = MoELayer(w1, w2, topk=1, gate=gate, routing=routing)
    scale, ids = pymoe.select_experts(pymoe.Gate(gate)(x), 1, routing_method="Llama4")
    expected = pymoe.fused_experts(x * scale, w1, w2, np.ones_like(scale), ids)
    np.testing.assert_array_equal(one(x), expected)


class Ranks:
    def __init__(self, size):
        self.size = size

    def Get_size(self):
        return self.size


@pytest.mark.parametrize("scheme", ["int8_w8a8_tensor", "fp8_w8a8_tensor"])
def test_batch_invariance_is_refused_where_rows_share_a_scale(scheme):
    w1, w2, config = pymoe.quantize_experts(
        *(np.ones(shape, np.float32) for shape in ((4, 32, 16), (4, 16, 16))), scheme
    )
    with pytest.raises(ArgumentError, match="batch_invariant must not be True with one dynamic scale"):
        MoELayer(w1, w2, topk=2, quant_config=config, batch_invariant=True)
    MoELayer(w1, w2, topk=2, quant_config=config, batch_invariant=False)


@pytest.mark.parametrize(
    "options, kind, text",
    [
        ({"topk": 0}, ArgumentError, "topk must be at least 1"),
        ({"topk": 7}, ArgumentError, "topk must be at most the 6 experts"),
        ({"topk": True}, DTypeError, "topk must be an integer"),
        ({"topk": 2.0}, DTypeError, "topk must be an integer"),
        ({"routing": RoutingConfig(3)}, ArgumentError, "routing.topk must equal topk = 2"),
        ({"routing": "Default"}, DTypeError, "routing must be a RoutingConfig"),
        ({"routing": RoutingConfig(2, e_score_correction_bias=np.zeros(5))}, ShapeError, "e_score_correction_bias"),
        ({"num_experts": 8}, ArgumentError, "num_experts must equal w1's 6 experts"),
        ({"placement": "diagonal"}, ArgumentError, "placement must be 'linear' or 'round_robin', or global ids"),
        ({"placement": [0, 1, 2, 3, 4, 4]}, ArgumentError, "placement must name 6 different"),
        ({"placement": [0, 1, 2, 3, 4, 6]}, ArgumentError, "placement must name 6 different"),
        ({"gate": np.zeros((E, K + 1), np.float32)}, ShapeError, "gate must have shape"),
        ({"gate": np.zeros((E, K), np.int32)}, DTypeError, "weight must have a floating dtype"),
        ({"gate": [[1.0]]}, DTypeError, "gate must be a NumPy, CuPy or DLPack array"),
        ({"shared_experts": 3}, DTypeError, "shared_experts must be callable"),
        ({"comm": Ranks(2)}, DTypeError, "comm must be an mpi4py intracommunicator"),
        ({"comm": "world"}, DTypeError, "comm must be a communicator"),
        ({"transport": "nccl"}, ArgumentError, "transport must be 'auto'"),
        ({"transport": 1}, DTypeError, "transport must be a string"),
        ({"max_num_tokens": 0}, ArgumentError, "max_num_tokens must be at least 1"),
        ({"chunk_size": 0}, ArgumentError, "chunk_size must be at least 1"),
        ({"deterministic": 0}, DTypeError, "deterministic must be True or False"),
        ({"batch_invariant": "yes"}, DTypeError, "batch_invariant must be True, False or None"),
        ({"deterministic": False, "batch_invariant": True}, ArgumentError, "batch_invariant must not be True with"),
        ({"routed_dtype": BF16}, DTypeError, "routed_dtype must be float32, or None"),
        ({"routed_dtype": "float31"}, DTypeError, "routed_dtype must be float32, or None"),
        ({"activation": "swish"}, ArgumentError, "activation must be one of"),
        ({"activation": "relu2"}, UnsupportedError, "relu2"),
        ({"quant_config": "fp8"}, DTypeError, "quant_config must be a FusedMoEQuantConfig"),
    ],
)
def test_constructor_errors(options, kind, text):
    with pytest.raises(kind) as caught:
        layer(**options)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"routed_dtype": np.float32},
        {"routed_dtype": "float32"},
        {"deterministic": False},
        {"deterministic": np.True_, "batch_invariant": True},
        {"deterministic": False, "batch_invariant": False},
    ],
)
def test_what_a_gpu_does_with_rows_changes_nothing_on_the_cpu(options):
    x = tokens(dtype=BF16)
    np.testing.assert_array_equal(layer(**options)(x).view(np.uint16), layer()(x).view(np.uint16))


def test_a_communicator_of_one_rank_is_fine():
    np.testing.assert_array_equal(layer(comm=Ranks(1))(tokens()), layer()(tokens()))


@pytest.mark.parametrize(
    "arguments, kind, text",
    [
        ({"topk_ids": np.zeros((M, TOPK), int)}, ArgumentError, "topk_weights must be given with topk_ids"),
        ({"topk_weights": np.zeros((M, TOPK))}, ArgumentError, "topk_ids must be given with topk_weights"),
        ({"router_logits": np.zeros((M, E + 1))}, ShapeError, "router_logits must have shape (9, 6)"),
        ({"router_logits": np.zeros((M, E), int)}, DTypeError, "router_logits must have a floating dtype"),
        (
            {
                "router_logits": np.zeros((M, E)),
                "topk_ids": np.zeros((M, TOPK), int),
                "topk_weights": np.ones((M, TOPK)),
            },
            ArgumentError,
            "router_logits must be None beside topk arrays",
        ),
        ({"topk_ids": np.zeros((M, 1), int), "topk_weights": np.ones((M, 1))}, ShapeError, "topk_ids must have shape"),
        ({"topk_ids": np.zeros((M, TOPK)), "topk_weights": np.ones((M, TOPK))}, DTypeError, "integer dtype"),
        ({"topk_ids": np.zeros((M, TOPK), bool), "topk_weights": np.ones((M, TOPK))}, DTypeError, "integer dtype"),
        ({"out": np.zeros((M, K), np.float64)}, DTypeError, "out must have the dtype of hidden_states"),
        ({"out": np.zeros((M, K + 1), np.float32)}, ShapeError, "out must have shape"),
    ],
)
def test_call_errors_come_before_work(arguments, kind, text, monkeypatch):
    one = layer()
    monkeypatch.setattr(one, "_run", lambda *args: pytest.fail("work was done"))
    with pytest.raises(kind) as caught:
        one(tokens(), **arguments)
    assert text in str(caught.value) and str(caught.value).startswith("MoELayer: ")


def test_out_must_not_overlap_an_input():
    x = tokens()
    with pytest.raises(ArgumentError, match="out must not overlap hidden_states"):
        layer()(x, out=x)
    w1, w2, gate = weights()
    one = MoELayer(w1, w2, topk=TOPK, gate=gate)
    with pytest.raises(ArgumentError, match="out must not overlap w1"):
        one(x, out=w1.reshape(-1)[: M * K].reshape(M, K))
    readonly = np.zeros((M, K), np.float32)
    readonly.flags.writeable = False
    with pytest.raises(ArgumentError, match="out must be writeable"):
        one(x, out=readonly)


def test_a_layer_without_a_gate_wants_a_router():
    with pytest.raises(ArgumentError, match="router_logits must be given to a layer without a gate"):
        layer(gate=None)(tokens())


def test_max_num_tokens():
    one = layer(max_num_tokens=4)
    one(tokens(4))
    with pytest.raises(ArgumentError, match="a call must bring at most max_num_tokens = 4 tokens; got 5"):
        one(tokens(5))


@pytest.mark.parametrize("x", [[[1.0] * K], np.zeros((M, K), np.float64), np.zeros((M, K), np.uint8)])
def test_hidden_states_of_another_kind_are_refused(x):
    with pytest.raises(DTypeError, match="hidden_states must"):
        layer()(x)


def test_show_config_prints_one_line_an_item(capsys):
    pymoe.show_config()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["pymoe", pymoe.__version__]
    assert any(line.startswith("numba") for line in lines) and any(line.startswith("cupy") for line in lines)
