"""Numba's experts on a GPU: the exact oracle, the other experts' answers, and nothing that waits."""

from __future__ import annotations

import dataclasses
import importlib.util

import numpy as np
import pytest

import pymoe
from pymoe import CudaGroupedExperts, FusedMoEKernel, NumbaCudaExperts, SingleProcessPrepareAndFinalize
from pymoe.device.tape import Recorder
from pymoe.ops.permute import permute
from pymoe.ops.quantize import quantize_activations
from tests import gpu
from tests.cuda.test_experts import on_device
from tests.cuda.transfer import to_device, to_host
from tests.experts.test_pairs import E as EXPERTS
from tests.experts.test_pairs import problem
from tests.formula import untranslated
from tests.numba_cuda.test_simulated import ACTIVATIONS, HIDDEN, PARAMETERS, SCHEMES, bent, bent_gate
from tests.selection import BF16, selection
from tests.test_selection import NEARLY, kernel_for, sizes
from tests.test_selection import apply as apply_kernel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("cuda"),
    pytest.mark.skipif(importlib.util.find_spec("numba_cuda") is None, reason="numba-cuda is not installed"),
]


def answer(given, cls=NumbaCudaExperts):
    """Return the answer of a selection problem, written into NaN."""
    q = on_device(given)
    kernel = kernel_for(q, cls, SingleProcessPrepareAndFinalize())
    out = gpu.filled(q.x.shape, q.x.dtype)
    arguments = q.arguments()
    rest = {name: arguments.pop(name) for name in ("topk_weights", "topk_ids", "activation", "expert_map")}
    kernel.apply(arguments["hidden_states"], arguments["w1"], arguments["w2"], out=out, **rest)
    return to_host(out)


def moved(p):
    """Return a problem of `test_pairs` on the GPU."""
    arrays = {name: to_device(getattr(p, name)) for name in ("x", "w1", "w2", "scale", "ids", "quant_config")}
    return dataclasses.replace(p, **arrays)


def run(p, cls=NumbaCudaExperts, **options):
    experts = cls(p.config(device="cuda"), p.quant_config)
    return to_host(p.run(experts, SingleProcessPrepareAndFinalize(), **options))


def test_the_oracle_at_random_sizes(dirty_memory):
    for size in sizes(9, 100):
        given = selection(**size)
        np.testing.assert_array_equal(answer(given), given.expected(), err_msg=str(size))


@pytest.mark.parametrize("dtype", HIDDEN)
def test_every_edge_of_a_tile(dtype):
    for width, K in ((1, 1), (15, 17), (16, 16), (17, 15), (33, 31), (31, 130)):
        given = selection(40, K, width, 3, 2, dtype=dtype)
        np.testing.assert_array_equal(answer(given), given.expected(), err_msg=f"K {K} I {width}")


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s in (*NEARLY, "fp8_w8a8_block_ue8m0")])
def test_every_pair_on_the_oracle(scheme):
    for seed, (M, K, width, E, topk) in enumerate([(33, 256, 128, 5, 3), (7, 320, 128, 4, 4)]):
        given = selection(M, K, width, E, topk, seed=seed, dtype=BF16)
        w1, w2, config = pymoe.quantize_experts(given.w1.astype(np.float32), given.w2.astype(np.float32), scheme)
        q = on_device(given)
        kernel = kernel_for(q, NumbaCudaExperts, SingleProcessPrepareAndFinalize())
        experts = NumbaCudaExperts(kernel.fused_experts.moe_config, to_device(config))
        q.w1, q.w2 = to_device(w1), to_device(w2)
        y = to_host(apply_kernel(FusedMoEKernel(SingleProcessPrepareAndFinalize(), experts), q))
        expected = given.expected()
        if scheme in NEARLY:
            assert np.abs(y[expected == 0].astype(np.float64)).max(initial=0) <= topk * 32 * 2.0**-22
            y[expected == 0] = 0
        np.testing.assert_array_equal(y, expected, err_msg=f"{scheme} {M}")


@pytest.mark.parametrize("scheme", ["fp32", *SCHEMES[1:]])
@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_two_independent_gpu_layers_agree(scheme, dtype):
    p = moved(problem(scheme, dtype=dtype, biases=True))
    y, other = run(p).astype(np.float64), run(p, CudaGroupedExperts).astype(np.float64)
    exact = scheme == "fp32" or scheme.endswith("a16")
    limit = 3e-2 if not exact else 2e-2 if dtype == BF16 else 1e-5
    assert np.isfinite(y).all() and np.abs(y - other).max() <= limit * np.abs(other).max()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_agrees_with_the_cpu(activation):
    config = pymoe.ActivationConfig(activation, **PARAMETERS.get(activation.value, {}))
    x = np.random.default_rng(1).standard_normal((7, 300)).astype(np.float32) * 4
    x[0, :8] = [0, -0.0, np.inf, -np.inf, np.nan, 1e-40, 88.8, -104]
    expected = pymoe.ops.activation(x, config, backend="numpy")
    y = to_host(pymoe.ops.activation(to_device(x), config, backend="numba_cuda"))
    finite = np.isfinite(expected)
    np.testing.assert_array_max_ulp(y[finite], expected[finite], 4)
    np.testing.assert_array_equal(y[~finite], expected[~finite])


