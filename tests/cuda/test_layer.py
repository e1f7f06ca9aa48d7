"""`MoELayer` on the GPU: streams, graphs, threads, dirty memory, lifetime, and errors before anything is launched."""

from __future__ import annotations

import gc
import threading

import numpy as np
import pytest

import pymoe
from tests import gpu
from tests.cuda.transfer import to_device, to_host
from tests.selection import BF16, selection

pytestmark = pytest.mark.gpu

E, K, WIDTH, TOPK = 8, 128, 64, 2
RNG = np.random.default_rng(1)
W1 = (RNG.standard_normal((E, 2 * WIDTH, K)) / 11).astype(BF16)
W2 = (RNG.standard_normal((E, K, WIDTH)) / 8).astype(BF16)
GATE = RNG.standard_normal((E, K)).astype(BF16)


def tokens(M, seed=0):
    return np.random.default_rng([seed, M]).standard_normal((M, K)).astype(BF16)


def layer(scheme=None, **options):
    if scheme is None:
        return pymoe.MoELayer(to_device(W1), to_device(W2), topk=TOPK, **options)
    w1, w2, config = pymoe.quantize_experts(W1.astype(np.float32), W2.astype(np.float32), scheme)
    made = pymoe.MoELayer(to_device(w1), to_device(w2), topk=TOPK, quant_config=to_device(config), **options)
    made.dtype = BF16
    return made


def bits(y):
    return to_host(y).view(np.uint16)


@pytest.mark.parametrize("M", [1, 5, 64, 300])
def test_gate_logits_and_topk_agree_with_each_other_and_with_the_cpu(cuda, M):
    ours = layer(gate=to_device(GATE))
    x = tokens(M)
    y = ours(to_device(x))
    logits = ours.gate(to_device(x))
    weights, ids = pymoe.select_experts(logits, TOPK)
    assert (bits(ours(to_device(x), logits)) == bits(y)).all()
    assert (bits(ours(to_device(x), None, weights, ids)) == bits(y)).all()
    on_cpu = pymoe.MoELayer(W1, W2, topk=TOPK, gate=GATE)
    np.testing.assert_allclose(to_host(logits), on_cpu.gate(x), rtol=2e-5, atol=2e-5)
    expected = on_cpu(x, None, to_host(weights), to_host(ids)).astype(np.float32)
    assert np.abs(to_host(y).astype(np.float32) - expected).max() <= 2e-2 * np.abs(expected).max()
    assert ours.last_load.sum() == M * TOPK
    assert (ours.last_load == np.bincount(to_host(ids).ravel(), minlength=E)).all()


@pytest.mark.parametrize("scheme", [None, "fp8_w8a8_block", "int4_w4a16"])
@pytest.mark.parametrize("M", [1, 40, 3000])
def test_routed_rows_are_rounded_unless_float32_is_asked_for(cuda, scheme, M):
    """Float32 rows are at least as near to the unquantized answer; both workspaces hold what they say and no more."""
    x, weights = tokens(M), np.random.default_rng(M).random((M, TOPK)).astype(np.float32)
    ids = np.random.default_rng(M).integers(0, E, (M, TOPK)).astype(np.int32)
    given = (to_device(x), None, to_device(weights), to_device(ids))
    errors = {}
    for dtype, item in ((None, 2), (np.float32, 4)):
        ours = layer(scheme, routed_dtype=dtype)
        first = bits(ours(*given))
        for _ in range(4):  # the later ones from a tape
            assert (bits(ours(*given)) == first).all()
        whole = pymoe.MoELayer(W1.astype(np.float32), W2.astype(np.float32), topk=TOPK)
        expected = whole(x.astype(np.float32), None, weights, ids)
        errors[item] = np.linalg.norm(first.view(BF16).astype(np.float64) - expected)
        with ours._kernel(BF16)[0].impl.workspaces.current() as workspace:
            rows, h_bytes = M * TOPK, 2 if scheme != "fp8_w8a8_block" else 6
            assert workspace.nbytes <= rows * (WIDTH * h_bytes + K * item) + 24 * rows + (1 << 20)
    assert errors[4] <= (1 if scheme is None else 1.1) * errors[2]  # quantization hides much of a rounding
    assert errors[4] != errors[2]


