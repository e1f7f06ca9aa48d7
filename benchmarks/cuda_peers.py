"""The peers of bench_moe.py, and the card's matrix rate: PyTorch's grouped GEMM and JAX's ragged_dot."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import statistics
import time
from typing import Any

import cupy


def versions() -> dict[str, str]:
    """Return the versions of the peers that are installed."""
    found = {}
    for name in ("torch", "jax", "triton"):
        if importlib.util.find_spec(name) is not None:
            found[name] = importlib.metadata.version(name)
    return found


def matrix_rates(side: int = 8192) -> dict[str, float]:
    """Return FLOP/s of the libraries' bf16 and fp8 matrix products on random data, best of several."""
    import torch

    a, b = (torch.randn(side, side, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    rates = {"bf16_flops": _rate(lambda: a @ b.T, side)}
    scale = torch.ones((), device="cuda")
    a8, b8 = ((x * 100).clamp(-448, 448).to(torch.float8_e4m3fn) for x in (a, b))
    rates["fp8_flops"] = _rate(
        lambda: torch._scaled_mm(a8, b8.T, scale_a=scale, scale_b=scale, out_dtype=torch.bfloat16), side
    )
    return rates


def _rate(product: Any, side: int) -> float:
    import torch

    times = []
    for _ in range(12):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        product()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1000)
    return 2 * side**3 / min(times[3:])


def torch_us(problem: Any, calls: int, seconds: float) -> float:
    """Return microseconds a call of the layer in PyTorch: top-k, sort, gather, two grouped GEMMs, SiLU, index_add."""
    import torch

    E, topk = problem.w1.shape[0], problem.topk
    w1, w2 = (torch.from_dlpack(w).transpose(1, 2) for w in (problem.w1, problem.w2))
    tokens, logits = [torch.from_dlpack(x) for x in problem.tokens], [torch.from_dlpack(x) for x in problem.logits]

    def call(i: int) -> Any:
        x = tokens[i]
        values, ids = torch.topk(logits[i], topk, dim=-1)
        weights = torch.softmax(values, dim=-1)
        order = torch.sort(ids.reshape(-1), stable=True).indices
        ends = torch.cumsum(torch.bincount(ids.reshape(-1), minlength=E), 0, dtype=torch.int32)
        token = order // topk
        gate, up = torch._grouped_mm(x[token], w1, offs=ends).chunk(2, dim=-1)
        rows = torch._grouped_mm(torch.nn.functional.silu(gate) * up, w2, offs=ends)
        y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        y.index_add_(0, token, rows.float() * weights.reshape(-1)[order, None])
        return y.to(x.dtype)

    with torch.inference_mode():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for i in range(len(tokens)):
                call(i)
        torch.cuda.current_stream().wait_stream(stream)
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                for i in range(calls):
                    call(i % len(tokens))
            run, per = graph.replay, calls
        except RuntimeError:  # bincount asks the device for its size
            run, per = lambda: [call(i) for i in range(len(tokens))], len(tokens)
        times, end = [], time.monotonic() + seconds
        run()
        torch.cuda.synchronize()
        while len(times) < 5 or (time.monotonic() < end and len(times) < 100):
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop) * 1000 / per)
    torch.cuda.empty_cache()
    return round(statistics.median(times), 2)


def jax_us(problem: Any, seconds: float) -> float:
    """Return microseconds a call of the layer in JAX: jitted top-k, sort, two ragged_dot, SiLU, scatter-add."""
    import os

    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax
    import jax.numpy as jnp

    E, topk = problem.w1.shape[0], problem.topk
    w1, w2 = (jnp.swapaxes(jax.dlpack.from_dlpack(w), 1, 2) for w in (problem.w1, problem.w2))
    sets = [tuple(jax.dlpack.from_dlpack(a) for a in pair) for pair in zip(problem.tokens, problem.logits, strict=True)]

    @jax.jit
    def layer(x, logits, w1, w2):
        values, ids = jax.lax.top_k(logits, topk)
        weights = jax.nn.softmax(values).reshape(-1)
        order = jnp.argsort(ids.reshape(-1), stable=True)
        sizes = jnp.bincount(ids.reshape(-1), length=E).astype(jnp.int32)
        token = order // topk
        gate, up = jnp.split(jax.lax.ragged_dot(x[token], w1, sizes), 2, axis=-1)
        rows = jax.lax.ragged_dot(jax.nn.silu(gate) * up, w2, sizes)
        y = jnp.zeros(x.shape, jnp.float32).at[token].add(rows.astype(jnp.float32) * weights[order, None])
        return y.astype(x.dtype)

    cupy.cuda.runtime.deviceSynchronize()
    for pair in sets:
        layer(*pair, w1, w2).block_until_ready()
    times, end = [], time.monotonic() + seconds
    while len(times) < 5 or (time.monotonic() < end and len(times) < 50):
        start = time.perf_counter()
        for _ in range(5):
            for pair in sets:
                y = layer(*pair, w1, w2)
        y.block_until_ready()
        times.append((time.perf_counter() - start) * 1e6 / (5 * len(sets)))
    return round(statistics.median(times), 2)