@pytest.mark.parametrize("fn, gated", [(bent_gate, True), (bent, False), (untranslated.helped, True)])
def test_registered_activations_have_the_bits_of_the_definition(fn, gated):
    kind = pymoe.register_activation(f"gpu_{fn.__name__}", fn, gated)
    x = np.random.default_rng(1).standard_normal((50, 300)).astype(np.float32) * 4
    x[0, :8] = [0, -0.0, np.inf, -np.inf, np.nan, 1e-40, 88.8, -104]
    expected = pymoe.ops.activation(x, kind, backend="numpy")
    y = to_host(pymoe.ops.activation(to_device(x), kind, backend="numba_cuda"))
    np.testing.assert_array_equal(y, expected)
    p = moved(problem(activation=kind))
    other = run(p, CudaGroupedExperts)
    np.testing.assert_allclose(run(p), other, rtol=0, atol=1e-5 * np.abs(other).max())


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s != "none" and not s.endswith("a16")])
@pytest.mark.parametrize("dtype", HIDDEN)
def test_codes_and_scales_are_the_cpus(scheme, dtype):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((300, 300)) * np.exp(rng.uniform(-20, 12, (300, 1)))).astype(np.float32)
    x[1], x[2, 3], x[3, 2], x[4, 7] = 0, np.inf, np.nan, -np.inf
    x[5] = (np.arange(300) - 149.5) / 2
    with np.errstate(all="ignore"):
        x = x.astype(dtype)
    config = problem(scheme).quant_config
    expected, expected_scale = quantize_activations(x, config)
    codes, scale = quantize_activations(to_device(x), to_device(config), backend="numba_cuda")
    np.testing.assert_array_equal(to_host(codes), expected)
    np.testing.assert_array_equal(to_host(scale).view(np.uint8), expected_scale.view(np.uint8))


def test_a_rows_bits_depend_on_no_other_row_or_chunk():
    p = moved(problem("fp8_w8a8", dtype=BF16))
    whole = run(p)
    np.testing.assert_array_equal(run(p, chunk_size=3), whole)
    for m in (0, 5, 10):
        alone = dataclasses.replace(p, x=p.x[m : m + 1], ids=p.ids[m : m + 1], scale=p.scale[m : m + 1])
        np.testing.assert_array_equal(run(alone), whole[m : m + 1])


def test_weights_in_another_order_are_refused():
    import cupy

    p = moved(problem())
    turned = dataclasses.replace(p, w1=cupy.ascontiguousarray(p.w1.swapaxes(1, 2)).swapaxes(1, 2))
    with pytest.raises(pymoe.ArgumentError, match="w1 must be C-contiguous on a device"):
        run(turned)


SPIN = r"""extern "C" __global__ void spin(long long ns) {
    long long start, now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(start));
    do asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now)); while (now - start < ns);
}"""


def test_nothing_waits_and_the_stream_orders_it(cuda):
    """Behind a kernel of 300 ms on a side stream the call returns while that runs, and takes tokens written later."""
    p = moved(problem("fp8_w8a8", dtype=BF16))
    expected = run(p)
    spin = cuda.RawKernel(SPIN, "spin")
    experts = NumbaCudaExperts(p.config(device="cuda"), p.quant_config)
    kernel, stream = FusedMoEKernel(SingleProcessPrepareAndFinalize(), experts), cuda.cuda.Stream(non_blocking=True)
    late, out = cuda.zeros_like(p.x), cuda.empty_like(p.x)
    arguments = {"topk_weights": p.scale, "topk_ids": p.ids, "activation": p.activation, "out": out}
    cuda.cuda.Device().synchronize()  # the arrays were made on another stream
    with stream:
        kernel.apply(late, p.w1, p.w2, **arguments)  # compiles, and takes the stream's workspace
        stream.synchronize()
        spin((1,), (1,), (np.int64(300_000_000),))
        late[...] = p.x
        kernel.apply(late, p.w1, p.w2, **arguments)
        returned_early = not stream.done
    stream.synchronize()
    assert returned_early
    np.testing.assert_array_equal(to_host(out), expected)


def test_in_a_graph(cuda):
    """Captured once, replayed with other tokens and other ids."""
    p, stream = moved(problem(dtype=BF16)), cuda.cuda.Stream(non_blocking=True)
    expected = run(p)
    experts = NumbaCudaExperts(p.config(device="cuda"), p.quant_config)
    kernel = FusedMoEKernel(SingleProcessPrepareAndFinalize(), experts)
    x, ids, out = cuda.zeros_like(p.x), cuda.full_like(p.ids, -1), cuda.empty_like(p.x)
    arguments = {"topk_weights": p.scale, "topk_ids": ids, "activation": p.activation, "out": out}
    cuda.cuda.Device().synchronize()  # the arrays were made on another stream
    with stream:
        kernel.apply(x, p.w1, p.w2, **arguments)
        stream.begin_capture()
        kernel.apply(x, p.w1, p.w2, **arguments)
        graph = stream.end_capture()
        x[...], ids[...] = p.x, p.ids
        graph.launch(stream)
    stream.synchronize()
    np.testing.assert_array_equal(to_host(out), expected)


def test_a_tape_is_told_that_it_cannot_repeat_these_launches():
    ids = to_device(np.array([[0, 1], [1, -1]], np.int32))
    recorder = Recorder([ids])
    with recorder.active():
        permute(ids, 2, backend="numba_cuda")
    assert recorder.tape() is None


def test_select_prefers_the_cuda_experts_and_says_so():
    p = moved(problem())
    config = p.config(device="cuda")
    choice = pymoe.select(config, p.quant_config)
    assert type(choice.experts) is CudaGroupedExperts
    assert dict(choice.refused)["NumbaCudaExperts"] == "supported, but CudaGroupedExperts is preferred"
    refused = dict(pymoe.select(config, problem("mxfp4").quant_config).refused)
    assert refused["NumbaCudaExperts"] == "kernel does not support quant scheme kMxfp4Static x kMxfp4Dynamic"


def test_arrays_of_the_host_are_refused():
    with pytest.raises(pymoe.ArgumentError, match="backend must be numpy, numba or None for arrays in host memory"):
        permute(np.zeros((1, 1), int), EXPERTS, backend="numba_cuda")