@pytest.mark.parametrize("scheme", [None, "fp8_w8a8_block", "int4_w4a16", "mxfp4"])
def test_dirty_memory_changes_no_bit(cuda, scheme):
    ours = layer(scheme, gate=to_device(GATE))
    x = to_device(tokens(77))
    answers = []
    for fill in gpu.FILLS:
        ours.close()
        ours = layer(scheme, gate=to_device(GATE))
        gpu.dirty_pool(fill)
        out = gpu.filled(x.shape, x.dtype, fill)
        answers.append(bits(ours(x, out=out)))
    assert (answers[0] == answers[1]).all() and (answers[0] == answers[2]).all()


def test_a_hundred_repeats_and_two_loaded_streams(cuda):
    ours = layer(gate=to_device(GATE))
    inputs = [to_device(tokens(M, seed)) for seed, M in enumerate((64, 300))]
    expected = [bits(ours(x)) for x in inputs]
    streams = [cuda.cuda.Stream(non_blocking=True) for _ in inputs]
    cuda.cuda.runtime.deviceSynchronize()
    for _ in range(100):
        results = []
        for stream, x in zip(streams, inputs, strict=True):
            with stream:
                results.append(ours(x))
        for y, want, stream in zip(results, expected, streams, strict=True):
            stream.synchronize()
            assert (bits(y) == want).all()


