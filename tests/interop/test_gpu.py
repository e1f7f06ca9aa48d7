"""PyTorch and JAX arrays on the GPU: bits, dtypes, streams that are ordered without waiting, lifetime, and no leak."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import pymoe
from tests import gpu
from tests.cuda.test_layer import GATE, TOPK, W1, W2, E, tokens
from tests.cuda.transfer import to_device, to_host

pytestmark = pytest.mark.gpu

BF16 = ml_dtypes.bfloat16
E4M3 = ml_dtypes.float8_e4m3fn
CLOCKS_OF_50_MS = 100_000_000  # at 2 GHz, above what an H100 runs at; fewer hertz take longer


@pytest.fixture(params=["torch", "jax"])
def package(request, cuda):
    module = pytest.importorskip(request.param, reason=f"{request.param} is not installed", exc_type=ImportError)
    made = (Torch if request.param == "torch" else Jax)(module)
    if not made.sees_device():
        pytest.skip(f"{request.param} here computes on the host only")
    return made


@pytest.fixture
def torch(cuda):
    module = pytest.importorskip("torch", reason="torch is not installed", exc_type=ImportError)
    if not module.cuda.is_available():
        pytest.skip("torch here computes on the host only")
    return module


class Torch:
    def __init__(self, torch):
        self.torch, self.kind = torch, torch.Tensor

    def sees_device(self):
        return self.torch.cuda.is_available()

    def make(self, array):
        raw = self.torch.from_numpy(array.view(f"int{8 * array.dtype.itemsize}").copy()).cuda()
        return raw.view(getattr(self.torch, array.dtype.name))

    def bits(self, tensor):
        assert tensor.is_cuda
        return tensor.contiguous().view(self.torch.uint8).cpu().numpy().tobytes()

    def dtype(self, tensor):
        return str(tensor.dtype).removeprefix("torch.")


class Jax:
    def __init__(self, jax):
        self.jax, self.kind = jax, jax.Array

    def sees_device(self):
        return any(device.platform == "gpu" for device in self.jax.devices())

    def make(self, array):
        return self.jax.device_put(array, self.jax.devices("gpu")[0])

    def bits(self, array):
        assert next(iter(array.devices())).platform == "gpu"
        return np.asarray(array).tobytes()

    def dtype(self, array):
        return array.dtype.name


def host_bits(array):
    return to_host(array).tobytes()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16])
def test_every_call_answers_in_kind_with_the_bits_of_cupy(package, dtype):
    x, w1, w2, gate = (a.astype(dtype) for a in (tokens(21), W1, W2, GATE))
    logits = np.random.default_rng(0).standard_normal((21, E)).astype(np.float32)
    ours = tuple(map(to_device, (x, w1, w2, gate, logits)))
    theirs = tuple(map(package.make, (x, w1, w2, gate, logits)))

    def answers(x, w1, w2, gate, logits):
        weights, ids = pymoe.select_experts(logits, TOPK)
        layer = pymoe.MoELayer(w1, w2, topk=TOPK, gate=gate)
        repeated = [layer(x) for _ in range(4)]  # from the second on by a tape
        return [weights, ids, pymoe.fused_experts(x, w1, w2, weights, ids), pymoe.fused_moe(x, w1, w2, logits, TOPK),
                layer(x, logits), layer(x, None, weights, ids), *repeated]  # fmt: skip

    for own, foreign in zip(answers(*ours), answers(*theirs), strict=True):
        assert isinstance(foreign, package.kind) and tuple(foreign.shape) == own.shape
        assert package.dtype(foreign) == own.dtype.name and package.bits(foreign) == host_bits(own)


@pytest.mark.parametrize("scheme", ["fp8_w8a8", "fp8_w8a8_block"])
def test_fp8_tensors_in_and_codes_out(package, scheme):
    w1, w2, config = pymoe.quantize_experts(W1.astype(np.float32), W2.astype(np.float32), scheme)
    x = tokens(21)
    options = {"topk": TOPK, "quant_config": to_device(config), "gate": to_device(GATE)}
    plain = pymoe.MoELayer(*to_device((w1, w2)), **options)(to_device(x))
    codes = [package.make(w.view(E4M3)) for w in (w1, w2)]
    assert all(package.dtype(w) == "float8_e4m3fn" for w in codes)
    assert package.bits(pymoe.MoELayer(*codes, **options)(package.make(x))) == host_bits(plain)
    for array in (x, tokens(3, 9)):
        mine, scale = pymoe.quantize(to_device(array), "kFp8DynamicTokenSym")
        got, got_scale = pymoe.quantize(package.make(array), "kFp8DynamicTokenSym")
        assert isinstance(got, package.kind) and package.bits(got) == host_bits(mine)
        assert package.bits(got_scale) == host_bits(scale)
        back = pymoe.dequantize(got, got_scale, "kFp8DynamicTokenSym", dtype="bfloat16")
        assert package.dtype(back) == "bfloat16"
        assert package.bits(back) == host_bits(pymoe.dequantize(mine, scale, "kFp8DynamicTokenSym", dtype="bfloat16"))


@pytest.mark.parametrize("given", ["new", "out"])
@pytest.mark.parametrize("own_stream", [False, True])
def test_a_producer_and_a_consumer_on_a_side_stream(torch, cuda, own_stream, given):
    """Behind a kernel of 50 ms: the tokens are read when they are there, the answer when it is, and nobody waits."""
    layer = pymoe.MoELayer(to_device(W1), to_device(W2), topk=TOPK, gate=to_device(GATE))
    package = Torch(torch)
    good = package.make(tokens(40))
    expected = package.bits(layer(good))
    x, out = torch.full_like(good, float("nan")), torch.full_like(good, float("nan"))
    side, ours = torch.cuda.Stream(), cuda.cuda.Stream(non_blocking=True) if own_stream else cuda.cuda.Stream.null
    for turn in range(6):
        x.fill_(float("nan"))
        out.fill_(float("nan"))
        torch.cuda.synchronize()
        began = time.perf_counter()
        with torch.cuda.stream(side), ours:
            if turn > 2:  # by now kernels, tapes and memory of these streams are there
                torch.cuda._sleep(CLOCKS_OF_50_MS)
            x.copy_(good)
            y = layer(x) if given == "new" else layer(x, out=out)
            copy = y.clone()  # on the side stream, at once
            x.fill_(float("nan"))  # the tokens' memory is the producer's again
        took = time.perf_counter() - began
        busy = not side.query()
        side.synchronize()
        assert package.bits(copy) == expected
        assert turn < 3 or (busy and took < 0.04), f"the host waited: {took:.3f} s"


def test_a_producer_of_jax_that_is_still_busy(cuda):
    jax = pytest.importorskip("jax", reason="jax is not installed", exc_type=ImportError)
    package = Jax(jax)
    if not package.sees_device():
        pytest.skip("jax here computes on the host only")
    layer = pymoe.MoELayer(to_device(W1), to_device(W2), topk=TOPK, gate=to_device(GATE))
    good = package.make(tokens(40))
    expected = package.bits(layer(good))
    large = jax.numpy.ones((4096, 4096), jax.numpy.float32) / 4096

    @jax.jit
    def slow(x, a):
        a = jax.lax.fori_loop(0, 30, lambda _, b: b @ a, a)  # far above 50 ms in float32
        return x + (0 * a[0, 0]).astype(x.dtype)

    slow(good, large).block_until_ready()
    for _ in range(3):
        assert package.bits(layer(slow(good, large))) == expected


def test_the_answer_outlives_every_object_of_ours(package, cuda):
    layer = pymoe.MoELayer(package.make(W1), package.make(W2), topk=TOPK, gate=package.make(GATE))
    graph = layer.capture(20)
    answers = [layer(package.make(tokens(20, seed))) for seed in range(5)]
    bits = [package.bits(y) for y in answers]
    graph.replay()
    layer.close()
    del layer, graph
    gc.collect()
    for fill in gpu.FILLS:
        gpu.dirty_pool(fill)
        cuda.cuda.runtime.deviceSynchronize()
        assert [package.bits(y) for y in answers] == bits


def test_the_weights_outlive_their_owner(package, cuda):
    """A layer borrows its weights: it holds the caller's memory as long as it lives."""
    layer = pymoe.MoELayer(package.make(W1), package.make(W2), topk=TOPK, gate=package.make(GATE))
    x = package.make(tokens(20))
    expected = package.bits(layer(x))
    gc.collect()
    others = [package.make(np.full_like(W1, np.nan)) for _ in range(8)]
    gpu.dirty_pool(0xFF)
    assert package.bits(layer(x)) == expected
    del others


