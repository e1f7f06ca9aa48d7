"""Users' activations in layers on the GPU: every pair and experts, tapes, graphs, several at once, and their price."""

from __future__ import annotations

import math

import numpy as np
import pytest

import pymoe
from tests import gpu
from tests.cuda import test_experts
from tests.cuda.test_layer import BF16, GATE, TOPK, W1, W2, bits, layer, tokens
from tests.cuda.test_tapes import tape_count
from tests.cuda.transfer import to_device, to_host
from tests.experts.test_pairs import SCHEMES, problem
from tests.ops.test_grouped_gemm_cuda import own_gate

pytestmark = pytest.mark.gpu


def own_silu(gate, up):
    return gate / (1.0 + math.exp(-gate)) * up


def bent(gate, up):
    return math.tanh(gate) * max(up, -0.5) if gate < 1 else math.log(gate + 1.0) * up


pymoe.register_activation("test_gpu_silu", own_silu)
GATE_OF_ALL = pymoe.register_activation("test_gpu_gate", own_gate)
pymoe.register_activation("test_gpu_bent", bent)


def arguments(p):
    return to_device(
        {
            "hidden_states": p.x, "w1": p.w1, "w2": p.w2, "topk_weights": p.scale, "topk_ids": p.ids,
            "quant_config": p.quant_config, "activation": p.activation,
        }
    )  # fmt: skip


def agree_with_the_cpu(scheme, own):
    p = problem(scheme, activation=own, dtype=BF16, biases=True)
    y = to_host(pymoe.fused_experts(**arguments(p))).astype(np.float32)
    expected = pymoe.fused_experts(
        p.x, p.w1, p.w2, p.scale, p.ids, quant_config=p.quant_config, activation=p.activation
    ).astype(np.float32)
    exact = scheme == "fp32" or scheme.endswith(("a16", "a16_zp"))
    np.testing.assert_allclose(y, expected, rtol=0, atol=(2e-2 if exact else 4e-2) * np.abs(expected).max())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_pair_agrees_with_the_cpu(cuda, scheme):
    gpu.compile_gemms(GATE_OF_ALL)
    agree_with_the_cpu(scheme, GATE_OF_ALL)


@pytest.mark.parametrize("scheme", ["fp32", "fp8_w8a8", "fp8_w8a8_block", "int4_w4a16", "mxfp4"])
def test_batched_and_monolithic_equal_grouped_bit_for_bit(cuda, scheme):
    gpu.compile_gemms(GATE_OF_ALL)
    test_experts.test_batched_and_monolithic_equal_standard_bit_for_bit(scheme, GATE_OF_ALL)


def give_the_bits_of_the_first_call(scheme, name):
    """Call, from a tape too, and replay a layer with an activation."""
    ours = layer(scheme, gate=to_device(GATE), activation=name)
    x = to_device(tokens(33))
    first = bits(ours(x))
    for _ in range(4):
        assert (bits(ours(x)) == first).all()
    assert tape_count(ours) == 1
    graph = ours.capture(33)
    graph.inputs["hidden_states"][...] = x
    for _ in range(2):
        graph.output.fill(np.nan)
        assert (bits(graph.replay()) == first).all()


def take_turns(names):
    """Call layers of several activations by turns, beside the CPU's."""
    layers = {name: layer(gate=to_device(GATE), activation=name) for name in names}
    on_cpu = {name: pymoe.MoELayer(W1, W2, topk=TOPK, gate=GATE, activation=name) for name in names}
    for turn in range(5):
        x = tokens(24, turn)
        weights, ids = pymoe.select_experts(layers["silu"].gate(to_device(x)), TOPK)
        for name in names:
            y = to_host(layers[name](to_device(x), None, weights, ids)).astype(np.float32)
            expected = on_cpu[name](x, None, to_host(weights), to_host(ids)).astype(np.float32)
            assert np.abs(y - expected).max() <= 2e-2 * np.abs(expected).max(), (turn, name)


@pytest.mark.parametrize("scheme", [None, "fp8_w8a8_block", "mxfp4_w4a16"])
def test_tapes_and_graphs_give_the_bits_of_the_first_call(cuda, scheme):
    give_the_bits_of_the_first_call(scheme, "test_gpu_gate")


def test_layers_of_different_functions_take_turns(cuda):
    """None runs the other's kernel, whose shapes and formats are the same."""
    take_turns(["test_gpu_gate", "test_gpu_bent", "silu"])


def replay_us(cuda, graphs, replays=60):
    """Return the least microseconds of a replay of each graph, all of them by turns so that clocks treat them alike."""
    start, stop = cuda.cuda.Event(), cuda.cuda.Event()
    least = [math.inf] * len(graphs)
    for _ in range(replays):
        for i, graph in enumerate(graphs):
            start.record()
            graph.replay()
            stop.record()
            stop.synchronize()
            least[i] = min(least[i], 1e3 * cuda.cuda.get_elapsed_time(start, stop))
    return least


def captured_layers(cuda, M, names):
    """Return graphs of a layer of Qwen3-30B-A3B in bfloat16 with each activation, on the same tokens."""
    rng = cuda.random.default_rng(0)

    def normal(*shape, deviation=1.0):
        out = cuda.empty(shape, BF16)
        for part in out:
            part[...] = rng.standard_normal(part.shape, dtype=np.float32) * np.float32(deviation)
        return out

    w1, w2 = normal(128, 1536, 2048, deviation=2048**-0.5), normal(128, 2048, 768, deviation=768**-0.5)
    gate, x = normal(128, 2048), normal(M, 2048)
    graphs = []
    for name in names:
        graph = pymoe.MoELayer(w1, w2, topk=8, gate=gate, activation=name).capture(M)
        graph.inputs["hidden_states"][...] = x
        graph.replay()
        graphs.append(graph)
    return graphs


@pytest.mark.parametrize("M", [16, 1024, 4096])
def test_a_registered_silu_costs_at_most_two_percent_more(cuda, M):
    """As a graph, beside the same with the built-in one."""
    graphs = captured_layers(cuda, M, ("silu", "test_gpu_silu"))
    built_in, own = replay_us(cuda, graphs)
    print(f"M {M}: built-in {built_in:.1f} us, registered {own:.1f} us, {100 * own / built_in - 100:+.2f} %")
    a, b = (to_host(graph.output).astype(np.float32) for graph in graphs)
    assert np.linalg.norm(a - b) <= 1e-3 * np.linalg.norm(a)
    assert own <= 1.02 * built_in