def test_two_threads_on_one_stream_and_on_their_own(cuda):
    ours = layer(gate=to_device(GATE))
    inputs = [to_device(tokens(50, seed)) for seed in range(4)]
    expected = [bits(ours(x)) for x in inputs]
    wrong: list[str] = []

    def work(index, own_stream):
        stream = cuda.cuda.Stream(non_blocking=True) if own_stream else cuda.cuda.Stream.null
        with stream:
            for _ in range(50):
                y = ours(inputs[index])
                stream.synchronize()
                if not (bits(y) == expected[index]).all():
                    wrong.append(f"thread {index}")

    for own_stream in (False, True):
        threads = [threading.Thread(target=work, args=(i, own_stream)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


@pytest.mark.parametrize("scheme", [None, "fp8_w8a8", "fp8_w8a8_tensor", "int8_w8a8_tensor", "mxfp4_w4a16"])
def test_a_graph_replays_extreme_routings(cuda, scheme):
    ours = layer(scheme)
    for M in (1, 40):
        graph = ours.capture(M, inputs="topk")
        rng = np.random.default_rng(M)
        routings = {
            "random": rng.integers(0, E, (M, TOPK)),
            "all to one expert": np.full((M, TOPK), 3),
            "nobody": np.full((M, TOPK), -1),
            "out of range": np.full((M, TOPK), 2**31 - 1),
            "half": np.where(rng.random((M, TOPK)) < 0.5, -1, rng.integers(0, E, (M, TOPK))),
        }
        for name, ids in list(routings.items()) * 2:
            x, weights = to_device(tokens(M, 5)), rng.random((M, TOPK)).astype(np.float32)
            expected = bits(ours(x, None, to_device(weights), to_device(ids.astype(np.int32))))
            graph.inputs["hidden_states"][...] = x
            graph.inputs["topk_weights"][...] = to_device(weights)
            graph.inputs["topk_ids"][...] = to_device(ids.astype(np.int32))
            graph.output.fill(np.nan)
            assert (bits(graph.replay()) == expected).all(), name


def test_a_graph_with_gate_or_logits_and_shared_experts(cuda):
    shared = pymoe.SharedExperts(to_device(W1[0]), to_device(W2[0]), gate=to_device(GATE[:1]))
    ours = layer(gate=to_device(GATE), shared_experts=shared)
    x = to_device(tokens(33))
    expected = bits(ours(x))
    graph = ours.capture(33)
    graph.inputs["hidden_states"][...] = x
    assert (bits(graph.replay()) == expected).all()
    by_logits = ours.capture(33, inputs="logits")
    by_logits.inputs["hidden_states"][...] = x
    by_logits.inputs["router_logits"][...] = ours.gate(x)
    assert (bits(by_logits.replay()) == expected).all()


def test_a_graph_outlives_its_layer_and_memory_is_given_back(cuda):
    x = to_device(tokens(20))
    ours = layer(gate=to_device(GATE))
    expected = bits(ours(x))
    graph = ours.capture(20)
    ours.close()
    del ours
    gc.collect()
    gpu.dirty_pool(0xFF)
    graph.inputs["hidden_states"][...] = x
    assert (bits(graph.replay()) == expected).all()
    pool = cuda.get_default_memory_pool()
    del graph
    gc.collect()
    cuda.cuda.runtime.deviceSynchronize()
    pool.free_all_blocks()
    free = cuda.cuda.runtime.memGetInfo()[0]
    for _ in range(30):
        again = layer(gate=to_device(GATE))
        again.capture(20).replay()
        again.close()
        del again
    gc.collect()
    cuda.cuda.runtime.deviceSynchronize()
    pool.free_all_blocks()
    assert free - cuda.cuda.runtime.memGetInfo()[0] < 64 << 20


def test_a_users_own_capture_after_warm_up(cuda):
    ours = layer(gate=to_device(GATE))
    x, out = to_device(tokens(24)), cuda.empty((24, K), BF16)
    expected = bits(ours(x))
    stream = cuda.cuda.Stream(non_blocking=True)
    pool = cuda.cuda.MemoryPool()
    with stream, cuda.cuda.using_allocator(pool.malloc):
        ours.warm_up(24)
        stream.begin_capture()
        ours(x, out=out)
        graph = stream.end_capture()
        out.fill(0)
        graph.launch(stream)
        stream.synchronize()
    assert (bits(out) == expected).all()


def test_a_producer_on_a_side_stream_is_waited_for(cuda):
    """The current stream orders: a slow producer on it, then the layer, with no wait in between."""
    ours = layer(gate=to_device(GATE))
    good, x = to_device(tokens(40)), cuda.full((40, K), np.nan, BF16)
    expected = bits(ours(good))
    slow = cuda.RawKernel(
        'extern "C" __global__ void slow(long long n) { long long t = clock64(); while (clock64() - t < n); }',
        "slow",
    )
    stream = cuda.cuda.Stream(non_blocking=True)
    cuda.cuda.runtime.deviceSynchronize()
    with stream:
        slow((1,), (1,), (np.int64(80_000_000),))
        x[...] = good
        y = ours(x)
        stream.synchronize()
    assert (bits(y) == expected).all()


def test_out_of_memory_leaves_everything_usable(cuda):
    ours = layer(gate=to_device(GATE))
    x = to_device(tokens(500))
    expected = bits(ours(to_device(tokens(8))))
    pool = cuda.cuda.MemoryPool()
    pool.set_limit(size=1 << 16)
    fresh = layer(gate=to_device(GATE))
    with cuda.cuda.using_allocator(pool.malloc), pytest.raises(cuda.cuda.memory.OutOfMemoryError):
        fresh(x)
    assert pool.used_bytes() == 0
    assert (bits(fresh(to_device(tokens(8)))) == expected).all()


def test_nothing_waits_for_the_device(cuda):
    """A capture forbids every synchronizing call, so that recording the eager path proves it makes none."""
    for scheme in (None, "fp8_w8a8", "fp8_w8a8_block", "int8_w8a8", "nvfp4"):
        ours = layer(scheme, gate=to_device(GATE))
        ours.capture(16).replay()


def test_views_are_taken_or_refused_by_name(cuda):
    ours = layer(gate=to_device(GATE))
    whole = to_device(np.repeat(tokens(40), 2, axis=1))
    expected = bits(ours(cuda.ascontiguousarray(whole[::2, ::2])))
    assert (bits(ours(whole[::2, ::2])) == expected).all()
    out = cuda.full((K, 20), np.nan, BF16).T
    assert ours(whole[::2, ::2], out=out) is out
    assert (bits(cuda.ascontiguousarray(out)) == expected).all()
    with pytest.raises(pymoe.ArgumentError, match="w1 must be C-contiguous on a device"):
        pymoe.MoELayer(to_device(W1).transpose(0, 2, 1), to_device(W2), topk=TOPK)


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        (lambda x, w1, w2: (to_host(x), w1, w2), pymoe.ArgumentError, "must be on the device of"),
        (lambda x, w1, w2: (x, to_host(w1), w2), pymoe.ArgumentError, "must be on the device of"),
        (lambda x, w1, w2: (x[:, :-1], w1, w2), pymoe.ShapeError, "w1 must have"),
        (lambda x, w1, w2: (x.astype(np.float64), w1, w2), pymoe.DTypeError, "hidden_states must have dtype"),
    ],
)
def test_bad_arguments_raise_before_any_launch(cuda, change, kind, text):
    x, w1, w2 = change(to_device(tokens(4)), to_device(W1), to_device(W2))
    weights, ids = to_device(np.ones((4, 1), np.float32)), to_device(np.zeros((4, 1), np.int32))
    gc.collect()  # what earlier tests left would be freed on the way
    used = cuda.get_default_memory_pool().used_bytes()
    with pytest.raises(kind, match=text):
        pymoe.fused_experts(x, w1, w2, weights, ids)
    assert cuda.get_default_memory_pool().used_bytes() <= used