def test_the_example_computes_on_the_gpu(package):
    name = "pytorch_arrays.py" if isinstance(package, Torch) else "jax_arrays.py"
    command = [sys.executable, Path(__file__).parents[2] / "examples" / name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=Path(__file__).parents[2],
                          env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "on cuda:0" in done.stdout, done.stdout


def resident_bytes():
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096


def test_ten_thousand_exchanges_leak_nothing(package, cuda):
    """Memory of the device and of the process, before and after; a leak of one answer a call would be 50 MB of each."""
    layer = pymoe.MoELayer(to_device(W1), to_device(W2), topk=TOPK, gate=to_device(GATE))
    x = package.make(tokens(20))  # 5 KB
    raw = package.make(tokens(64).astype(np.float32))

    def exchange(count):
        for i in range(count):
            y = layer(x)
            if i % 4 == 0:
                pymoe.quantize(raw, "kFp8DynamicTokenSym")
        return y

    def settled():
        gc.collect()
        cuda.cuda.runtime.deviceSynchronize()
        cuda.get_default_memory_pool().free_all_blocks()
        return cuda.cuda.runtime.memGetInfo()[0], cuda.get_default_memory_pool().used_bytes(), resident_bytes()

    exchange(2000)
    free, used, resident = settled()
    exchange(10_000)
    free_after, used_after, resident_after = settled()
    print(f"device {free - free_after} B, pool {used_after - used} B, process {resident_after - resident} B")
    assert used_after - used < 1 << 20
    if "PYTEST_XDIST_WORKER" not in os.environ:  # other workers take of the device's memory meanwhile
        assert free - free_after < 16 << 20
    assert resident_after - resident < 16 << 20