def test_checked_mode_names_the_bad_id(cuda):
    ids = np.zeros((4, 1), np.int32)
    ids[2, 0] = E
    arguments = to_device((tokens(4), W1, W2, np.ones((4, 1), np.float32), ids))
    pymoe.checked(True)
    with pytest.raises(pymoe.ArgumentError, match=f"{E} at row 2, slot 0"):
        pymoe.fused_experts(*arguments)


def test_overlapping_out_is_refused(cuda):
    x = to_device(tokens(4))
    with pytest.raises(pymoe.ArgumentError, match="out must not overlap hidden_states"):
        layer(gate=to_device(GATE))(x, out=x)


@pytest.mark.gpu2
def test_two_devices_at_once(cuda):
    layers, inputs = [], []
    for device in (0, 1):
        with cuda.cuda.Device(device):
            layers.append(layer(gate=to_device(GATE)))
            inputs.append(to_device(tokens(60)))
    answers = [ours(x) for ours, x in zip(layers, inputs, strict=True)]
    assert [y.device.id for y in answers] == [0, 1]
    assert (bits(answers[0]) == bits(answers[1])).all()
    with pytest.raises(pymoe.ArgumentError, match="CUDA device"):
        layers[0](inputs[1])


def test_dlpack_with_pytorch_and_jax_on_the_gpu(cuda):
    ours = layer(gate=to_device(GATE))
    x = to_device(tokens(21))
    expected = bits(ours(x))
    torch = pytest.importorskip("torch", exc_type=ImportError)
    tensor = torch.from_numpy(tokens(21).view(np.int16)).cuda().view(torch.bfloat16)
    y = ours(tensor)
    assert y.is_cuda and y.dtype == torch.bfloat16
    assert (y.view(torch.int16).cpu().numpy().view(np.uint16) == expected).all()
    w1, w2, config = pymoe.quantize_experts(W1.astype(np.float32), W2.astype(np.float32), "fp8_w8a8")
    codes = [torch.from_numpy(w).cuda().view(torch.float8_e4m3fn) for w in (w1, w2)]
    quantized = pymoe.MoELayer(*codes, topk=TOPK, quant_config=to_device(config), gate=to_device(GATE))
    same = pymoe.MoELayer(*to_device((w1, w2)), topk=TOPK, quant_config=to_device(config), gate=to_device(GATE))
    assert (bits(same(x)) == quantized(tensor).view(torch.int16).cpu().numpy().view(np.uint16)).all()


def test_large_offsets(cuda):
    """M * K and E * N * K beyond 2^31 elements, against the oracle on slices."""
    cuda.get_default_memory_pool().free_all_blocks()
    if (
        cuda.cuda.runtime.memGetInfo()[0] < 12 << 30
    ):  # tokens and answer, 4.3 GB each, or weights of 7 GB, and workspaces
        pytest.skip("needs 12 GiB of free memory")
    given = selection(300, 7168, 64, 2, 1, dtype=BF16)
    M = 300_000 + 7  # M * K > 2^31
    x = cuda.empty((M, 7168), BF16)
    small = to_device(given.x)
    for start in range(0, M, 300):
        x[start : start + 300] = small[: min(300, M - start)]
    ids = cuda.asarray(np.resize(given.topk_ids, (M, 1)))
    weights = cuda.asarray(np.resize(given.topk_weights, (M, 1)))
    y = pymoe.fused_experts(x, to_device(given.w1), to_device(given.w2), weights, ids)
    expected = given.expected()
    for start in (0, 149_700, 299_400, 299_700, 300_000):
        rows = to_host(y[start : start + 300])
        np.testing.assert_array_equal(rows, expected[: len(rows)])
    del x, y
    cuda.get_default_memory_pool().free_all_blocks()
    E_big = 80
    w1 = cuda.zeros((E_big, 2 * 2048, 7168), BF16)  # E * N * K = 2.3e9
    w2 = cuda.zeros((E_big, 7168, 2048), BF16)
    last = selection(40, 7168, 2048, 1, 1, dtype=BF16, dead=0)
    w1[-1], w2[-1] = to_device(last.w1[0]), to_device(last.w2[0])
    y = pymoe.fused_experts(
        to_device(last.x), w1, w2, to_device(last.topk_weights), cuda.full((40, 1), E_big - 1, np.int32)
    )
    np.testing.assert_array_equal(to_host(y), last.expected())
